#!/bin/bash
# lab: kernel=bookworm
# On a host with Linux 6.1 guests with MTE have private memory, whose tags the kernel copies: they move by pre-copy, with every tag.
# Post-copy needs shared memory: it is refused by name, and the guest stays.
. "$(dirname "$0")/guests.bash"

kernel=$LAB/kernels/trixie

# receive NAME: waits for a guest at the socket of that name; its process is $there.
receive() {
    tagvisor receive "$1" --listen "unix:$PWD/$1.socket" < /dev/null &
    there=$!
    until [ -S "$1.socket" ]; do
        kill -0 $there 2> /dev/null || fail "nobody waits at $1"
        sleep 0.05
    done
}

tagvisor run --name first --kernel "$kernel/Image" --initrd "$kernel/initrd.cpio" --cpus 2 --memory 192M \
    --console "file=$OUT/guest.console" --cmdline 'console=ttyS0 quiet -- tag-workload --memory 8M --threads 2 --pause 50' < /dev/null &
here=$!
goes_on $here "$OUT/guest.console"
receive second
tagvisor migrate first "unix:$PWD/second.socket" > report 2> progress || fail "$(cat progress)"
ended_as 4 $here
here=$there
goes_on $here "$OUT/guest.console"
tr '\n' ' ' < report
echo

receive third
refused 1 'older than Linux 6.2' tagvisor migrate second "unix:$PWD/third.socket" --postcopy now
goes_on $here "$OUT/guest.console"
# It waits for the next one.
tagvisor migrate second "unix:$PWD/third.socket" > report 2> progress || fail "$(cat progress)"
ended_as 4 $here
here=$there
goes_on $here "$OUT/guest.console"
tagvisor stop third
console_lacks guest 'workload: difference'
