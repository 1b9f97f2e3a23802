#!/bin/bash
# lab: kernel=bookworm
# The same on a host before Linux 6.2: private memory, and the kernel's bulk copy alone.
exec lab-tests --test-threads 1 tags --skip clones::
