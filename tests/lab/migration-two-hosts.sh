#!/bin/bash
# lab: hosts=2 memory=2G peer-memory=2G cpus=2 timeout=600
# A guest that writes data and tags on 4 CPUs, and receives by one TCP connection all the while, goes back and forth between two
# hosts MOVES times (2 if it is not said; 20 are the whole test), by pre-copy and by post-copy. Its memory has no difference, and
# what came over the connection is what was sent. Then the link breaks in the middle of post-copy, and is mended.
. "$(dirname "$0")/guests.bash"

moves=${MOVES:-2}
kernel=$LAB/kernels/trixie

# A bridge with the card in it and a tap for the guest, on both hosts.
bridge() {
    set -e
    ip link add br0 type bridge forward_delay 0
    ip link set eth0 master br0
    ip address flush dev eth0
    ip address add "$1/24" dev br0
    ip link set br0 up
    ip tuntap add dev tap0 mode tap
    ip link set tap0 master br0 up
}
bridge 10.0.7.1
peer bash -c "$(declare -f bridge); bridge 10.0.7.2"

# Sends numbers to who comes first, until there is a file `stop`; then says what it sent.
cat > "$OUT/feed.py" <<'END'
import hashlib, os, socket, time
door = socket.create_server(("10.0.7.2", 8000))
connection, _ = door.accept()
digest, number = hashlib.sha256(), 0
while not os.path.exists("stop"):
    block = (b"%015d\n" % number) * 256
    connection.sendall(block)
    digest.update(block)
    number += 1
    time.sleep(0.01)
connection.close()
print(digest.hexdigest(), number, flush=True)
END
peer python3 "$OUT/feed.py" > sent &
feed=$!
until peer sh -c 'ss -ltn | grep -q :8000'; do sleep 0.2; done

mkdir guest
cat > guest/work << 'END'
ip address add 10.0.7.50/24 dev eth0
ip link set eth0 up
tag-workload --memory 8M --pause 50 &
workload=$!
echo "guest: received $(nc 10.0.7.2 8000 < /dev/null | sha256sum)"
kill -TERM $workload
wait $workload
END
initrd_with trixie guest
cp guest.initrd "$OUT/guest.initrd"

# at HOST COMMAND…: on host 1, which is this one, or 2.
at() {
    local host=$1
    shift
    if [ "$host" = 1 ]; then "$@"; else peer "$@"; fi
}

# The guest's console is written on both hosts, one after the other.
consoles=("$OUT/guest-1.console" "$OUT/guest-2.console")
touch "${consoles[@]}"

# receive HOST NAME PORT: waits for a guest there; its process is $there.
receive() {
    at "$1" tagvisor receive "$2" --listen "tcp://10.0.7.$1:$3" --unprotected --console "file=$OUT/guest-$1.console" < /dev/null &
    there=$!
    until at "$1" sh -c "ss -ltn | grep -q ':$3 '"; do
        kill -0 $there 2> /dev/null || fail "nobody waits at host $1"
        sleep 0.2
    done
}

tagvisor run --name at-0 --kernel "$kernel/Image" --initrd guest.initrd --cpus 4 --memory 256M --net tap0 --no-reboot \
    --console "file=$OUT/guest-1.console" --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work' < /dev/null &
here=$!
goes_on $here "${consoles[@]}"
ways=('--connections 2' '--postcopy now' '' '--postcopy auto --compress lz4')
for move in $(seq "$moves"); do
    way=${ways[(move - 1) % ${#ways[@]}]}
    from=$(((move - 1) % 2 + 1))
    to=$((move % 2 + 1))
    receive $to "at-$move" $((7000 + move))
    # shellcheck disable=SC2086 # options
    at $from tagvisor migrate "at-$((move - 1))" "tcp://10.0.7.$to:$((7000 + move))" $way 2> progress > report || fail "move $move ($way): $(cat progress)"
    ended_as 4 $here
    here=$there
    goes_on $here "${consoles[@]}"
    printf 'move %s to host %s %s: %s\n' "$move" "$to" "$way" "$(tr '\n' ' ' < report)"
done

# In the middle of post-copy, the network between the hosts is gone; then it is back, and the link is mended.
from=$((moves % 2 + 1))
to=$(((moves + 1) % 2 + 1))
receive $to halves 7900
at $from tagvisor migrate "at-$moves" "tcp://10.0.7.$to:7900" --postcopy now --bandwidth 3M 2> progress > report &
migrating=$!
until at $to tagvisor info halves 2> /dev/null | grep -q Running; do sleep 0.2; done
ip link set eth0 down
ended_as 3 $migrating
grep -qF -- '--recover' progress || fail "it does not say how to go on: $(cat progress)"
at $from tagvisor info "at-$moves" > info
grep -qF 'Paused' info || fail "the source is not paused: $(cat info)"
refused_here=$(at $from tagvisor resume "at-$moves" 2>&1 > /dev/null) && fail 'a guest that is elsewhere was resumed'
echo "refused: $refused_here"
until at $to tagvisor info halves | grep -q Paused; do sleep 0.2; done
refused_there=$(at $to tagvisor migrate halves --decide here 2>&1 > /dev/null) && fail 'half a guest was to run'
[[ $refused_there == *'at the source and nowhere else'* ]] || fail "it does not say why half a guest cannot run: $refused_there"
echo "refused: $refused_there"
ip link set eth0 up
at $from tagvisor migrate "at-$moves" "tcp://10.0.7.$to:7900" --recover > report || fail 'the link was not mended'
ended_as 4 $here
here=$there
goes_on $here "${consoles[@]}"
echo "after the link was mended: $(tr '\n' ' ' < report)"

peer touch stop
wait $feed
ended_as 0 $here
read -r sum blocks < sent
grep -qhF "guest: received $sum" "$OUT"/guest-*.console || fail "the guest received something else than $sum: $(grep -h received "$OUT"/guest-*.console)"
grep -qhF 'workload: ok' "$OUT"/guest-*.console || fail 'the workload did not end well'
echo "$moves moves and a broken link, $(passes_on "${consoles[@]}") passes over all of the memory with 0 differences, $blocks blocks by one TCP connection"
