#!/bin/bash
# lab: own-host timeout=900
# Unmodified Debian Python and SQLite, on heaps whose blocks glibc tags, make transactions on a virtio disk. The machine is
# saved in the midst of them, and they go on after a restore, if the disk is as it was: RESTORES times in a row, each time from a
# snapshot of the restore before, eagerly and lazily in turn. RESTORES is 2 by default; 50 are the whole test. Their tags are looked at, too.
. "$(dirname "$0")/guests.bash"

restores=${RESTORES:-2}

mkdir guest
python_into guest os random sqlite3 sys
cp "$LAB/programs/ledger.py" guest
cat > guest/work << END
set -eu
modprobe crc32c_generic
modprobe ext4
mkdir /disk
mount -t ext4 /dev/vda /disk
(until [ "\$(dmesg | grep -c 'reseeded due to virtual machine fork')" = $restores ]; do sleep 0.5; done; touch /tmp/enough) &
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
tagvisor snapshot ledger file-0
cp --preserve=timestamps disk disk.then

# What their heaps have of tags is seen alike in the machine and in its snapshot: pages of many tags, drawn at random.
tagvisor tags stat file-0 > saved.stat
tagvisor tags stat ledger | tee live.stat | cmp - saved.stat
head -n 9 saved.stat
tagvisor tags stat file-0 --json > stat
jq -e '.mixed > 200 and .entropy_of_tagged > 3.5' stat > answer || fail "these are no tagged heaps: $(cat stat)"
tagvisor tags map ledger --png "$OUT/heaps.png"
tagvisor core ledger live.core --json > core.json
tagvisor core file-0 saved.core --json | cmp - core.json
cmp live.core saved.core
rm live.core saved.core
tagvisor resume ledger
wait_for_console ledger 'ledger: 30 transactions' $machine
tagvisor stop ledger
ended_as 3 $machine

refused 1 "disk file $PWD/disk was written since the snapshot was taken" tagvisor restore file-0
refused 1 "disk file $PWD/disk was written since the snapshot was taken" tagvisor restore file-0 --lazy
refused 1 "disk file $PWD/disk was written since the snapshot was taken" tagvisor clone file-0
cp --preserve=timestamps disk.then disk

for restore in $(seq "$restores"); do
    options=()
    [ $((restore % 2)) = 1 ] || options=(--lazy)
    tagvisor restore "file-$((restore - 1))" --console "file=$OUT/restore-$restore.console" "${options[@]}" < /dev/null &
    machine=$!
    if [ "$restore" != "$restores" ]; then
        # It makes transactions; and its disk is written no more once it was saved.
        wait_for_console "restore-$restore" transactions $machine
        tagvisor pause ledger
        tagvisor snapshot ledger "file-$restore"
        tagvisor stop ledger
        ended_as 3 $machine
        rm "file-$((restore - 1))"
    fi
    echo "restore $restore: ${options[*]:-eager}, $SECONDS s"
done
# The last one ends by itself.
ended_as 0 $machine
console_has "restore-$restores" 'ledger: integrity ok'
console_has "restore-$restores" 'ledger: ok'
console_has "restore-$restores" 'guest: integrity ok'
console_has "restore-$restores" 'guest: exit 0'
# The disk's file system is whole, and holds what the guest wrote.
e2fsck -fn disk > e2fsck.out 2>&1 || fail "$(cat e2fsck.out)"
