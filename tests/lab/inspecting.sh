#!/bin/bash
# lab: own-host timeout=900
# A live Linux guest with MTE is looked at: figures, pictures, dumps, searches, differences and cores of a machine that runs agree
# with those of its snapshots; it stands still meanwhile, or goes on with --live, and goes on after, however whoever looks ends.
. "$(dirname "$0")/guests.bash"

mkdir guest
cat > guest/work << 'END'
grep ' linux_banner$' /proc/kallsyms | sed 's/^/banner: /'
exec tag-workload --memory 8M --pause 50
END
initrd_with trixie guest
run=(tagvisor run --cpus 2 --memory 256M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd
    --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work')

# start NAME [OPTION…]: the workload in a machine of that name, as process $machine.
start() {
    local name=$1
    shift
    "${run[@]}" --name "$name" --console "file=$OUT/$name.console" "$@" < /dev/null 2> "$name.err" &
    machine=$!
    wait_for_console "$name" ' 0 differences' $machine
}

# agrees NAME: what is seen of the machine, which is paused, is what is in its snapshot.
agrees() {
    tagvisor pause "$1"
    tagvisor snapshot "$1" "$1.snapshot"
    tagvisor core "$1.snapshot" saved.core --json > saved.core.json
    [ "$(jq .vmcoreinfo saved.core.json)" = '"found"' ] || fail "the core of $1: $(cat saved.core.json)"
    tagvisor core "$1" "$1.core" --json | cmp - saved.core.json
    cmp "$1.core" saved.core
    rm "$1.core" saved.core
    tagvisor tags stat "$1.snapshot" > saved.stat
    tagvisor tags dump "$1.snapshot" --range 0x40000000+4M > saved.dump
    for how in '' --live; do
        tagvisor tags stat "$1" $how | cmp - saved.stat
        tagvisor tags dump "$1" $how --range 0x40000000+4M | cmp - saved.dump
    done
    # Neither way around is there a difference.
    tagvisor tags diff "$1" "$1.snapshot" --json | tail -n 1 > same
    tagvisor tags diff "$1.snapshot" "$1" --json | tail -n 1 | cmp - same
    jq -e '.pages > 1000 and .data + .tags + .both + .only_first + .only_second == 0' same > answer ||
        fail "$1 is not what its snapshot is: $(cat same)"
    tagvisor resume "$1"
    goes_on $machine "$OUT/$1.console"
    tagvisor tags diff "$1.snapshot" "$1" --summary --json > changed
    jq -e '.both > 0 and .tag_granules > 100' changed > answer || fail "nothing changed in $1: $(cat changed)"
    echo "$1: seen as saved, $SECONDS s; changed: $(cat changed)"
}

# looks NAME: process $reader looks at the machine, and does not go on; the guest stands still, for that process by name.
looks() {
    tagvisor tags dump "$1" --range 0x40000000+256M > stuck &
    reader=$!
    until tagvisor info "$1" | grep -q "paused because  *process $reader looks at its memory"; do sleep 0.1; done
}

# leaves: whoever looks is killed.
leaves() {
    kill -KILL $reader
    ended_as 137 $reader
}

start web
agrees web
goes_on $machine "$OUT/web.console"

# Figures and pictures while it runs.
for how in '' --live; do
    tagvisor tags stat web $how --json > stat
    jq -e '.mixed > 100' stat > answer || fail "few pages have several tags: $(cat stat)"
    tagvisor tags map web $how --png map.png
    [ "$(head -c 4 map.png | tail -c 3)" = PNG ] || fail 'the picture is none'
    tagvisor tags map web $how --width 64 --height 24 > map
    tagvisor tags find web $how --tag 7 > found
    [ "$(wc -l < found)" -gt 100 ] || fail "few granules have tag 7: $(head found)"
done
cat map
goes_on $machine "$OUT/web.console"

# The kernel's own tables: what it says of its text is where its text is.
banner=0x$(sed -n 's/^banner: \([0-9a-f]*\) .*/\1/p' "$OUT/web.console")
for vcpu in 0 1; do
    tagvisor tags at web "$banner" --vcpu $vcpu > at
    grep -q 'Linux ve' at || fail "at $banner of vCPU $vcpu is no banner: $(cat at)"
    tagvisor tags at web.snapshot "$banner" --vcpu $vcpu --json | jq .physical > at.saved
    tagvisor tags at web "$banner" --vcpu $vcpu --json | jq .physical | cmp - at.saved
done
cat at
refused 1 'there is no vCPU 2: the machine has 0 to 1' tagvisor tags at web "$banner" --vcpu 2
refused 1 'virtual addresses need a range' tagvisor tags stat web --vcpu 0

# Whoever looks and does not go on keeps the guest, and is named; killed, it does not.
mkfifo stuck
exec 3<> stuck
looks web
grep VmHWM /proc/$reader/status
[ "$(awk '/VmHWM/ { print $2 }' /proc/$reader/status)" -le 65536 ] || fail 'the reader has more than 64 MiB of memory'
lines=$(grep -c ' 0 differences' "$OUT/web.console")
sleep 2
[ "$(grep -c ' 0 differences' "$OUT/web.console")" -le $((lines + 1)) ] || fail 'the guest ran while it was looked at'
leaves
exec 3<&-
goes_on $machine "$OUT/web.console"
tagvisor info web | grep -q '^state  *Running' || fail "it does not run: $(tagvisor info web)"

# What is wanted of the machine meanwhile waits for its turn.
exec 3<> stuck
looks web
tagvisor snapshot web waited.snapshot &
waiting=$!
sleep 1
kill -0 $waiting || fail 'a snapshot did not wait for whoever looked'
leaves
ended_as 0 $waiting
goes_on $machine "$OUT/web.console"

# But for its end.
looks web
timeout 20 tagvisor stop web
ended_as 3 $machine
leaves

# Killed outright while it is looked at.
start web
looks web
timeout 20 tagvisor kill web
ended_as 137 $machine
leaves
exec 3<&-

# Names, files, and neither.
refused 1 'there is no file `web` here, and there is no machine `web`' tagvisor tags stat web
refused 1 'snapshot ./web' tagvisor tags stat ./web
refused 1 '--live: web.snapshot is a snapshot' tagvisor tags stat web.snapshot --live

# Tags by the kernel's copy: pages come from the VMM.
start copied --tag-access ioctl
refused 1 'both are the machine `copied`' tagvisor tags diff copied copied
touch copied
refused 1 '`copied` is a machine that runs, and a file is called so too' tagvisor tags stat copied
rm copied
agrees copied
tagvisor tags stat /run/tagvisor/copied/api.sock > stat
tagvisor stop copied
ended_as 3 $machine

# A machine whose memory comes as it is touched is looked at when all of it is there.
timeout $LIMIT tagvisor restore web.snapshot --lazy --name lazy --console "file=$OUT/lazy.console" < /dev/null 2> lazy.err &
machine=$!
until [ -S /run/tagvisor/lazy/api.sock ]; do sleep 0.05; done
tagvisor tags stat lazy --json > stat
jq -e '.mixed > 100' stat > answer || fail "few pages have several tags: $(cat stat)"
goes_on $machine "$OUT/lazy.console"
tagvisor stop lazy
ended_as 3 $machine

# A clone's memory is its base's and its own.
tagvisor clone copied.snapshot --count 1 --detach --console "file=$OUT/copied-1.console" > clones
read -r _ machine < clones
wait_for_console copied-1 ' 0 differences' "$machine"
agrees copied-1
tagvisor stop copied-1
