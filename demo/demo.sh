#!/bin/bash
# lab: cpus=2 memory=4G timeout=300
# The demo: a Linux guest with MTE under Tagvisor colours its memory with tags, rewrites and checks them, and its accesses
# with a wrong tag are caught. What the guest says is checked; the first thing that does not hold ends the demo with status 1.
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

say 'Every check held.'
