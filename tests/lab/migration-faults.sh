#!/bin/bash
# lab: cpus=2 memory=4G timeout=600
# Something breaks while a guest is on its way from process to process, FAULTS times (2 if it is not said), at instants that SEED (11) decides:
# either process is killed, the link is cut, or it is cancelled. Never do two run the guest; it is lost only with the process that
# has it; and wherever it goes on, its 4 CPUs find every tag and byte that they wrote.
. "$(dirname "$0")/guests.bash"

faults=${FAULTS:-2}
seed=${SEED:-11}
echo "seed $seed"
RANDOM=$seed
kernel=$LAB/kernels/trixie
kinds=(source destination link cancel)
ways=('' '--postcopy now' '--connections 3' '--postcopy auto --max-downtime 50')
declare -A outcomes=()
guest=0 here= at=

# checked: the guest, whose process is $at and whose console is $console, finds all of its memory as it left it.
checked() {
    goes_on "$at" "$OUT/$console.console"
}

# begins: a new guest, which is the machine $here of the process $at: the one that was saved at its work.
begins() {
    guest=$((guest + 1))
    here=guest-$guest
    tagvisor restore saved --name $here --console "file=$OUT/$here.console" < /dev/null 2> $here.errors &
    at=$!
    console=$here
    wait_for_console $here ' 0 differences' $at
}

# state_of NAME: Running, Paused, or none; with a + if it is at work. A half of a guest that stands still is at nothing.
state_of() {
    local state
    state=$(tagvisor info "$1" --json 2> /dev/null |
        jq -r '.state + (if .work and (.state != "Paused" or .work.what != "restore") then "+" else "" end)') || true
    echo "${state:-none}"
}

# settles NAME PID: the machine does nothing but run or stand still, or is gone. Its process may be gone before its socket is.
settles() {
    local deadline=$((SECONDS + LIMIT)) state
    while kill -0 "$2" 2> /dev/null; do
        state=$(state_of "$1")
        case $state in Running | Paused) break ;; esac
        [ $SECONDS -lt $deadline ] || fail "$1 does not settle: $state: $(tagvisor info "$1")"
        sleep 0.1
    done
}

# must COMMAND…: it succeeds, or fails with what it says.
must() {
    "$@" 2> must.errors > must.out || fail "$* failed: $(cat must.errors)"
}

# reap PID: waits for a process, however it ends.
reap() {
    wait "$1" 2> /dev/null || true
}

# breaks NUMBER: one fault.
breaks() {
    local number=$1 kind=${kinds[RANDOM % 4]} way=${ways[RANDOM % 4]} after=$((RANDOM % span))
    local there=host-$1 next link migrating status=0 source destination what
    tagvisor receive "$there" --listen "unix:$PWD/$number.socket" < /dev/null 2> "$there.errors" &
    next=$!
    until [ -S "$number.socket" ]; do
        kill -0 $next 2> /dev/null || fail "nobody waits: $(cat "$there.errors")"
        sleep 0.05
    done
    setsid socat "UNIX-LISTEN:$number.link,fork" "UNIX-CONNECT:$number.socket" 2> /dev/null &
    link=$!
    until [ -S "$number.link" ]; do sleep 0.05; done
    # shellcheck disable=SC2086 # options
    tagvisor migrate "$here" "unix:$PWD/$number.link" $way > report 2> progress < /dev/null &
    migrating=$!
    echo "$number: $kind $way after $after ms"
    sleep "$((after / 1000)).$(printf '%03d' $((after % 1000)))"
    case $kind in
    source) kill -9 $at 2> /dev/null || true ;;
    destination) kill -9 $next 2> /dev/null || true ;;
    link) kill -9 -- -$link 2> /dev/null || true ;;
    cancel) tagvisor migrate "$here" --cancel 2> /dev/null || true ;;
    esac
    wait $migrating 2> /dev/null || status=$?
    settles "$here" $at
    settles "$there" $next
    kill -0 $at 2> /dev/null || reap $at
    kill -0 $next 2> /dev/null || reap $next
    source=$(state_of "$here") destination=$(state_of "$there")
    what="$kind $way after $after ms: source $source, destination $destination"
    case $status/$source in
    1/Running | 3/Paused | [03]/none) ;;
    *) fail "migrate ended with status $status: $what ($(cat progress))" ;;
    esac
    case $source/$destination in
    Running/Running) fail "two run the guest: $what" ;;
    Running/none) outcome=stayed ;;
    Running/Paused)
        # It was ready, and could not be told.
        must tagvisor migrate "$there" --decide elsewhere
        reap $next
        outcome=stayed
        ;;
    none/Running)
        outcome=went
        ;;
    Paused/Running | Paused/Paused)
        must tagvisor migrate "$here" "unix:$PWD/$number.socket" --recover
        outcome='went after --recover'
        ;;
    Paused/none)
        # Whoever kills the destination knows that it does not run the guest. It may have: then half of it was there.
        if tagvisor migrate "$here" --decide here 2> decide.errors; then
            outcome='stayed after --decide here'
        else
            grep -qF 'has run at the destination' decide.errors || fail "$what: $(cat decide.errors)"
            must tagvisor migrate "$here" --decide elsewhere
            reap $at
            outcome=lost
        fi
        ;;
    none/Paused)
        # It had all of the guest; or half of it, which is worth nothing without the other.
        if tagvisor migrate "$there" --decide here 2> decide.errors; then
            outcome='went after --decide here'
        else
            grep -qF 'at the source and nowhere else' decide.errors || fail "$what: $(cat decide.errors)"
            must tagvisor kill "$there"
            reap $next
            outcome=lost
        fi
        ;;
    none/none)
        case $kind in source | destination) outcome=lost ;; *) fail "the guest is nowhere: $what ($(cat progress "$there.errors"))" ;; esac
        ;;
    *) fail "$what" ;;
    esac
    kill -9 -- -$link 2> /dev/null || true
    reap $link
    rm -f "$number.socket" "$number.link"
    outcomes[$kind: $outcome]=$((${outcomes[$kind: $outcome]:-0} + 1))
    echo "$number: $what, status $status: $outcome"
    case $outcome in
    stayed*) reap $next ;;
    went*)
        reap $at
        here=$there at=$next
        ;;
    lost)
        begins
        return
        ;;
    esac
    checked
}

tagvisor run --name origin --kernel "$kernel/Image" --initrd "$kernel/initrd.cpio" --cpus 4 --memory 192M \
    --console "file=$OUT/origin.console" --cmdline 'console=ttyS0 quiet -- tag-workload --memory 4M --threads 4 --pause 20' < /dev/null &
at=$!
goes_on $at "$OUT/origin.console"
tagvisor snapshot origin saved
tagvisor stop origin
ended_as 3 $at
begins
# How long a guest is on its way that nothing happens to: faults come at instants of that, and shortly after.
tagvisor receive unharmed --listen "unix:$PWD/unharmed.socket" < /dev/null 2> unharmed.errors &
next=$!
until [ -S unharmed.socket ]; do sleep 0.05; done
must tagvisor migrate "$here" "unix:$PWD/unharmed.socket" --json
span=$(($(jq .total_us must.out) * 5 / 4000))
ended_as 4 $at
here=unharmed at=$next
checked
echo "a guest is on its way for $((span * 4 / 5)) ms"
for number in $(seq "$faults"); do
    breaks "$number"
done
must tagvisor stop "$here"
reap $at
for outcome in "${!outcomes[@]}"; do
    echo "$outcome: ${outcomes[$outcome]}"
done | sort
echo "$faults faults with seed $seed: never two guests, and none lost but with its process"
