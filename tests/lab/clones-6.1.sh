#!/bin/bash
# lab: own-host kernel=bookworm
# The same on a host before Linux 6.2, which refuses shared memory to guests with MTE and takes private mappings.
. "$(dirname "$0")/guests.bash"

add_swap
lab-tests --test-threads 1 clones::
