#!/bin/bash
# A Linux guest that tags and checks its memory goes on in another machine, with the first one's state and memory, and
# finds every tag where it left it.
exec lab-tests a_guest_at_work
