#!/bin/bash
# lab: own-host
# Guests that are clones of one base share its data and tags until they write.
. "$(dirname "$0")/guests.bash"

add_swap
lab-tests --test-threads 1 clones::
