#!/bin/bash
# lab: hosts=2 cpus=2 memory=4G peer-memory=2G timeout=900
# The demo: a Linux guest with MTE under Tagvisor colours its memory with tags, rewrites and checks them, and its accesses
# with a wrong tag are caught. At work, it moves to another host while it runs, and back by post-copy; it is saved, killed, restored page by
# page, and cloned. What the guests say is checked; the first thing that does not hold ends the demo with status 1.
set -euo pipefail

LAB=${LAB:-/lab}
kernel=$LAB/kernels/trixie
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

must_have() {
    grep -qF -- "$1" "$work/console" && return
    printf 'the demo fails: the guest did not say "%s". Its console:\n' "$1"
    cat "$work/console"
    exit 1
}

# guest COMMAND: runs COMMAND in a guest, its output passing through as it comes.
guest() {
    timeout 250 tagvisor run --name demo --kernel "$kernel/Image" --initrd "$kernel/initrd.cpio" --cpus 2 --memory 512M \
        --no-reboot --cmdline "console=ttyS0 quiet -- $*" < /dev/null 2>&1 | tee "$work/console" | sed -u 's/\r$//; s/^/    /'
}

say "This host: $(uname -srm), $(tagvisor check | sed -n 's/^yes  MTE for guests *//p') for guests"

say 'A Debian kernel with MTE as guest; 16 MiB of its memory are coloured with tags, rewritten and checked by 2 threads'
guest tag-workload --passes 3
must_have ' 0 differences'
must_have 'workload: ok'
must_have 'guest: exit 0'

say 'The same guest: every kind of tag check fault, tag generation and tag registers on each CPU'
guest mte-checks
must_have 'ok sync'
must_have 'ok async'
must_have 'ok irg'
must_have 'ok tfsr'
must_have 'guest: exit 0'

# lines CONSOLE: how many the guest has written.
lines() {
    [ -e "$1" ] || touch "$1"
    wc -l < "$1"
}

# passes CONSOLE: how many its workload has made over all of its memory.
passes() {
    local made
    made=$(grep -o 'workload: [0-9]* passes' "$1" | tail -n 1 | tr -cd 0-9) || true
    echo "${made:-0}"
}

# goes_on NAME: the workload in the guest NAME begins a pass over all of its memory from now on, and ends it: every tag is as it left it.
# It ends at the first difference, and says it.
goes_on() {
    local console=$work/$1.console deadline=$((SECONDS + 120)) said enough
    [ -z "${follow:-}" ] || there "$follow"
    # What it said last may be long ago.
    said=$(lines "$console")
    while [ -z "${enough:-}" ] || [ "$(passes "$console")" -lt "$enough" ]; do
        if [ $SECONDS -ge $deadline ] || grep -q 'guest: exit' "$console"; then
            printf 'the demo fails: guest %s does not go on. Its console:\n' "$1"
            cat "$console"
            exit 1
        fi
        sleep 0.2
        [ -z "${follow:-}" ] || there "$follow"
        [ "$(lines "$console")" = "$said" ] || enough=${enough:-$(($(passes "$console") + 2))}
    done
    printf '    %s: %s\n' "$1" "$(grep ' 0 differences' "$console" | tail -n 1 | tr -d '\r')"
}

# there CONSOLE: brings what the second host's guest has said.
there() {
    peer cat "/tmp/$1.console" > "$work/$1.console" 2> /dev/null || true
}

# waits_at HOST PORT COMMAND…: until somebody waits for a guest there.
waits_at() {
    local port=$1
    shift
    until "$@" ss -ltn | grep -q ":$port "; do sleep 0.2; done
}

say 'A guest at work moves to another host while it runs'
tagvisor run --name home --kernel "$kernel/Image" --initrd "$kernel/initrd.cpio" --cpus 2 --memory 256M \
    --console "file=$work/home.console" --cmdline 'console=ttyS0 quiet -- tag-workload --memory 8M --pause 100' < /dev/null &
disown
goes_on home
peer tagvisor receive away --listen "tcp://$PEER:7000" --unprotected --console file=/tmp/away.console < /dev/null 2> /dev/null &
disown
waits_at 7000 peer
tagvisor migrate home "tcp://$PEER:7000" 2> /dev/null | sed 's/^/    /'
peer tagvisor ls | sed 's/^/    host 2: /'
follow=away goes_on away

say 'It comes back by post-copy: it runs here at once, and fetches its pages, with their tags, as it touches them'
tagvisor receive back --listen tcp://10.0.7.1:7001 --unprotected --console "file=$work/back.console" < /dev/null 2> /dev/null &
disown
waits_at 7001 env
peer tagvisor migrate away tcp://10.0.7.1:7001 --postcopy now 2> /dev/null | sed 's/^/    /'
goes_on back
tagvisor stop back

say 'A guest at work is saved while it runs'
tagvisor run --name first --kernel "$kernel/Image" --initrd "$kernel/initrd.cpio" --cpus 2 --memory 256M \
    --console "file=$work/first.console" --cmdline 'console=ttyS0 quiet -- tag-workload --memory 8M --pause 100' < /dev/null &
disown
goes_on first
tagvisor snapshot first "$work/snapshot" | sed 's/^/    /'
tagvisor snapshot inspect "$work/snapshot" | grep -E '^(size|pages|  |every)' | sed 's/^/    /'
goes_on first

say 'It is killed, and restored lazily: it runs at once, and each page comes with its tags when it is touched'
tagvisor kill first
tagvisor restore "$work/snapshot" --lazy --name second --console "file=$work/second.console" < /dev/null &
disown
goes_on second
tagvisor stop second

say 'Three clones share its memory, data and tags, until they write'
tagvisor clone "$work/snapshot" --count 3 --detach --name clone-%i --console "file=$work/clone-%i.console" < /dev/null | sed 's/^/    /'
for clone in clone-1 clone-2 clone-3; do goes_on $clone; done
tagvisor ls | sed 's/^/    /'
for clone in clone-1 clone-2 clone-3; do tagvisor stop $clone; done

say 'Every check held, and every tag was where it had been left.'
