#!/bin/bash
# Disk, network, entropy and a port for talk with the host, driven by Linux' own drivers.
. "$(dirname "$0")/guests.bash"

modprobe tun
ip tuntap add dev tv0 mode tap
ip address add 192.0.2.1/24 dev tv0
ip link set tv0 up
trap 'ip link delete tv0' EXIT

truncate -s 64M data.img
head -c 1M /dev/urandom > read-only.img
read -r sum _ < <(sha256sum < read-only.img)

mkdir guest
cat > guest/devices << 'END'
set -eu
test "$(cat /sys/block/vda/serial)" = data
dd if=/dev/urandom of=/tmp/written bs=64k count=128 2> /dev/null
dd if=/tmp/written of=/dev/vda bs=64k conv=fsync 2> /dev/null
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=128 2> /dev/null | cmp - /tmp/written
echo guest: the disk holds what was written
blkdiscard -o 4194304 -l 2097152 /dev/vda
dd if=/dev/vda bs=64k skip=64 count=32 2> /dev/null | cmp -n 2097152 - /dev/zero
echo guest: what was discarded is zero
test "$(cat /sys/block/vdb/ro)" = 1
echo "guest: read-only $(sha256sum < /dev/vdb)"
dd if=/tmp/written of=/dev/vdc bs=4k seek=3 count=100 conv=fsync 2> /dev/null
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vdc bs=4k skip=3 count=100 2> /dev/null | cmp -n 409600 - /tmp/written
dd if=/dev/vdb bs=4k count=3 2> /dev/null | cmp -n 12288 - /dev/vdc
echo guest: the overlay holds what was written
cat /sys/class/misc/hw_random/rng_current
echo "guest: entropy $(head -c 64 /dev/hwrng | wc -c)"
test "$(cat /sys/class/net/eth0/address)" = 02:00:00:00:00:07
ip address add 192.0.2.2/24 dev eth0
ip link set eth0 up
# In fragments too. A queue that is late may drop one of them (the guest's fq_codel does), so there are some tries.
for size in 56 20000; do
    for try in 1 2 3 4 5; do
        ping -c 1 -W 5 -s $size 192.0.2.1 && echo "guest: a ping of $size bytes came back" && break
    done
done
wget -q -O - http://192.0.2.1:8000/read-only.img | sha256sum | sed 's/^/guest: network /'
nc -l -p 9000 > /tmp/received < /dev/null &
echo guest: listens
wait $!
echo "guest: received $(sha256sum < /tmp/received)"
port=/dev/$(cd /sys/class/virtio-ports && grep -lx talk */name | cut -d/ -f1)
exec 3<> "$port"
echo guest: the port is open
# Nothing is to be read before the host has connected.
until read -r line <&3; do sleep 0.1; done
echo "$line, said the guest" >&3
read -r line <&3
echo "guest: heard $line"
sync
END
initrd_with trixie guest

python3 -u -m http.server --bind 192.0.2.1 8000 > server.log 2>&1 &
server=$!
until grep -q Serving server.log || ! kill -0 $server; do sleep 0.1; done
INITRD=guest.initrd linux devices trixie --cpus 2 \
    --disk data.img,id=data --disk read-only.img,readonly --disk read-only.img,overlay \
    --net tv0,mac=02:00:00:00:00:07 --port talk,socket=talk.sock -- sh /devices &
vmm=$!
wait_for_console devices 'guest: listens' $vmm
socat -u FILE:read-only.img TCP4:192.0.2.2:9000,retry=100,interval=0.1
wait_for_console devices 'guest: the port is open' $vmm
python3 - << 'END'
import socket
port = socket.socket(socket.AF_UNIX)
port.connect("talk.sock")
port.sendall(b"good day\n")
answer = port.makefile().readline()
assert answer == "good day, said the guest\n", answer
port.sendall(b"farewell\n")
END
wait $vmm || fail "tagvisor ended with status $?"
kill $server
console_has devices 'guest: exit 0'
console_has devices "guest: read-only $sum"
console_has devices 'guest: the overlay holds what was written'
[ "$(sha256sum < read-only.img)" = "$sum  -" ] || fail 'the image below an overlay was written'
console_has devices "guest: network $sum"
console_has devices "guest: received $sum"
console_has devices 'guest: entropy 64'
console_has devices 'guest: a ping of 56 bytes came back'
console_has devices 'guest: a ping of 20000 bytes came back'
console_has devices 'guest: heard farewell'
[ ! -e talk.sock ] || fail 'the socket is left behind'
[ "$(stat -c %s data.img)" = $((64 << 20)) ] || fail 'the disk changed its size'
[ "$(($(stat -c %b data.img) * 512))" -le $((6 << 20)) ] || fail 'what the guest discarded still takes space on the host'
