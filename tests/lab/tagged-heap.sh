#!/bin/bash
# An unmodified Debian program lives in a guest on a heap that glibc tags, and dies of a tag fault when it overflows it.
. "$(dirname "$0")/guests.bash"

perl_into guest
cp "$LAB/programs/heartbeat.pl" "$LAB/bin/mte-checks" guest
initrd_with trixie guest
export INITRD=guest.initrd

linux_succeeds heap-lives trixie -- GLIBC_TUNABLES=glibc.mem.tagging=3 $perl /heartbeat.pl
console_has heap-lives 'heartbeat: ok'

linux heap-dies trixie -- GLIBC_TUNABLES=glibc.mem.tagging=3 /mte-checks tag-fault $perl /heartbeat.pl --bleed ||
    fail "tagvisor ended with status $?"
console_has heap-dies 'heartbeat: a request claims 64 KiB and has 16 bytes'
console_lacks heap-dies 'heartbeat: bled'
console_has heap-dies 'guest: exit 0'

# The same request without tags: it is the tags that stop it.
linux heap-bleeds trixie -- $perl /heartbeat.pl --bleed || fail "tagvisor ended with status $?"
console_has heap-bleeds 'heartbeat: bled'
