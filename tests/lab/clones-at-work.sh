#!/bin/bash
# lab: own-host timeout=900
# COUNT clones (4 by default; 16 is the whole test) of one snapshot of a guest at work, all at once: each goes on with the memory and tags that
# all share and makes its own of them, has a name, a socket, random numbers and a disk of its own, and leaves nothing behind.
. "$(dirname "$0")/guests.bash"

count=${COUNT:-4}
told='reseeded.due.to.virtual.machine.fork'

# The workload goes on with what it had. What a clone begins anew differs from clone to clone: a second workload, whose
# random choices start from the guest's entropy, and what it writes to its disk.
mkdir guest
cat > guest/work << END
set -eu
tag-workload --memory 4M --pause 200 &
workload=\$!
until dmesg | grep -q $told; do sleep 1; done
echo 'guest: is a clone'
tag-workload --memory 4M --passes 2
head -c 256k /dev/urandom > /tmp/own
dd if=/tmp/own of=/dev/vda bs=64k conv=fsync 2> /dev/null
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=4 2> /dev/null | cmp - /tmp/own
dd if=/dev/vda bs=64k skip=4 count=4 2> /dev/null | sha256sum | sed 's/^/guest: of the image /'
kill -TERM \$workload
wait \$workload
echo 'guest: all was its own'
sleep 100000
END
initrd_with trixie guest
run=(tagvisor run --memory 160M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd
    --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work')

# machines: how many run.
machines() {
    tagvisor ls --json | jq 'map(select(.state == "Running")) | length'
}

head -c 1M /dev/urandom > image
sha256sum image > image.sum
"${run[@]}" --name base --disk image --console "file=$OUT/base.console" < /dev/null &
machine=$!
wait_for_console base ' 0 differences' $machine
tagvisor pause base
tagvisor snapshot base file
tagvisor stop base
ended_as 3 $machine

tagvisor clone file --count "$count" --detach --console "file=$OUT/clone-%i.console" > clones
echo "$count clones run, $SECONDS s"
[ "$(machines)" = "$count" ] || fail "not all clones run: $(tagvisor ls)"
while read -r name pid; do
    wait_for_console "clone-${name#base-}" 'guest: all was its own' "$pid"
    [ -S "/run/tagvisor/$name/api.sock" ] || fail "$name has no socket"
done < clones
echo "$count clones did their work, $SECONDS s"
[ "$(machines)" = "$count" ] || fail "not all clones still run: $(tagvisor ls)"
for number in $(seq "$count"); do
    # Of the workload that went on, and of the one that began.
    [ "$(grep -c 'workload: ok' "$OUT/clone-$number.console")" = 2 ] || fail "clone $number: a workload did not end well"
    console_has "clone-$number" "guest: of the image $(dd if=image bs=64k skip=4 count=4 2> /dev/null | sha256sum)"
    grep -o 'seed [0-9]*' "$OUT/clone-$number.console"
done | sort -u > seeds
[ "$(wc -l < seeds)" = "$count" ] || fail "clones took the same random numbers: $(cat seeds)"
for number in $(seq "$count"); do
    tagvisor stop "base-$number"
done
sha256sum --quiet -c image.sum

# Of a machine that runs, by its name; it goes on, and is no clone.
"${run[@]}" --name original --console "file=$OUT/original.console" < /dev/null &
machine=$!
wait_for_console original ' 0 differences' $machine
tagvisor clone original --count 2 --detach --console "file=$OUT/of-original-%i.console" | cat > clones # cat ends with the command, not with the clones
while read -r name pid; do
    wait_for_console "of-${name}" 'guest: is a clone' "$pid"
    wait_for_console_times "of-${name}" ' 0 differences' 2 "$pid"
done < clones
lines=$(grep -c ' 0 differences' "$OUT/original.console")
wait_for_console_times original ' 0 differences' $((lines + 1)) $machine
console_lacks original 'guest: is a clone'
tagvisor stop original-1
tagvisor stop original-2
tagvisor stop original
ended_as 3 $machine
[ -z "$(ls -A /run/tagvisor)" ] || fail "left behind: $(ls -A /run/tagvisor)"
