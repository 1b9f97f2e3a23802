#!/bin/bash
# lab: icount memory=6G timeout=1500
# What tags add to a guest's move from one process to another, in instructions of all that runs: the source, the destination, the host's
# kernel and the guest. An LDG counts as any other instruction here; in time, an emulator's costs as much as dozens of them.
set -euo pipefail

. /lab/benches/moves.bash

cd "$(mktemp -d)"
echo 'Times are instructions: one is a nanosecond'
shares
exit $missed
