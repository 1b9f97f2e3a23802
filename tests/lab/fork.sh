#!/bin/bash
# A guest that is restored learns that others may go on from the same state, and takes new random numbers.
. "$(dirname "$0")/guests.bash"

told='reseeded.due.to.virtual.machine.fork$'
tagvisor run --name original --kernel "$LAB/kernels/trixie/Image" --initrd "$LAB/kernels/trixie/initrd.cpio" \
    --console "file=$OUT/original.console" --no-reboot \
    --cmdline "console=ttyS0 quiet -- echo waits; until dmesg | grep -q $told; do sleep 0.2; done; echo was told" < /dev/null &
original=$!
wait_for_console original waits $original
tagvisor snapshot original file
tagvisor restore file --name restored --console "file=$OUT/restored.console" < /dev/null
console_has restored 'was told'
tagvisor info original > info
grep -q Running info || fail "the original does not go on: $(cat info)"
console_lacks original 'was told'
tagvisor stop original
