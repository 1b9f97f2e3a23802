#!/bin/bash
# lab: own-host timeout=900
# Unmodified Debian Python and SQLite, on heaps whose blocks glibc tags, make transactions on a virtio disk. The machine is
# saved in the midst of them, and they go on after an eager and after a lazy restore, if the disk is as it was. Their tags are looked
# at, too.
. "$(dirname "$0")/guests.bash"

mkdir guest
python_into guest os random sqlite3 sys
cp "$LAB/programs/ledger.py" guest
cat > guest/work << END
set -eu
modprobe crc32c_generic
modprobe ext4
mkdir /disk
mount -t ext4 /dev/vda /disk
(until dmesg | grep -q 'reseeded due to virtual machine fork'; do sleep 0.5; done; touch /tmp/enough) &
export GLIBC_TUNABLES=glibc.mem.tagging=3 PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1
$python -S -E /ledger.py /disk/ledger.db /tmp/enough
/usr/bin/sqlite3 /disk/ledger.db 'PRAGMA integrity_check' | sed 's/^/guest: integrity /'
umount /disk
END
initrd_with trixie guest

truncate -s 48M disk
mkfs.ext4 -q disk
tagvisor run --name ledger --cpus 2 --memory 256M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd \
    --disk disk --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work' --console "file=$OUT/ledger.console" < /dev/null &
machine=$!
wait_for_console ledger 'ledger: 20 transactions' $machine
echo "at work, $SECONDS s"
tagvisor pause ledger
tagvisor snapshot ledger file
cp --preserve=timestamps disk disk.then

# What their heaps have of tags is seen alike in the machine and in its snapshot: pages of many tags, drawn at random.
tagvisor tags stat file > saved.stat
tagvisor tags stat ledger | tee live.stat | cmp - saved.stat
head -n 9 saved.stat
tagvisor tags stat file --json > stat
jq -e '.mixed > 200 and .entropy_of_tagged > 3.5' stat > answer || fail "these are no tagged heaps: $(cat stat)"
tagvisor tags map ledger --png "$OUT/heaps.png"
tagvisor core ledger live.core --json > core.json
tagvisor core file saved.core --json | cmp - core.json
cmp live.core saved.core
rm live.core saved.core
tagvisor resume ledger
wait_for_console ledger 'ledger: 30 transactions' $machine
tagvisor stop ledger
ended_as 3 $machine

refused 1 "disk file $PWD/disk was written since the snapshot was taken" tagvisor restore file
refused 1 "disk file $PWD/disk was written since the snapshot was taken" tagvisor restore file --lazy
refused 1 "disk file $PWD/disk was written since the snapshot was taken" tagvisor clone file

# goes_on HOW [OPTION…]: restores the machine with the disk as it was; the program goes on and ends well.
goes_on() {
    local name=$1
    shift
    cp --preserve=timestamps disk.then disk
    timeout $LIMIT tagvisor restore file --console "file=$OUT/$name.console" "$@" < /dev/null
    console_has "$name" 'ledger: integrity ok'
    console_has "$name" 'ledger: ok'
    console_has "$name" 'guest: integrity ok'
    console_has "$name" 'guest: exit 0'
    # The disk's file system is whole, and holds what the guest wrote.
    e2fsck -fn disk > e2fsck.out 2>&1 || fail "$name: $(cat e2fsck.out)"
    echo "$name: ended well, $SECONDS s"
}
goes_on eager
goes_on lazy --lazy
