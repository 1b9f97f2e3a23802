#!/bin/bash
# lab: cpus=2 memory=6G timeout=3000
# A live Linux guest moves from one process to another on one host, over a Unix socket and over loopback: under Debian's QEMU, where
# it can have no MTE, and under Tagvisor, with MTE and tags. Same kernel, initrd, memory, vCPUs and work.
#
# What tags cost is seen beside the same guest without MTE.
set -euo pipefail

. /lab/benches/moves.bash

# pre_copy TITLE WORK TRANSPORT: Tagvisor beside QEMU.
pre_copy() {
    local vmm
    echo "$1, $3 (medians of $rounds moves of one guest)"
    in_turn "$2" "$3" "${vmms[@]}"
    for vmm in "${vmms[@]}"; do
        told_of "$vmm"
    done
    # A VMM that is measured alone has nothing to be compared with.
    [ ${#vmms[@]} -gt 1 ] || return 0
    goal 'total time, round by round' "$(paired "${totals[tagvisor]}" "${totals[qemu]}")" 1.000
    goal 'downtime, round by round' "$(paired "${blackouts[tagvisor]}" "${blackouts[qemu]}")" 0.800
}

# several: two connections against one.
several() {
    local vmm
    echo "An idle guest, Tagvisor, tcp ($rounds moves each)"
    in_turn "$idle" tcp tagvisor double
    for vmm in tagvisor double; do
        told_of $vmm
    done
    printf '  %-52s %8s\n' 'total time, two connections over one' "$(paired "${totals[double]}" "${totals[tagvisor]}")"
}

# post_copy: a guest that rewrites memory moves at once, and its pages follow.
post_copy() {
    local vmm round waits all words
    echo "Post-copy of the guest that rewrites memory, unix ($rounds guests)"
    for vmm in "${vmms[@]}"; do
        waits=() all=() words=()
        for ((round = 0; round < rounds; round++)); do
            embark "$vmm" "$steady"
            sleep 5
            move "$vmm" "$steady" unix now
            sleep 4
            all+=("$blackout") words+=("$told")
            # Of the seconds after the move, the one in which most stores waited.
            waits+=("$(sed -n 's/.*\(waits=[1-9].*[0-9]\).*/\1/p' "${here[$vmm]}.console" | sort -t= -k2n | tail -n 1)")
            "${vmm}_end" "${here[$vmm]}"
        done
        echo "  ${titles[$vmm]}: blackout median $(ms "$(median "${all[@]}")") ms   ($(ms "${all[@]}"))"
        printf '    the VMM: %s\n' "${words[@]}"
        printf '    stores of the guest that waited over 500 us: %s\n' "${waits[@]}"
    done
}

# with_mte: what QEMU says of a guest with MTE.
with_mte() {
    echo 'QEMU, asked to move a guest with MTE'
    qemu tagged virt,gic-version=3,mte=on "$idle"
    until_console tagged.console 'at work'
    if qmp tagged migrate '{"uri": "unix:nowhere"}' > answer 2>&1; then
        echo '  QEMU did not refuse it'
        missed=1
    fi
    sed -n 's/.*"desc": "\([^"]*\)".*/  refused: \1/p' answer
    qemu_end tagged
}

vmms=(qemu tagvisor)

cd "$(mktemp -d)"
qemu-system-aarch64 --version | head -n 1
with_mte
for transport in unix tcp; do
    pre_copy 'An idle guest' "$idle" $transport
    pre_copy 'A guest that rewrites 64 MiB, 16 a second' "$steady" $transport
done
shares
several
post_copy
exit $missed
