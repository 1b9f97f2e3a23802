#!/bin/bash
# What a guest died of is told in words: the panic of its kernel, and the tag fault with the tags around it.
. "$(dirname "$0")/guests.bash"

# A program at EL1 that writes by a pointer with another tag than memory has, and resets its machine.
timeout $LIMIT tagvisor run --name payload --no-reboot --flat "$LAB/bin/tag-fault.bin" --console "file=$OUT/payload.console" \
    < /dev/null 2> payload.err || echo "status $?"
cat payload.err
pointer=$(sed -n 's/^tag-fault: pointer \(0x[0-9a-f]*\).*/\1/p' "$OUT/payload.console")
grep -qF 'the guest died: its kernel says nothing of a panic' payload.err || fail 'its death is not told'
grep -q 'vCPU 0 stands at 0x[0-9a-f]* in EL1; its last exception was a tag check fault: a write by a pointer' payload.err ||
    fail 'the fault is not told'
grep -qF "pointer $pointer, tag b, is guest-physical" payload.err || fail "the pointer $pointer is not told"
grep -qF 'memory tag 5: they do not match' payload.err || fail 'the tags are not told'
grep -qF ' 0 1 2 3 4[5]6 7 8 9 a b c' payload.err || fail 'the tags around it are not told'

# A vCPU that cannot go on.
timeout $LIMIT tagvisor run --name stuck --no-reboot --flat "$LAB/bin/tag-fault.bin" --cmdline end=stuck --console "file=$OUT/stuck.console" \
    < /dev/null 2> stuck.err || echo "status $?"
cat stuck.err
grep -q 'vCPU 0 stands at 0x[0-9a-f]* in EL1' stuck.err || fail 'where it stands is not told'

# A kernel that panics on purpose.
linux panics trixie --cpus 2 --memory 512M -- 'echo c > /proc/sysrq-trigger' || echo "status $?"
console_has panics 'the guest died: its kernel panicked: sysrq triggered crash'
console_has panics 'vCPU 1 stands at 0x'
grep -A 20 'the guest died' "$OUT/panics.console"

# The first program of a guest dies of a tag fault on its tagged heap, and the kernel with it.
perl_into guest
cp "$LAB/programs/heartbeat.pl" guest
printf '%s\n' '#!/bin/busybox sh' 'export GLIBC_TUNABLES=glibc.mem.tagging=3' "exec $perl /heartbeat.pl --bleed" > guest/first
chmod +x guest/first
initrd_with trixie guest
timeout $LIMIT tagvisor run --name init-dies --no-reboot --memory 512M --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd \
    --cmdline 'console=ttyS0 quiet panic=-1 rdinit=/first' < /dev/null > "$OUT/init-dies.console" 2>&1 || echo "status $?"
console_has init-dies 'the guest died: its kernel panicked: Attempted to kill init! exitcode=0x0000000b'
console_has init-dies 'its last exception was a tag check fault: a read by a pointer'
console_has init-dies 'they do not match'
grep -A 20 'the guest died' "$OUT/init-dies.console"

# One that panicked and stays so: whoever asks is told.
tagvisor run --name stays --memory 512M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd "$LAB/kernels/trixie/initrd.cpio" \
    --cmdline 'console=ttyS0 quiet -- echo c > /proc/sysrq-trigger' --console "file=$OUT/stays.console" < /dev/null 2> stays.err &
machine=$!
wait_for_console stays 'end Kernel panic' $machine
tagvisor tags faults stays --log 400 > faults
grep -q 'Linux version 6' faults || fail 'the log does not begin as it did'
grep -qF 'its kernel panicked: sysrq triggered crash' faults || fail "what it died of is not told: $(cat faults)"
tail -n 8 faults
tagvisor stop stays
ended_as 3 $machine

# A guest that reboots has not died.
linux reboots trixie -- 'reboot -f; sleep 100' || echo "status $?"
console_lacks reboots 'the guest died'
