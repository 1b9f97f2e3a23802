#!/bin/bash
# lab: own-host timeout=900
# Unmodified Debian programs on heaps whose blocks glibc tags: Python and SQLite make transactions on a virtio disk, and a TCP connection
# with the host carries data both ways. Meanwhile the guest moves from process to process, by pre-copy and by post-copy, MOVES
# times (2 if it is not said); its disk is the same file, its tap another one of the same bridge. All goes on, and every sum is right.
. "$(dirname "$0")/guests.bash"

# Python's start on such a heap, beside all the rest, is the longest wait where the machine has other things to do.
LIMIT=500
moves=${MOVES:-2}
modprobe tun
modprobe bridge
ip link add br0 type bridge forward_delay 0
ip address add 10.0.8.1/24 dev br0
ip link set br0 up
for tap in tap0 tap1; do
    ip tuntap add dev $tap mode tap
    ip link set $tap master br0 up
done

mkdir guest
python_into guest os random sqlite3 sys
cp "$LAB/programs/ledger.py" guest
cat > guest/work << END
set -eu
modprobe crc32c_generic
modprobe ext4
mkdir /disk
mount -t ext4 /dev/vda /disk
ip address add 10.0.8.2/24 dev eth0
ip link set eth0 up
export GLIBC_TUNABLES=glibc.mem.tagging=3 PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1
# What comes goes back. When the connection has ended, all else has done enough.
mkfifo /tmp/back
(nc 10.0.8.1 8000 < /tmp/back | tee /tmp/back | sha256sum | sed 's/^/echo: /'; touch /tmp/enough) &
echo=\$!
sh /shop | /usr/bin/sqlite3 -bail /disk/shop.db &
shop=\$!
$python -S -E /ledger.py /disk/ledger.db /tmp/enough
wait \$echo
wait \$shop
umount /disk
END
# Sells one of 50 goods after the other, and says so now and then.
cat > guest/shop << 'END'
echo 'CREATE TABLE stock (id INTEGER PRIMARY KEY, pieces INTEGER, note TEXT);
CREATE TABLE sale (id INTEGER PRIMARY KEY, good INTEGER, note TEXT);
WITH RECURSIVE good(id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM good WHERE id < 49)
INSERT INTO stock SELECT id, 1000000, hex(randomblob(300)) FROM good;'
sales=0
while [ ! -e /tmp/enough ]; do
    sales=$((sales + 1))
    echo "BEGIN; INSERT INTO sale VALUES ($sales, $sales % 50, hex(randomblob(abs(random() % 700))));
UPDATE stock SET pieces = pieces - 1, note = hex(randomblob(abs(random() % 300))) WHERE id = $sales % 50; COMMIT;"
    [ $((sales % 5)) != 0 ] || echo "SELECT 'shop: ' || count(*) || ' sales' FROM sale;"
    sleep 0.5
done
echo "SELECT 'shop: of ' || (50 * 1000000 - sum(pieces)) || ' pieces sold ' || (SELECT count(*) FROM sale) || ' are known' FROM stock;
SELECT 'shop: integrity ' || integrity_check FROM pragma_integrity_check;"
END
initrd_with trixie guest

# Sends numbers to who comes first, and compares what comes back, until there is a file `stop`; then says what it was. Something is on
# its way at any time, and never more than pipes hold.
cat > feed.py << 'END'
import hashlib, os, socket, threading, time
door = socket.create_server(("10.0.8.1", 8000))
connection, _ = door.accept()
BLOCK = 4096
room = threading.Semaphore(8)
sent = []
def block(number): return (b"%015d\n" % number) * (BLOCK // 16)
def send():
    while not os.path.exists("stop"):
        room.acquire()
        connection.sendall(block(len(sent)))
        sent.append(None)
        time.sleep(0.02)
    # The guest's nc ends when this does, whatever is on its way back.
    for _ in range(8): room.acquire()
    connection.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
digest, number, back = hashlib.sha256(), 0, connection.makefile("rb")
while came := back.read(BLOCK):
    assert came == block(number), f"block {number} came back as {came[:64]}"
    digest.update(came)
    number += 1
    if number % 20 == 0: print(f"{number} blocks", flush=True)
    room.release()
assert number == len(sent), f"{number} of {len(sent)} blocks came back"
print(digest.hexdigest(), number, flush=True)
END
python3 feed.py > fed &
feed=$!
until ss -ltn | grep -q ':8000 '; do
    kill -0 $feed 2> /dev/null || fail 'nobody feeds the guest'
    sleep 0.1
done

# done_by WHO: how much somebody of them has done.
done_by() {
    case $1 in
    feed) grep -c blocks fed ;;
    *) cat "$OUT/guest.console" 2> /dev/null | grep -c "^$1: .* \(transactions\|sales\)" ;;
    esac || true
}

# goes_on PID TIMES: the connection and both databases do more work, and say so as many times.
goes_on() {
    local who deadline=$((SECONDS + LIMIT))
    local -A seen
    for who in feed ledger shop; do seen[$who]=$(done_by $who); done
    for who in feed ledger shop; do
        until [ "$(done_by $who)" -ge $((seen[$who] + $2)) ]; do
            [ $SECONDS -lt $deadline ] && kill -0 "$1" 2> /dev/null || fail "$who does not go on: $(tail -n 5 "$OUT/guest.console" fed)"
            sleep 0.2
        done
    done
}

truncate -s 48M disk
mkfs.ext4 -q disk
tagvisor run --name at-0 --cpus 2 --memory 256M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd --disk disk \
    --net tap0 --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work' --console "file=$OUT/guest.console" < /dev/null &
at=$!
goes_on $at 1
echo "at work, $SECONDS s"
# Not to a disk that is a copy, which would be without what the guest writes from now on.
cp disk copy
tagvisor receive copied --listen "unix:$PWD/copied.socket" --tap tap1 --disk "$PWD/copy" < /dev/null 2> copied.errors &
copied=$!
until [ -S copied.socket ]; do
    kill -0 $copied 2> /dev/null || fail "nobody waits: $(cat copied.errors)"
    sleep 0.05
done
refused 1 "disk $PWD/copy of this host is another file than the source's" tagvisor migrate at-0 "unix:$PWD/copied.socket"
tagvisor stop copied
ended_as 3 $copied
ways=('' '--postcopy now' '--connections 3 --compress lz4' '--postcopy auto --max-downtime 50')
for move in $(seq "$moves"); do
    way=${ways[(move - 1) % ${#ways[@]}]}
    tagvisor receive "at-$move" --listen "unix:$PWD/$move.socket" --tap tap$((move % 2)) < /dev/null &
    next=$!
    until [ -S "$move.socket" ]; do
        kill -0 $next 2> /dev/null || fail "nobody waits for move $move"
        sleep 0.05
    done
    # shellcheck disable=SC2086 # options
    tagvisor migrate "at-$((move - 1))" "unix:$PWD/$move.socket" $way 2> progress > report || fail "move $move ($way): $(cat progress)"
    printf 'move %s %s: %s, %s s\n' "$move" "$way" "$(cat report)" $SECONDS
    ended_as 4 $at
    at=$next
    goes_on $at 2
    echo "at work, $SECONDS s"
done

touch stop
wait $feed || fail "what came back is not what was sent: $(tail -n 3 fed)"
ended_as 0 $at
read -r sum blocks < <(tail -n 1 fed)
console_has guest "echo: $sum"
console_lacks guest DIFFERENCE
console_has guest 'ledger: integrity ok'
console_has guest 'ledger: ok'
grep 'shop: of \([0-9]*\) pieces sold \1 are known' "$OUT/guest.console" || fail "the shop's sums are not right: $(grep shop: "$OUT/guest.console" | tail -n 2)"
console_has guest 'shop: integrity ok'
console_has guest 'guest: exit 0'
# The same, as the host finds it on the disk.
e2fsck -fn disk > e2fsck.out 2>&1 || fail "$(cat e2fsck.out)"
for database in ledger shop; do
    debugfs -R "dump /$database.db $database.db" disk 2> /dev/null
    [ "$(sqlite3 $database.db 'PRAGMA integrity_check')" = ok ] || fail "$database.db on the disk is damaged"
done
echo "$moves moves with $(sqlite3 ledger.db 'SELECT count(*) FROM movement') and $(sqlite3 shop.db 'SELECT count(*) FROM sale') transactions, $blocks blocks by one TCP connection"
