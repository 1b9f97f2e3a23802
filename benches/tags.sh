#!/bin/bash
# lab: icount timeout=600
# How many instructions it takes to read and write the tags of a page, by the tag mapping and by KVM's bulk copy.
exec bench-tags paths
