#!/bin/bash
# lab: cpus=2 timeout=600
# Whether two threads read and write tags faster than one.
exec bench-tags scaling
