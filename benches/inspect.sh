#!/bin/bash
# lab: cpus=2 memory=8G timeout=2400
# What it costs to look at a machine of 2 GiB that runs, all of whose memory is random data with random tags: figures and picture of
# its tags beside reading them, a core beside copying its memory. Files are in memory, so no disk is measured.
set -euo pipefail
. /lab/benches/figures.bash

rounds=${ROUNDS:-3}
limit_kib=65536
declare -A us=() peak=()

# measured NAME COMMAND…: adds a round to the figures of NAME.
measured() {
    local name=$1 took kib
    shift
    read -r took kib < <(bench-cost "$@")
    us[$name]+=" $took"
    [ "${peak[$name]:-0}" -ge "$kib" ] || peak[$name]=$kib
}

# figure NAME TEXT
figure() {
    printf '  %-28s %9s ms   peak %5.1f MiB   (%s)\n' "$2" "$(ms "$(median ${us[$1]})")" \
        "$(awk -v kib="${peak[$1]}" 'BEGIN { print kib / 1024 }')" "$(ms ${us[$1]})"
}

# beside NAME BASE LIMIT
beside() {
    goal "$1 over $2, time" "$(ratio "$(median ${us[$1]})" "$(median ${us[$2]})")" "$3"
    goal "$1, KiB at most" "${peak[$1]}" $limit_kib
}

cd "$(mktemp -d)"
tagvisor run --name web --flat /lab/bin/fill.bin --console file=web.console --memory 2G --no-reboot \
    --cmdline 'size=all tags=random' < /dev/null 2> web.errors &
vmm=$!
until_console web.console ' pages'
populated=$(tagvisor tags stat web --json | field pages)

for ((round = 0; round < rounds; round++)); do
    # What has no lease: the guest must not be at work beside it either.
    tagvisor pause web
    measured tags bench-memory tags $vmm
    measured copy bench-memory copy $vmm copied
    rm copied
    measured data bench-memory data $vmm copied
    rm copied
    tagvisor resume web
    measured stat tagvisor tags stat web
    measured map tagvisor tags map web --png map.png
    measured core tagvisor core web web.core
    rm web.core
done

echo "A machine of 2 GiB that runs, $populated pages populated, all with random data and tags (medians of $rounds rounds in turn)"
figure tags 'reading its tags'
figure stat 'tags stat'
figure map 'tags map'
figure data 'copying its data alone'
figure copy 'copying its data and tags'
figure core 'core'
beside stat tags 2.000
beside map tags 2.000
beside core copy 1.100
kill $vmm
# Its status says that it was ended.
wait $vmm || true
exit $missed
