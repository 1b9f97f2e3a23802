#!/bin/bash
# lab: own-host timeout=3000
# The tag workload on four vCPUs, which are more than the host has CPUs, is saved under load and restored RESTORES times in
# a row, each time from a snapshot of the restore before: whole files and deltas, on files and on deltas, taken up eagerly
# and lazily. RESTORES is 4 by default, in which whole and delta come both ways; 50 are the whole test.
. "$(dirname "$0")/guests.bash"

restores=${RESTORES:-4}

# The guest says when it learns that it was restored; after the last time the workload is to check all of its memory and end.
mkdir guest
cat > guest/work << END
told=0
tag-workload --memory 4M &
workload=\$!
while [ \$told -lt $restores ] && kill -0 \$workload; do
    sleep 0.5
    now=\$(dmesg | grep -c 'reseeded due to virtual machine fork')
    [ \$now = \$told ] || echo "guest: restored \$now times"
    told=\$now
done
sleep 3
kill -TERM \$workload
wait \$workload
END
initrd_with trixie guest

tagvisor run --name work --cpus 4 --memory 160M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd \
    --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work' --console "file=$OUT/round-0.console" < /dev/null &
machine=$!
wait_for_console round-0 ' 0 differences' $machine

before=
for round in $(seq "$restores"); do
    options=()
    kind=whole
    # Two deltas after each whole file, and lazily every other time.
    if [ $((round % 3)) != 1 ]; then
        options=(--base "$before" --compress none)
        kind=delta
    fi
    tagvisor snapshot work "file-$round" "${options[@]}"
    tagvisor stop work
    ended_as 3 $machine
    if [ $kind = whole ]; then
        find . -name 'file-*' ! -name "file-$round" -delete
    fi
    before=file-$round

    options=()
    [ $((round % 2)) = 1 ] || options=(--lazy)
    tagvisor restore "file-$round" --console "file=$OUT/round-$round.console" "${options[@]}" < /dev/null &
    machine=$!
    wait_for_console "round-$round" "guest: restored $round times" $machine
    # The last one ends by itself.
    [ "$round" = "$restores" ] || wait_for_console "round-$round" ' 0 differences' $machine
    echo "round $round: $kind, ${options[*]:-eager}, $SECONDS s"
done
ended_as 0 $machine
console_has "round-$restores" 'workload: ok'
console_has "round-$restores" 'guest: exit 0'
