#!/bin/bash
# Addresses of a process in a Linux guest: of one that a vCPU runs they are known by its number, and a pointer of its own leads to
# its data and to the tag that it has; of one that sleeps it is said that they are not.
. "$(dirname "$0")/guests.bash"

perl_into guest
cat > guest/spin.pl << 'END'
$| = 1;
my $text = "tagged heap " x 100;
printf "process %d has %#x\n", $$, unpack("Q", pack("p", $text));
1 while 1;
END
cat > guest/work << END
echo "shell \$\$"
GLIBC_TUNABLES=glibc.mem.tagging=3 $perl /spin.pl
END
initrd_with trixie guest
tagvisor run --name web --cpus 2 --memory 256M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd \
    --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work' --console "file=$OUT/web.console" < /dev/null 2> web.err &
machine=$!
wait_for_console web ' has 0x' $machine
read -r process buffer < <(sed -n 's/^process \([0-9]*\) has \(0x[0-9a-f]*\)\r*$/\1 \2/p' "$OUT/web.console")
shell=$(sed -n 's/^shell \([0-9]*\)\r*$/\1/p' "$OUT/web.console")

# What else the kernel does may have its vCPU at that moment.
for ((attempt = 0; attempt < 20; attempt++)); do
    ! tagvisor tags at web "$buffer" --pid "$process" > at 2> at.err || break
    cat at.err
    sleep 0.2
done
cat at
grep -q 'tagged heap' at || fail "at $buffer of process $process are other data"
grep -q ': they match' at || fail "the tag of $buffer is not its memory's"
refused 1 "no vCPU runs process $shell" tagvisor tags at web "$buffer" --pid "$shell"
refused 2 'cannot be used with' tagvisor tags at web "$buffer" --pid "$process" --vcpu 0

# As it was saved.
tagvisor pause web
if tagvisor tags at web "$buffer" --pid "$process" > at.paused; then
    tagvisor snapshot web web.snapshot
    tagvisor tags at web.snapshot "$buffer" --pid "$process" | cmp - at.paused
fi
tagvisor stop web
ended_as 3 $machine
