#!/bin/bash
# lab: own-host timeout=600
# Snapshots that cannot be written or restored: each a clear error before anything runs, and nothing is lost by it.
. "$(dirname "$0")/guests.bash"

run=(tagvisor run --memory 160M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd "$LAB/kernels/trixie/initrd.cpio")

# running NAME: the machine's guest still runs.
running() {
    [ "$(tagvisor info "$1" --json | jq -r .state)" = Running ] || fail "$1 does not run: $(tagvisor info "$1")"
}

# nothing_beside FILE…: in the directory there are these and no more.
nothing_beside() {
    [ "$(cd "$1" && find . -type f | sort | tr '\n' ' ')" = "$2" ] || fail "in $1: $(find "$1")"
}

truncate -s 1M disk
"${run[@]}" --name web --disk disk --console "file=$OUT/web.console" < /dev/null \
    --cmdline 'console=ttyS0 quiet panic=-1 -- echo ready; while sleep 1; do echo beat; done' &
machine=$!
wait_for_console web ready $machine

# Where no snapshot can be written. What fails in the middle leaves what was there, and the guest goes on.
mkdir small readonly
mkfifo pipe
mount -t tmpfs -o size=2M tmpfs small
mount -t tmpfs tmpfs readonly
mount -o remount,ro readonly
trap 'umount small readonly' EXIT
echo old > small/file
refused 1 'No space left on device' tagvisor snapshot web small/file
[ "$(cat small/file)" = old ] || fail 'a full disk cost the old file'
nothing_beside small './file '
running web
refused 1 'Read-only file system' tagvisor snapshot web readonly/file
refused 1 'no regular file' tagvisor snapshot web pipe
refused 1 'no regular file' tagvisor snapshot web /dev/null
refused 1 'No such file' tagvisor snapshot web nowhere/file
refused 1 'No such file' tagvisor snapshot web delta --base nowhere
refused 1 'no Tagvisor page stream or snapshot' tagvisor snapshot web delta --base "$LAB/kernels/trixie/Image"
refused 1 'there is no machine' tagvisor snapshot nobody file
running web

# A VMM that is killed while it writes leaves the file that there was.
"${run[@]}" --name victim --cmdline 'console=ttyS0 quiet -- echo ready; sleep 100000' \
    --console "file=$OUT/victim.console" < /dev/null &
victim=$!
wait_for_console victim ready $victim
mkdir killed
tagvisor snapshot victim killed/file --compress lz4
sum=$(sha256sum killed/file)
tagvisor snapshot victim killed/file --compress zstd:22 > cut-off 2>&1 &
snapshot=$!
# What it writes is there under another name, and has begun.
until [ -n "$(find killed -name '.file.*.part' -size +1M)" ]; do
    kill -0 $snapshot || fail "the snapshot ended: $(cat cut-off)"
    sleep 0.1
done
tagvisor kill victim
ended_as 137 $victim
ended_as 1 $snapshot
[ "$(sha256sum killed/file)" = "$sum" ] || fail 'a VMM that was killed cost the old file'
tagvisor snapshot inspect killed/file > inspected

tagvisor pause web
tagvisor snapshot web base
tagvisor snapshot web delta --base base
tagvisor snapshot web another
refused 1 'name `web` is in use' tagvisor restore base
tagvisor stop web
ended_as 3 $machine

# Files that are not as they were written, at every kind of place (`stream` has tests of every byte): each is a copy of `base` with one byte changed, or is cut off.
cat > damage.py << 'END'
import struct, sys
whole = open(sys.argv[1], "rb").read()
places = {"version": 8, "header": 20, "end": len(whole) - 10}
at = 64
first = {}
while at < len(whole):
    kind, codec, count, metadata, data = struct.unpack_from("<BBHII", whole, at)
    if kind not in first and (kind != 1 or data > 1000):
        first[kind] = at
        name = {1: "pages", 3: "state", 4: "chunks", 5: "index"}.get(kind)
        if name:
            places[name + "-data"] = at + 32 + metadata + data // 2
        if kind == 1:
            places["pages-head"] = at + 5
            places["pages-runs"] = at + 32
            places["pages-tags"] = at + 32 + metadata - 1
    at += 32 + metadata + data
for name, place in places.items():
    damaged = bytearray(whole)
    damaged[place] ^= 0x40
    open(f"changed/{name}", "wb").write(damaged)
for name, length in {"nothing": 0, "half": len(whole) // 2}.items():
    open(f"changed/cut-{name}", "wb").write(whole[:length])
open("changed/longer", "wb").write(whole + b"x")
END
mkdir changed
python3 damage.py base
# bad WHAT TEXT: it is not restored.
bad() {
    refused 1 "$2" tagvisor restore "changed/$1"
}
bad version 'format version 65, this Tagvisor reads version 1'
bad header 'header is damaged'
bad end 'does not end with the end of its stream'
bad pages-head 'chunk 0 at offset 64: '
bad pages-data 'chunk 0 at offset 64: '
bad pages-runs 'chunk 0 at offset 64: '
bad pages-tags 'chunk 0 at offset 64: '
bad state-data 'contents are damaged'
bad chunks-data 'contents are damaged'
bad index-data 'contents are damaged'
bad cut-nothing 'no Tagvisor page stream'
bad cut-half 'cut off'
bad longer 'appended'
refused 1 'pages 0x40000 to ' tagvisor clone changed/pages-data
refused 1 'pages 0x40000 to ' tagvisor snapshot inspect changed/pages-data

# A delta alone, on another base, and on one that is not as it was.
mkdir alone elsewhere
cp delta alone
mv another elsewhere
refused 1 'give that one as its base' tagvisor restore alone/delta
refused 1 'give that one as its base' tagvisor restore alone/delta --base elsewhere/another
cp changed/pages-data alone/base
refused 1 'damaged' tagvisor restore alone/delta
cp changed/cut-half alone/base
refused 1 'cut off' tagvisor restore alone/delta
rm -r alone

# Disks that are used already, that were written since, or that are gone. The guest that has the disk goes on.
tagvisor restore delta --paused --console off < /dev/null &
machine=$!
until [ "$(tagvisor ls --json | jq -r '.[].state')" = Paused ]; do
    kill -0 $machine || fail 'the delta is not restored'
    sleep 0.1
done
refused 1 'cannot lock disk image' tagvisor restore base --name second
refused 1 'name `web` is in use' tagvisor restore base
tagvisor resume web
running web
tagvisor stop web
ended_as 3 $machine
cp --preserve=timestamps disk disk.then
printf x | dd of=disk conv=notrunc 2> /dev/null
refused 1 'was written since' tagvisor restore base
rm disk
refused 1 'is gone or cannot be read' tagvisor restore base
cp --preserve=timestamps disk.then disk

# Damage that only turns up when the page is wanted, since the guest runs before its memory is read: it stands still with the
# reason, can be ended, and goes on if the file is mended.
# until_paused: waits until the guest is.
until_paused() {
    until tagvisor info web --json 2> /dev/null | jq -e '.state == "Paused"' > /dev/null; do
        kill -0 $machine || fail 'the machine ended'
        sleep 0.1
    done
    tagvisor info web > info
    grep -q 'paused because.*damaged' info || fail "no reason is given: $(cat info)"
}
for ending in stop mend; do
    cp changed/pages-data lazily
    tagvisor restore lazily --lazy --console "file=$OUT/$ending.console" < /dev/null 2> "$ending.err" &
    machine=$!
    until_paused
    refused 1 'damaged' tagvisor snapshot web never
    if [ $ending = mend ]; then
        dd if=base of=lazily conv=notrunc 2> /dev/null
        tagvisor resume web
        wait_for_console mend beat $machine
        running web
    fi
    tagvisor stop web
    ended_as 3 $machine
    grep 'damaged' "$ending.err"
done

# Tags that only the kernel copies cannot come with a page that a guest waits for.
"${run[@]}" --name copied --tag-access ioctl --cmdline 'console=ttyS0 quiet -- echo ready; sleep 100000' \
    --console "file=$OUT/copied.console" < /dev/null &
machine=$!
wait_for_console copied ready $machine
tagvisor snapshot copied copied
tagvisor stop copied
ended_as 3 $machine
refused 1 'restore eagerly, without --lazy' tagvisor restore copied --lazy

# What was killed leaves its directory, whose name is free.
[ "$(ls -A /run/tagvisor)" = victim ] || fail "left behind: $(ls -A /run/tagvisor)"
