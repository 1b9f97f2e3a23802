#!/bin/bash
# lab: own-host timeout=120
# KVM of Linux 6.12 passes the conformance checks.
. "$(dirname "$0")/conformance.bash"

conformance_passes
