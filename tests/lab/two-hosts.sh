#!/bin/bash
# lab: hosts=2 memory=1G timeout=120
# Two hosts on one network reach each other, each way and through bridges; what runs on the second is dealt with from the first
# like what runs here, even when there is no network between them.
. "$(dirname "$0")/guests.bash"

[ "$(uname -n) $(peer uname -n)" = 'host1 host2' ] || fail "the hosts are $(uname -n) and $(peer uname -n)"
[ "$PEER $(peer sh -c 'echo $PEER')" = '10.0.7.2 10.0.7.1' ] || fail "the addresses are $PEER and $(peer sh -c 'echo $PEER')"

# Both outputs and the status of a command come back, and the log tells the hosts apart.
for status in 0 1 42; do
    got=0
    peer sh -c "echo out; echo err >&2; exit $status" > out 2> err || got=$?
    [ $got = $status ] || fail "status $got instead of $status"
    [ "$(cat out err)" = $'out\nerr' ] || fail "the output is $(cat out err)"
done
peer echo this line is of the second host

# TCP each way.
head -c 1M /dev/urandom > sent
peer socat -u TCP-LISTEN:5000 CREATE:received &
socat -u FILE:sent TCP:$PEER:5000,retry=100,interval=0.1
wait $!
socat -u TCP-LISTEN:5000 CREATE:back &
peer sh -c 'exec socat -u FILE:received TCP:$PEER:5000,retry=100,interval=0.1'
wait $!
cmp sent back

# Files: what one host writes to $OUT, the other reads.
peer sh -c 'cp received "$OUT/shared"'
cmp sent "$OUT/shared"
rm "$OUT/shared"

# pid_of NAME: the process that has written its number to the file NAME on the second host.
pid_of() {
    until peer test -s "$1"; do sleep 0.1; done
    peer cat "$1"
}

# until_gone PID: waits until the second host has no such process.
until_gone() {
    local deadline=$((SECONDS + 20))
    while peer kill -0 "$1" 2> /dev/null; do
        [ $SECONDS -lt $deadline ] || fail "process $1 of the second host still runs"
        sleep 0.1
    done
}

# A background command that is killed there is noticed here.
peer sh -c 'echo $$ > one; exec sleep 1000' &
peer kill -KILL "$(pid_of one)"
ended_as 137 $!
# One whose stand-in is asked to end, ends; one whose stand-in is killed, is killed.
peer sh -c 'echo $$ > two; exec sleep 1000' &
pid_of two > /dev/null
kill $!
ended_as 143 $!
peer sh -c 'echo $$ > three; exec sleep 1000' &
three=$(pid_of three)
kill -KILL $!
ended_as 137 $!
until_gone "$three"
# One that puts itself in the background goes on without holding up anything.
four=$(peer sh -c 'sleep 1000 & echo $!')
peer kill "$four"
until_gone "$four"

# Guests' network: what is in a bridge with the card reaches the other host's.
bridge() {
    ip link add br0 type bridge
    ip link set eth0 master br0
    ip address flush dev eth0
    ip address add "$1/24" dev br0
    ip link set br0 up
    ip netns add guest
    ip link add veth0 type veth peer name eth0 netns guest
    ip link set veth0 master br0 up
    ip -n guest address add "$2/24" dev eth0
    ip -n guest link set eth0 up
    ip tuntap add dev tap0 mode tap
    ip link set tap0 master br0 up
}
bridge 10.0.7.1 10.0.7.11
peer bash -c "$(declare -f bridge); bridge 10.0.7.2 10.0.7.12"
for address in 10.0.7.2 10.0.7.12; do
    ip netns exec guest ping -c 1 -W 10 $address
done

# The network between them can be slow or gone, and the second host is still there.
tc qdisc add dev eth0 root netem delay 200ms
ping -c 1 -W 10 $PEER | grep -E 'time=([2-9]|1[0-9])[0-9]{2}'
tc qdisc delete dev eth0 root
ip link set eth0 down
! ping -c 1 -W 1 $PEER > /dev/null || fail 'the network is down and works'
peer ip link set eth0 down
