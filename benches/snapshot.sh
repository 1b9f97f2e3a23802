#!/bin/bash
# lab: cpus=2 memory=8G timeout=3000
# Snapshots, lazy restores and clones, each figure beside its goal. Files are in memory, so no disk is measured.
set -euo pipefail

kernel=/lab/kernels/trixie/Image
initrd=/lab/kernels/trixie/initrd.cpio
declare -A vmms
. /lab/benches/figures.bash

# linux NAME OPTION…: an idle Linux guest.
linux() {
    local name=$1
    shift
    tagvisor run --name "$name" --kernel $kernel --initrd $initrd --console "file=$name.console" --no-reboot \
        --cmdline 'console=ttyS0 quiet -- echo idle; sleep 100000' "$@" < /dev/null 2> "$name.errors" &
    vmms[$name]=$!
    until_console "$name.console" idle
}

# filled NAME TAGS MEMORY SIZE OPTION…: a bare-metal guest that has filled SIZE bytes with random data, and with random tags
# if TAGS is random, and now prints lines.
filled() {
    local name=$1 tags=$2 memory=$3 size=$4
    shift 4
    tagvisor run --name "$name" --flat /lab/bin/fill.bin --console "file=$name.console" --memory "$memory" --no-reboot \
        --cmdline "size=$size tags=$tags" "$@" < /dev/null 2> "$name.errors" &
    vmms[$name]=$!
    until_console "$name.console" ' pages'
}

# end NAME…: ends guests.
end() {
    local name
    for name in "$@"; do
        kill "${vmms[$name]}"
        # Its status says that it was ended.
        wait "${vmms[$name]}" || true
    done
    rm -f ./*.console ./*.errors
}

# compare_snapshots ROUNDS OPTION…: the guests tagged and plain, both paused, saved in turn; sets tagged_us and plain_us (medians)
# and tagged_bytes and plain_bytes.
compare_snapshots() {
    local rounds=$1 round guest
    shift
    local -A us=() bytes=()
    for ((round = 0; round < rounds; round++)); do
        for guest in tagged plain; do
            tagvisor snapshot $guest $guest.snapshot --json "$@" > report
            us[$guest]+=" $(field total_us < report)"
            bytes[$guest]=$(field bytes < report)
        done
    done
    tagged_us=$(median ${us[tagged]}) plain_us=$(median ${us[plain]})
    tagged_bytes=${bytes[tagged]} plain_bytes=${bytes[plain]}
}

idle_linux_with_tags_and_without() {
    local round sizes=() plain_sizes=() times=() plain_times=()
    echo 'A snapshot of an idle Linux guest of 512 MiB with MTE over one without, both paused (medians of 3 pairs of guests)'
    for round in 1 2 3; do
        linux tagged
        linux plain --mte off
        sleep 3
        tagvisor pause tagged
        tagvisor pause plain
        compare_snapshots 3
        sizes+=("$tagged_bytes") plain_sizes+=("$plain_bytes")
        times+=("$tagged_us") plain_times+=("$plain_us")
        end tagged plain
    done
    echo "  with MTE     $(for b in "${sizes[@]}"; do mib "$b"; echo -n '  '; done) in $(ms "${times[@]}") ms"
    echo "  without      $(for b in "${plain_sizes[@]}"; do mib "$b"; echo -n '  '; done) in $(ms "${plain_times[@]}") ms"
    goal 'size' "$(ratio "$(median "${sizes[@]}")" "$(median "${plain_sizes[@]}")")" 1.010
    goal 'time' "$(ratio "$(median "${times[@]}")" "$(median "${plain_times[@]}")")" 1.100
}

heap_of_random_tags() {
    local compression
    echo 'A snapshot of 128 MiB of random data, each granule with a random tag, over the same data without MTE, both paused'
    filled tagged random 256M $((128 << 20))
    filled plain none 256M $((128 << 20)) --mte off
    tagvisor pause tagged
    tagvisor pause plain
    for compression in lz4 none; do
        compare_snapshots 7 --compress $compression
        echo "  --compress $compression: with MTE $(mib "$tagged_bytes") in $(ms "$tagged_us") ms, without $(mib "$plain_bytes") in $(ms "$plain_us") ms"
        goal 'size' "$(ratio "$tagged_bytes" "$plain_bytes")" 1.035
        goal 'time' "$(ratio "$tagged_us" "$plain_us")" 1.100
    done
    end tagged plain
    rm ./*.snapshot
}

# qmp COMMAND: asks QEMU, and prints the answer.
qmp() {
    local line
    echo "$1" >&5
    while IFS= read -r line <&6; do
        case $line in
        *'"return"'*) echo "$line"; return ;;
        *'"error"'*) echo "$line" >&2; return 1 ;;
        esac
    done
    return 1
}

# qemu_blackout_us: has QEMU write its guest to a file, and the guest go on.
qemu_blackout_us() {
    local answer
    qmp '{"execute": "migrate", "arguments": {"uri": "file:qemu.state"}}' > /dev/null
    until [[ ${answer:-} == *'"status": "completed"'* ]]; do
        sleep 0.2
        answer=$(qmp '{"execute": "query-migrate"}')
    done
    qmp '{"execute": "cont"}' > /dev/null
    rm qemu.state
    echo "$(($(field downtime <<< "$answer") * 1000))"
}

blackout() {
    local rounds=7 round own=() qemu=()
    echo "Blackout of a live snapshot of an idle Linux guest of 1 GiB ($rounds each, in turn)"
    linux idle --memory 1G
    coproc QEMU {
        exec qemu-system-aarch64 -M virt,gic-version=3 -accel kvm -cpu host -m 1G -display none -monitor none -nic none \
            -serial file:qemu.console -qmp stdio -no-reboot -kernel $kernel -initrd $initrd \
            -append 'console=ttyAMA0 quiet -- echo idle; sleep 100000' 2>&1
    }
    # Those of a coprocess are closed in subshells.
    exec 5>&"${QEMU[1]}" 6<&"${QEMU[0]}"
    until_console qemu.console idle
    qmp '{"execute": "qmp_capabilities"}' > /dev/null
    sleep 3
    for ((round = 0; round < rounds; round++)); do
        tagvisor snapshot idle idle.snapshot --json > report
        own+=("$(field blackout_us < report)")
        qemu+=("$(qemu_blackout_us)")
    done
    echo "  Tagvisor, MTE         median $(ms "$(median "${own[@]}")") ms   ($(ms "${own[@]}"))"
    echo "  QEMU, without MTE     median $(ms "$(median "${qemu[@]}")") ms   ($(ms "${qemu[@]}"))   migrate file:, $(qemu-system-aarch64 --version | head -n 1)"
    goal 'blackout' "$(ratio "$(median "${own[@]}")" "$(median "${qemu[@]}")")" 0.500
    qmp '{"execute": "quit"}' > /dev/null
    exec 5>&- 6<&-
    end idle
    rm idle.snapshot
}

lazy_restore() {
    local size rounds=7 round
    local -A us=()
    echo 'From the start of `tagvisor restore` to the first byte that the guest prints; all of its memory is random data and tags'
    for size in 256 2048; do
        filled $size random ${size}M all
        tagvisor pause $size
        tagvisor snapshot $size $size.snapshot --compress none > /dev/null
        end $size
    done
    # The first start reads files that later ones find in memory.
    bench-first-byte tagvisor restore 256.snapshot --lazy --console stdio > /dev/null
    for ((round = 0; round < rounds; round++)); do
        for size in 256 2048; do
            us[$size]+=" $(bench-first-byte tagvisor restore $size.snapshot --lazy --console stdio)"
        done
        [ $((round % 3)) != 0 ] || us[eager]+=" $(bench-first-byte tagvisor restore 2048.snapshot --console stdio)"
    done
    local small large eager
    small=$(median ${us[256]}) large=$(median ${us[2048]}) eager=$(median ${us[eager]})
    echo "  lazy, 256 MiB   median $(ms "$small") ms   ($(ms ${us[256]}))"
    echo "  lazy, 2 GiB     median $(ms "$large") ms   ($(ms ${us[2048]}))"
    echo "  eager, 2 GiB    median $(ms "$eager") ms   ($(ms ${us[eager]}))"
    goal '2 GiB over 256 MiB, lazy' "$(ratio "$large" "$small")" 1.200
    goal 'lazy over eager, 2 GiB' "$(ratio "$large" "$eager")" 0.100
    rm ./*.snapshot
}

# clone_us COUNT: starts clones, c1 and so on, and prints the microseconds until they run.
clone_us() {
    local begun=$EPOCHREALTIME
    tagvisor clone idle.snapshot --count "$1" --name c%i --detach > clones
    echo $((${EPOCHREALTIME/./} - ${begun/./}))
}

end_clones() {
    local name pid
    while read -r name pid; do
        kill -KILL "$pid"
    done < clones
    while read -r name pid; do
        while [ -e "/proc/$pid" ]; do
            sleep 0.05
        done
    done < clones
}

# available_kib: what the host has free, its shared memory, of which clones have one between them, counted as free.
available_kib() {
    echo 3 > /proc/sys/vm/drop_caches
    awk '/^(MemAvailable|Shmem):/ { sum += $2 } END { print sum }' /proc/meminfo
}

# written_kib PID: the pages that a clone has of its own in its guest's memory.
written_kib() {
    awk '/^[0-9a-f]+-/ { guest = /\(deleted\)/ } /^Anonymous:/ && guest { sum += $2 } END { print sum + 0 }' "/proc/$1/smaps"
}

# own_kib PID: all else that a clone shares with nobody, and its page tables.
own_kib() {
    awk '/^[0-9a-f]+-/ { guest = /\(deleted\)/ } /^Private_(Clean|Dirty):/ && !guest { sum += $2 }
        /^VmPTE:/ { sum += $2 } END { print sum }' "/proc/$1/smaps" "/proc/$1/status"
}

clones() {
    local round one=() sixteen=() name pid before after own=() written=0
    echo 'Clones of an idle Linux guest of 512 MiB'
    linux idle --memory 512M
    sleep 3
    tagvisor snapshot idle idle.snapshot > /dev/null
    end idle
    for ((round = 0; round < 5; round++)); do
        one+=("$(clone_us 1)")
        end_clones
        sixteen+=("$(clone_us 16)")
        end_clones
    done
    echo "  1 clone runs after     $(ms "$(median "${one[@]}")") ms   ($(ms "${one[@]}"))"
    echo "  16 clones run after    $(ms "$(median "${sixteen[@]}")") ms   ($(ms "${sixteen[@]}"))"
    goal '16 over 1' "$(ratio "$(median "${sixteen[@]}")" "$(median "${one[@]}")")" 4.000
    before=$(available_kib)
    clone_us 16 > /dev/null
    sleep 10
    after=$(available_kib)
    while read -r name pid; do
        own+=("$(own_kib "$pid")")
        written=$((written + $(written_kib "$pid")))
    done < clones
    echo "  a clone's guest has written $((written / 16)) KiB in 10 s"
    goal 'KiB of a clone beside that, its own pages' "$(median "${own[@]}")" 6144
    goal "KiB less in the host for each, the kernel's with it" $(((before - after - written) / 16)) 6144
    end_clones
}

cd "$(mktemp -d)"
idle_linux_with_tags_and_without
heap_of_random_tags
blackout
lazy_restore
clones
exit $missed
