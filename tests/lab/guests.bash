# What the tests in the lab share: starting guests, and saying what failed.

set -euo pipefail
LAB=${LAB:-/lab}
OUT=${OUT:-.}
# No guest here takes longer, whatever else the machine does.
LIMIT=240

fail() {
    printf 'FAIL: %s\n' "$*"
    exit 1
}

# linux NAME KERNEL [OPTION…] -- COMMAND: runs COMMAND in a Linux guest to its end, the console in $OUT/NAME.console.
# $INITRD is an initrd other than the kernel's own. The status is tagvisor's.
linux() {
    local name=$1 kernel=$LAB/kernels/$2 options=()
    shift 2
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    timeout --kill-after 10 $LIMIT tagvisor run --name "$name" --no-reboot \
        --kernel "$kernel/Image" --initrd "${INITRD:-$kernel/initrd.cpio}" \
        --cmdline "console=ttyS0 quiet panic=-1 -- $*" \
        "${options[@]}" < /dev/null > "$OUT/$name.console" 2>&1
}

# linux_succeeds NAME KERNEL [OPTION…] -- COMMAND: the same, and COMMAND must succeed.
linux_succeeds() {
    linux "$@" || fail "$1: tagvisor ended with status $?"
    console_has "$1" 'guest: exit 0'
}

# initrd_with KERNEL FOLDER: the initrd of KERNEL with the files of FOLDER besides, as FOLDER.initrd. The kernel unpacks
# one archive after the other.
initrd_with() {
    (cd "$2" && find . | busybox cpio -o -H newc 2> /dev/null) | cat "$LAB/kernels/$1/initrd.cpio" - > "$2.initrd"
}

# perl_into FOLDER: Debian's Perl in FOLDER, with its libraries and base modules. Sets $perl.
perl_into() {
    local libraries modules
    perl=$(command -v perl)
    mapfile -t libraries < <(ldd "$perl" | grep -o '/[^ ]*')
    mapfile -t modules < <(perl -e 'print "$_\n" for @INC' | grep perl-base)
    mkdir -p "$1"
    cp -r --parents -L -t "$1" "$perl" "${libraries[@]}" "${modules[@]}"
}

# python_into FOLDER MODULE…: Debian's Python and sqlite3 in FOLDER, with what these modules and Python's start need. Sets $python.
python_into() {
    local folder=$1 modules binaries libraries
    shift
    python=$(readlink -f "$(command -v python3)")
    mapfile -t modules < <(python3 -S -E -c 'import importlib, encodings.ascii, encodings.idna, sys
for name in sys.argv[1:]: importlib.import_module(name)
for module in list(sys.modules.values()):
    if getattr(module, "__file__", None): print(module.__file__)' "$@")
    mapfile -t binaries < <(echo "$python"; command -v sqlite3; printf '%s\n' "${modules[@]}" | grep '\.so$')
    mapfile -t libraries < <(ldd "${binaries[@]}" | grep -o '/[^ ]*\.so[^ :]*')
    printf '%s\n' "${modules[@]}" "${binaries[@]}" "${libraries[@]}" | sort -u | xargs cp --parents -L -t "$folder"
}

# payload NAME PAYLOAD [OPTION…]: runs a bare-metal payload, which must say that all is well.
payload() {
    local name=$1 binary=$LAB/bin/$2.bin
    shift 2
    timeout --kill-after 10 $LIMIT tagvisor run --name "$name" --no-reboot --flat "$binary" "$@" \
        < /dev/null > "$OUT/$name.console" 2>&1 || fail "$name: tagvisor ended with status $?"
    console_has "$name" 'payload: ok'
    console_lacks "$name" FAIL
}

console_has() {
    grep -qF -- "$2" "$OUT/$1.console" || fail "$1: the console lacks '$2'"
}

console_lacks() {
    if grep -F -- "$2" "$OUT/$1.console"; then
        fail "$1: the console has '$2'"
    fi
}

# refused STATUS TEXT COMMAND…: COMMAND ends with STATUS and its error holds TEXT.
refused() {
    local expected=$1 text=$2 status=0
    shift 2
    timeout 60 "$@" < /dev/null > refused.out 2> refused.err || status=$?
    [ "$status" = "$expected" ] || fail "status $status instead of $expected: $* ($(cat refused.err))"
    grep -qF -- "$text" refused.err || fail "the error of '$*' lacks '$text': $(cat refused.err)"
    echo "refused: $(head -n 1 refused.err)"
}

# wait_for_console NAME TEXT PID: waits until the console has TEXT, while the process PID lives.
wait_for_console() {
    wait_for_console_times "$1" "$2" 1 "$3"
}

# wait_for_console_times NAME TEXT TIMES PID: waits until so many lines of the console have TEXT.
wait_for_console_times() {
    local deadline=$((SECONDS + LIMIT))
    until [ "$(grep -cF -- "$2" "$OUT/$1.console" 2> /dev/null)" -ge "$3" ] 2> /dev/null; do
        [ $SECONDS -lt $deadline ] && kill -0 "$4" 2> /dev/null || fail "$1: the console still lacks '$2'"
        sleep 0.2
    done
}

# ended_as STATUS PID: waits for the end of the process PID, which is to have this status.
ended_as() {
    local status=0
    wait "$2" || status=$?
    [ $status = "$1" ] || fail "a machine ended with status $status instead of $1"
}

# show_vcpus PID: what the host knows of a VM's vCPUs: where their threads are, their interrupts, and the timers that are to wake them.
show_vcpus() {
    local task
    mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug
    for task in /proc/"$1"/task/*; do
        echo "$(cat "$task/comm"): $(cut -d' ' -f3,14,15 "$task/stat") $(cat "$task/wchan")"
    done
    grep -hE 'VCPU|PPI' /sys/kernel/debug/kvm/"$1"-*/vgic-state
    grep -E '^now at' /proc/timer_list
    grep -A 2 'kvm_.*timer' /proc/timer_list
}

# passes_on CONSOLE…: how many passes over all of its memory the tag workload says to have made, on any of these consoles.
passes_on() {
    local made
    made=$(grep -ho 'workload: [0-9]* passes' "$@" 2> /dev/null | tr -cd '0-9\n' | sort -n | tail -n 1) || true
    echo "${made:-0}"
}

# goes_on PID CONSOLE…: the tag workload of the guest, whose console goes to one of these files after the other, goes on: everything is as it
# left it in a pass over all of its memory that it begins from now on.
goes_on() {
    local pid=$1 deadline=$((SECONDS + LIMIT)) said enough
    shift
    # What it said last may be long ago.
    said=$(cat "$@" 2> /dev/null | wc -l) || true
    while [ -z "${enough:-}" ] || [ "$(passes_on "$@")" -lt "$enough" ]; do
        ! grep -h 'workload: difference' "$@" 2> /dev/null || fail 'the guest found a difference'
        if [ $SECONDS -ge $deadline ] || ! kill -0 "$pid" 2> /dev/null; then
            show_vcpus "$pid" || true
            fail "the guest does not go on: $(tail -n 5 "$@")"
        fi
        sleep 0.2
        [ "$(cat "$@" 2> /dev/null | wc -l)" = "$said" ] || enough=${enough:-$(($(passes_on "$@") + 2))}
    done
}

# add_swap: gives the host swap, in compressed memory. For hosts of a script's own.
add_swap() {
    modprobe zram
    echo 256M > /sys/block/zram0/disksize
    mkswap --quiet /dev/zram0
    swapon /dev/zram0
}
