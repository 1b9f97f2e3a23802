#!/bin/bash
# lab: append=arm64.nomte
# On a host without MTE a guest with it is refused, and one without it runs.
. "$(dirname "$0")/guests.bash"

refused 1 '--mte off' tagvisor run --flat "$LAB/bin/boot.bin"
status=0
tagvisor check || status=$?
[ $status = 1 ] || fail "tagvisor check ended with status $status"
payload without mte-registers --mte off --cmdline mte=off
