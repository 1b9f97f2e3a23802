#!/bin/bash
# lab: cpus=2 memory=4G timeout=400
# A guest that writes data and tags on 4 CPUs moves from process to process of one host, MOVES times (6 if it is not said): by pre-copy
# over one and three connections, by post-copy, compressed, slowed down. It checks every tag all the while. Then what is refused
# or given up: the guest stays where it is. At last it ends in the middle of post-copy.
. "$(dirname "$0")/guests.bash"

moves=${MOVES:-6}
kernel=$LAB/kernels/trixie
ways=('' '--postcopy now' '--connections 3' '--postcopy auto --max-downtime 50' '--compress lz4 --connections 2' '--postcopy never --max-downtime 400')

# waits_at SOCKET PID: the process waits for a guest there.
waits_at() {
    until [ -S "$1" ]; do
        kill -0 "$2" 2> /dev/null || fail "nobody waits at $1"
        sleep 0.05
    done
}

tagvisor run --name at-0 --kernel "$kernel/Image" --initrd "$kernel/initrd.cpio" --cpus 4 --memory 256M \
    --console "file=$OUT/guest.console" --cmdline 'console=ttyS0 quiet -- tag-workload --memory 8M --threads 4 --pause 50' < /dev/null &
at=$!
goes_on $at "$OUT/guest.console"
for move in $(seq "$moves"); do
    way=${ways[(move - 1) % ${#ways[@]}]}
    tagvisor receive "at-$move" --listen "unix:$PWD/$move.socket" < /dev/null &
    next=$!
    waits_at "$move.socket" $next
    # shellcheck disable=SC2086 # options
    tagvisor migrate "at-$((move - 1))" "unix:$PWD/$move.socket" $way 2> progress > report || fail "move $move ($way): $(cat progress)"
    ended_as 4 $at
    at=$next
    goes_on $at "$OUT/guest.console"
    printf 'move %s %s: %s\n' "$move" "$way" "$(tr '\n' ' ' < report)"
done
echo "$(passes_on "$OUT/guest.console") passes over all of the memory, 0 differences"
here=at-$moves

# Nobody there; a name that is taken there; a peer that is none: it stays, and goes on.
refused 1 'cannot reach' tagvisor migrate "$here" "unix:$PWD/nobody.socket"
refused 1 'is in use' tagvisor receive "$here" --listen "unix:$PWD/taken.socket"
python3 -c 'import socket, sys
door = socket.socket(socket.AF_UNIX); door.bind(sys.argv[1]); door.listen()
while True: door.accept()[0].sendall(b"HTTP/1.1 200 OK\r\n\r\n" * 10)' "$PWD/http.socket" &
stranger=$!
until [ -S http.socket ]; do sleep 0.05; done
refused 1 'http.socket' tagvisor migrate "$here" "unix:$PWD/http.socket"
kill $stranger
refused 1 'TLS' tagvisor receive open --listen tcp://0.0.0.0:0
refused 1 'there is no migration' tagvisor migrate "$here" --cancel
refused 1 'nothing to decide' tagvisor migrate "$here" --decide here
goes_on $at "$OUT/guest.console"

# Killed while it receives: the guest stays.
tagvisor receive victim --listen "unix:$PWD/victim.socket" < /dev/null &
victim=$!
waits_at victim.socket $victim
tagvisor migrate "$here" "unix:$PWD/victim.socket" --bandwidth 2M > report 2> progress &
migrating=$!
until tagvisor info victim 2> /dev/null | grep -q receive; do sleep 0.1; done
kill -9 $victim
ended_as 1 $migrating
grep -qF 'The guest is here, as before' progress || fail "it was not told that the guest is here: $(cat progress)"
goes_on $at "$OUT/guest.console"

# Cancelled: the guest stays.
tagvisor receive cancelled --listen "unix:$PWD/cancelled.socket" < /dev/null 2> cancelled.log &
there=$!
waits_at cancelled.socket $there
tagvisor migrate "$here" "unix:$PWD/cancelled.socket" --bandwidth 2M > report 2> progress &
migrating=$!
until tagvisor info "$here" | grep -q migrate; do sleep 0.1; done
tagvisor migrate "$here" --cancel
ended_as 1 $migrating
ended_as 1 $there
grep -qF 'cancelled' progress || fail "it does not say that it was cancelled: $(cat progress)"
goes_on $at "$OUT/guest.console"

# Ended in the middle of post-copy: the source lets go of what it still has.
tagvisor receive ending --listen "unix:$PWD/ending.socket" < /dev/null &
ending=$!
waits_at ending.socket $ending
tagvisor migrate "$here" "unix:$PWD/ending.socket" --postcopy now --bandwidth 2M > report 2> progress &
migrating=$!
until tagvisor info ending --json 2> /dev/null | jq -e '.state == "Running" and .work.what == "restore"' > /dev/null; do sleep 0.1; done
tagvisor stop ending
ended_as 3 $ending
ended_as 0 $migrating
ended_as 4 $at
grep -F 'when it ended there' report || fail "it does not say that the guest ended there: $(cat report progress)"
console_lacks guest 'workload: difference'
