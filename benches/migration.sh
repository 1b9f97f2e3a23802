#!/bin/bash
# lab: cpus=2 memory=6G timeout=3000
# A live Linux guest moves from one process to another on one host, over a Unix socket and over loopback: under Debian's QEMU, where
# it can have no MTE, and under Tagvisor, with MTE and tags. Same kernel, initrd, memory, vCPUs and work.
#
# A VMM is four functions: VMM_start NAME WORK, VMM_receive NAME URI WORK, VMM_move FROM TO URI never|now, which sets the
# microseconds total and blackout, bytes, and what the VMM has told of pages asked for, and VMM_end NAME. Consoles are in NAME.console.
set -euo pipefail

. /lab/benches/figures.bash
rounds=${ROUNDS:-5}
kernel=/lab/kernels/trixie/Image
initrd=/lab/kernels/trixie/initrd.cpio
cpus=2
memory=512M
# What QEMU aims at by itself.
max_downtime_ms=300
declare -A pids orders answers

# What guests do: nothing, or rewrite 64 MiB, 16 a second.
idle='echo at work; sleep 100000'
steady='echo at work; rewrite --memory 64 --rate 16'

# qmp NAME COMMAND [ARGUMENTS]: asks a QEMU, and prints the answer.
qmp() {
    local line
    echo "{\"execute\": \"$2\", \"arguments\": ${3:-{\}}}" >&"${orders[$1]}"
    while IFS= read -r line <&"${answers[$1]}"; do
        case $line in
        *'"return"'*) echo "$line"; return ;;
        *'"error"'*) echo "$line" >&2; return 1 ;;
        esac
    done
    return 1
}

# qemu NAME MACHINE WORK OPTION…: starts a QEMU that takes orders.
qemu() {
    local name=$1 machine=$2 work=$3 to from
    shift 3
    mkfifo "$name.to" "$name.from"
    exec {to}<> "$name.to" {from}<> "$name.from"
    orders[$name]=$to answers[$name]=$from
    qemu-system-aarch64 -M "$machine" -accel kvm -cpu host -smp $cpus -m $memory -display none -monitor none -nic none \
        -serial "file:$name.console" -qmp stdio -no-reboot -kernel $kernel -initrd $initrd \
        -append "console=ttyAMA0 quiet -- $work" "$@" < "$name.to" > "$name.from" 2> "$name.errors" &
    pids[$name]=$!
    qmp "$name" qmp_capabilities > /dev/null
    qmp "$name" migrate-set-parameters "{\"downtime-limit\": $max_downtime_ms, \"max-bandwidth\": $((1 << 40))}" > /dev/null
}

qemu_start() {
    qemu "$1" virt,gic-version=3 "$2"
    until_console "$1.console" 'at work'
}

qemu_receive() {
    qemu "$1" virt,gic-version=3 "$3" -incoming defer
    capabilities "$1" postcopy-ram postcopy-blocktime
    qmp "$1" migrate-incoming "{\"uri\": \"$2\"}" > /dev/null
}

capabilities() {
    local name=$1 all
    shift
    all=$(printf ', {"capability": "%s", "state": true}' "$@")
    qmp "$name" migrate-set-capabilities "{\"capabilities\": [${all:2}]}" > /dev/null
}

qemu_move() {
    local from=$1 to=$2 uri=$3 postcopy=$4 answer=
    capabilities "$from" postcopy-ram
    qmp "$from" migrate "{\"uri\": \"$uri\"}" > /dev/null
    [ "$postcopy" = never ] || qmp "$from" migrate-start-postcopy > /dev/null
    until [[ $answer == *'"status": "completed"'* ]]; do
        sleep 0.2
        answer=$(qmp "$from" query-migrate)
        [[ $answer != *'"status": "failed"'* ]] || { echo "QEMU: $answer" >&2; exit 1; }
    done
    total=$(($(field total-time <<< "$answer") * 1000))
    blackout=$(($(field downtime <<< "$answer") * 1000))
    bytes=$(field transferred <<< "$answer")
    told="$(field postcopy-requests <<< "$answer") pages asked for"
    until [[ $(qmp "$to" query-status) == *'"status": "running"'* ]]; do
        sleep 0.1
    done
    [ "$postcopy" = never ] ||
        told+=", vCPUs blocked for $(qmp "$to" query-migrate | sed -n 's/.*"postcopy-vcpu-blocktime": \(\[[^]]*\]\).*/\1/p') ms"
}

qemu_end() {
    qmp "$1" quit > /dev/null
    wait "${pids[$1]}"
    local to=${orders[$1]} from=${answers[$1]}
    exec {to}>&- {from}<&-
    rm "$1".*
}

# choose_place TRANSPORT: sets place, where the next machine listens.
port=7000
choose_place() {
    port=$((port + 1))
    case $1 in
    unix) place=unix:$PWD/$port.sock ;;
    tcp) place=tcp:127.0.0.1:$port ;;
    esac
}

# travel VMM WORK TRANSPORT TIMES POSTCOPY: a new guest moves so many times; sets totals, blackouts and sizes, and leaves it as
# the machine $here.
travel() {
    local vmm=$1 work=$2 transport=$3 times=$4 postcopy=$5 there place time
    totals=() blackouts=() sizes=()
    here=$vmm-0
    "${vmm}_start" "$here" "$work"
    sleep 5
    for ((time = 1; time <= times; time++)); do
        there=$vmm-$time
        choose_place "$transport"
        "${vmm}_receive" "$there" "$place" "$work"
        "${vmm}_move" "$here" "$there" "$place" "$postcopy"
        totals+=("$total") blackouts+=("$blackout") sizes+=("$bytes")
        "${vmm}_end" "$here"
        here=$there
        sleep 4
    done
}

# pre_copy TITLE WORK TRANSPORT: a line for each VMM.
pre_copy() {
    local vmm
    echo "$1, $3 (medians of $rounds moves of one guest)"
    for vmm in "${vmms[@]}"; do
        travel "$vmm" "$2" "$3" "$rounds" never
        "${vmm}_end" "$here"
        printf '  %-22s total %8s ms   downtime %8s ms   %s   (total: %s; downtime: %s)\n' "${titles[$vmm]}" \
            "$(ms "$(median "${totals[@]}")")" "$(ms "$(median "${blackouts[@]}")")" "$(mib "$(median "${sizes[@]}")")" \
            "$(ms "${totals[@]}")" "$(ms "${blackouts[@]}")"
        medians[$vmm-total]=$(median "${totals[@]}")
        medians[$vmm-blackout]=$(median "${blackouts[@]}")
    done
    # A VMM that is measured alone has nothing to be compared with.
    [ ${#vmms[@]} -gt 1 ] || return 0
    goal 'total time' "$(ratio "${medians[tagvisor-total]}" "${medians[qemu-total]}")" 1.000
    goal 'downtime' "$(ratio "${medians[tagvisor-blackout]}" "${medians[qemu-blackout]}")" 0.800
}

# post_copy: a guest that rewrites memory moves at once, and its pages follow.
post_copy() {
    local vmm round waits all words
    echo "Post-copy of the guest that rewrites memory, unix ($rounds guests)"
    for vmm in "${vmms[@]}"; do
        waits=() all=() words=()
        for ((round = 0; round < rounds; round++)); do
            travel "$vmm" "$steady" unix 1 now
            all+=("${blackouts[@]}") words+=("$told")
            # Of the seconds after the move, the one in which most stores waited.
            waits+=("$(sed -n 's/.*\(waits=[1-9].*[0-9]\).*/\1/p' "$here.console" | sort -t= -k2n | tail -n 1)")
            "${vmm}_end" "$here"
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

declare -A titles=([qemu]='QEMU, without MTE' [tagvisor]='Tagvisor, MTE') medians
vmms=(qemu)

cd "$(mktemp -d)"
qemu-system-aarch64 --version | head -n 1
with_mte
for transport in unix tcp; do
    pre_copy 'An idle guest' "$idle" $transport
    pre_copy 'A guest that rewrites 64 MiB, 16 a second' "$steady" $transport
done
post_copy
exit $missed
