# What benchmarks of moves share: guests under QEMU and under Tagvisor that move from one process to another, and what tags add to it.
#
# A VMM is six functions: VMM_start NAME WORK, VMM_receive NAME URI WORK, VMM_move FROM TO URI never|now, which sets the
# microseconds total and blackout, bytes, tag_bytes, and what the VMM has told of pages asked for, VMM_pause, VMM_resume and VMM_end NAME.
# Consoles are in NAME.console.

. /lab/benches/figures.bash
rounds=${ROUNDS:-3}
kernel=/lab/kernels/trixie/Image
initrd=/lab/kernels/trixie/initrd.cpio
cpus=2
memory=512M
# What QEMU aims at by itself.
max_downtime_ms=300
declare -A pids orders answers here totals blackouts sizes datas
declare -A titles=([qemu]='QEMU, without MTE' [tagvisor]='Tagvisor, MTE' [plain]='Tagvisor, without MTE' [double]='Tagvisor, 2 connections')

# What guests do: nothing; rewrite 64 MiB, 16 a second; or hardly anything, when they have filled 128 MiB with random data and, where
# TAGS is put in for --tags, with random tags.
idle='echo at work; sleep 100000'
steady='echo at work; rewrite --memory 64 --rate 16'
heap='rewrite --memory 128 --rate 1 TAGS > /tmp/log & until grep -q filled /tmp/log; do sleep 1; done; echo at work; sleep 100000'

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
    tag_bytes=0
    told="$(field postcopy-requests <<< "$answer") pages asked for"
    until [[ $(qmp "$to" query-status) == *'"status": "running"'* ]]; do
        sleep 0.1
    done
    [ "$postcopy" = never ] ||
        told+=", vCPUs blocked for $(qmp "$to" query-migrate | sed -n 's/.*"postcopy-vcpu-blocktime": \(\[[^]]*\]\).*/\1/p') ms"
}

qemu_pause() { qmp "$1" stop > /dev/null; }
qemu_resume() { qmp "$1" cont > /dev/null; }

# Tagvisor; its guest without MTE; with two connections.
tagvisor_start() { tagvisor_run "$1" "${2/TAGS/--tags}" on; }
plain_start() { tagvisor_run "$1" "${2/TAGS/}" off; }
double_start() { tagvisor_start "$@"; }
tagvisor_receive() { tagvisor_wait "$1" "$2"; }
plain_receive() { tagvisor_wait "$1" "$2"; }
double_receive() { tagvisor_wait "$1" "$2"; }
tagvisor_move() { tagvisor_migrate "$@" 1; }
plain_move() { tagvisor_migrate "$@" 1; }
double_move() { tagvisor_migrate "$@" 2; }
tagvisor_pause() { tagvisor pause "$1" 2> /dev/null; }
plain_pause() { tagvisor_pause "$1"; }
double_pause() { tagvisor_pause "$1"; }
tagvisor_resume() { tagvisor resume "$1" 2> /dev/null; }
plain_resume() { tagvisor_resume "$1"; }
double_resume() { tagvisor_resume "$1"; }
# The guest has left it; or it is stopped.
tagvisor_end() {
    tagvisor stop "$1" 2> /dev/null || true
    wait "${pids[$1]}" || true
    rm "$1".*
}
plain_end() { tagvisor_end "$1"; }
double_end() { tagvisor_end "$1"; }

# tagvisor_run NAME WORK MTE
tagvisor_run() {
    tagvisor run --name "$1" --kernel $kernel --initrd $initrd --cpus $cpus --memory $memory --mte "$3" --no-reboot \
        --console "file=$PWD/$1.console" --cmdline "console=ttyS0 quiet -- $2" < /dev/null 2> "$1.errors" &
    pids[$1]=$!
    until_console "$1.console" 'at work'
}

# tagvisor_wait NAME URI
tagvisor_wait() {
    local name=$1
    TAGVISOR_LOG=info tagvisor receive "$name" --listen "${2/tcp:/tcp://}" --console "file=$PWD/$name.console" < /dev/null 2> "$name.errors" &
    pids[$name]=$!
    until grep -q 'waiting for a guest' "$name.errors"; do
        sleep 0.05
    done
}

# tagvisor_migrate FROM TO URI POSTCOPY CONNECTIONS
tagvisor_migrate() {
    tagvisor migrate "$1" "${3/tcp:/tcp://}" --postcopy "$4" --max-downtime $max_downtime_ms --connections "$5" --json \
        > "$1.report" 2> "$1.progress" || { cat "$1.progress" >&2; exit 1; }
    total=$(field total_us < "$1.report")
    blackout=$(field downtime_us < "$1.report")
    bytes=$(field bytes < "$1.report")
    tag_bytes=$(field tag_bytes < "$1.report")
    told="$(field fetched < "$1.report") pages fetched"
    [ "$4" = never ] || told+=", $(sed -n 's/.*all of the guest is here: //p' "$2.errors")"
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

# embark VMM WORK: a new guest, the machine ${here[VMM]}.
embark() {
    here[$1]=$1-0
    totals[$1]='' blackouts[$1]='' sizes[$1]='' datas[$1]=''
    "$1_start" "$1-0" "$2"
}

# move VMM WORK TRANSPORT POSTCOPY: the guest of a VMM moves on; adds to its totals, blackouts, sizes, and datas (bytes that are no tags).
move() {
    local vmm=$1 from=${here[$1]} place
    local to=$vmm-$((${from##*-} + 1))
    choose_place "$3"
    "${vmm}_receive" "$to" "$place" "$2"
    "${vmm}_move" "$from" "$to" "$place" "$4"
    totals[$vmm]+=" $total" blackouts[$vmm]+=" $blackout" sizes[$vmm]+=" $bytes" datas[$vmm]+=" $((bytes - tag_bytes))"
    "${vmm}_end" "$from"
    here[$vmm]=$to
}

# in_turn WORK TRANSPORT VMM…: a guest of each VMM moves, one after the other in each round, and is paused while others do: how fast the
# machine is changes by the minute, and so it is the same for all.
in_turn() {
    local work=$1 transport=$2 vmm round
    shift 2
    for vmm; do
        embark "$vmm" "$work"
        "${vmm}_pause" "${here[$vmm]}"
    done
    for ((round = 0; round < rounds; round++)); do
        for vmm; do
            "${vmm}_resume" "${here[$vmm]}"
            sleep 4
            move "$vmm" "$work" "$transport" never
            "${vmm}_pause" "${here[$vmm]}"
        done
    done
    for vmm; do
        "${vmm}_end" "${here[$vmm]}"
    done
}

# told_of VMM: a line of what its moves took.
told_of() {
    # shellcheck disable=SC2086 # They are lists.
    printf '  %-24s total %8s ms   downtime %7s ms   %s   (total: %s; downtime: %s)\n' "${titles[$1]}" \
        "$(ms "$(median ${totals[$1]})")" "$(ms "$(median ${blackouts[$1]})")" "$(mib "$(median ${sizes[$1]})")" \
        "$(ms ${totals[$1]})" "$(ms ${blackouts[$1]})"
}

# share TITLE WORK BYTES: what tags add to the moves of a guest, in bytes and in time.
# Two Linux guests never have the same number of pages, so bytes are compared with those of the same moves that are no tags.
share() {
    local vmm
    echo "$1, Tagvisor with MTE over without, unix ($rounds moves each)"
    in_turn "$2" unix tagvisor plain
    for vmm in tagvisor plain; do
        told_of $vmm
    done
    goal 'bytes with tags, over those that are none' "$(paired "${sizes[tagvisor]}" "${datas[tagvisor]}")" "$3"
    printf '  %-52s %8s\n' 'bytes, over the other guest' "$(paired "${sizes[tagvisor]}" "${sizes[plain]}")"
    goal 'total time, round by round' "$(paired "${totals[tagvisor]}" "${totals[plain]}")" 1.050
}

# shares: of the guest that has the fewest tags, and of the one that has the most.
shares() {
    share 'An idle guest' "$idle" 1.010
    share 'A guest whose 128 MiB of heap have random data and tags' "$heap" 1.035
}
