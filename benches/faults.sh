#!/bin/bash
# lab: cpus=4 memory=6G timeout=1800
# 1, 2 and 4 vCPUs touch 1 GiB of fresh memory, with MTE and without, on small pages and on transparent huge ones: how the
# host's fault path scales.
set -euo pipefail

. /lab/benches/figures.bash
cd "$(mktemp -d)"
size=$((1 << 30))

# touch VCPUS MTE: microseconds.
touch_us() {
    tagvisor run --flat /lab/bin/touch.bin --cpus "$1" --mte "$2" --memory 1100M --no-reboot --cmdline "size=$size" \
        < /dev/null > console 2>&1 || { cat console >&2; exit 1; }
    grep -q 'payload: ok' console || { cat console >&2; exit 1; }
    sed -n 's/^touch: .*, \([0-9]*\) us.*/\1/p' console
}

# curve PAGES ROUNDS: a line for each of MTE on and off.
curve() {
    local rounds=$2 mte vcpus round one ms
    for mte in on off; do
        one=0
        line=$(printf '  %-12s MTE %-4s' "$1" $mte)
        for vcpus in 1 2 4; do
            ms=()
            for ((round = 0; round < rounds; round++)); do
                ms+=("$(($(touch_us $vcpus $mte) / 1000))")
            done
            ms=$(median "${ms[@]}")
            [ $vcpus != 1 ] || one=$ms
            line+=$(printf '  %6d ms (%d.%02d)' "$ms" $((one / ms)) $((one * 100 / ms % 100)))
        done
        echo "$line"
    done
}

echo "1 GiB of fresh memory touched by 1, 2 and 4 vCPUs at once; in brackets: times faster than 1 vCPU"
echo "The host has $(nproc) emulated CPUs; on a machine with fewer than that, the figures beyond its own count say nothing."
curve '2 MiB pages' 3
echo never > /sys/kernel/mm/transparent_hugepage/enabled
# 262,144 faults, each with exits to the host and back, all emulated: a minute a run.
curve '4 KiB pages' 1
