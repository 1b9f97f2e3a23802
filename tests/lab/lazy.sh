#!/bin/bash
# Memory that comes as it is touched has the right data and tags from the first touch on, also for a Linux guest at work, and
# when its source fails for a while.
exec lab-tests lazily
