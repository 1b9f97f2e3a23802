#!/bin/bash
# lab: kernel=bookworm timeout=120
# KVM of Linux 6.1, which refuses shared memory to guests with MTE, passes the conformance checks that it can.
. "$(dirname "$0")/conformance.bash"

conformance_passes
