#!/bin/bash
# A machine's life: names, resets, signals, typing, exit statuses, and nothing left behind.
. "$(dirname "$0")/guests.bash"

kernel=(--kernel "$LAB/kernels/trixie/Image" --initrd "$LAB/kernels/trixie/initrd.cpio")

# endless NAME: a machine that runs until it is ended, as process $machine.
endless() {
    tagvisor run --name "$1" "${kernel[@]}" --console "file=$OUT/$1.console" \
        --cmdline 'console=ttyS0 quiet -- echo ready; sleep 100000' < /dev/null 2> "$1.err" &
    machine=$!
    wait_for_console "$1" ready $machine
}

# ended STATUS: $machine ends with it. If it does not, what its threads wait for is of more use than the test's limit.
ended() {
    local status=0 deadline=$((SECONDS + 120))
    while kill -0 $machine 2> /dev/null && [ "$(cut -d ' ' -f 3 /proc/$machine/stat 2> /dev/null)" != Z ]; do
        [ $SECONDS -lt $deadline ] || fail "it does not end: $(head -v -n 20 /proc/$machine/task/*/{comm,wchan,stack})"
        sleep 0.1
    done
    wait $machine || status=$?
    [ $status = "$1" ] || fail "status $status instead of $1"
}

endless web
refused 1 'name `web` is in use' tagvisor run --name web --flat "$LAB/bin/boot.bin"
cat /proc/$machine/task/*/comm > threads
grep -qx tv-vcpu0 threads || fail "no thread is called tv-vcpu0: $(cat threads)"
kill -TERM $machine
ended 3
[ ! -e /run/tagvisor/web ] || fail 'the runtime directory is left behind'

# Killed outright, it leaves its directory; the name is free for the next all the same.
endless web
kill -KILL $machine
ended 137
payload web boot

# A guest that resets its machine starts over.
tagvisor run "${kernel[@]}" --console "file=$OUT/again.console" \
    --cmdline 'console=ttyS0 quiet -- echo started; reboot -f; sleep 100' < /dev/null 2> again.err &
machine=$!
wait_for_console_times again started 2 $machine
kill -HUP $machine
ended 3
linux once trixie -- 'reboot -f; sleep 100' || fail "status $? after a reset with --no-reboot"

# Typed input reaches a guest that waits for it, more of it than the serial port's buffer holds.
mkfifo keys
tagvisor run "${kernel[@]}" --no-reboot --cmdline 'console=ttyS0 quiet' < keys > "$OUT/typed.console" 2>&1 &
machine=$!
exec 3> keys
wait_for_console typed '~ #' $machine
long=$(printf '%0400d' 0)
printf 'echo heard-$((6 * 7))-%s-whole; exit\n' "$long" >&3
ended 0
exec 3>&-
console_has typed "heard-42-$long-whole"
console_has typed 'guest: exit 0'

# A fault of the VMM gives the terminal back as it was.
cat > fault.py << 'END'
import os, pty, signal, subprocess, sys, termios
user, terminal = pty.openpty()
before = termios.tcgetattr(terminal)
vmm = subprocess.Popen(sys.argv[1:], stdin=terminal, stdout=terminal, stderr=terminal)
seen = b""
while b"~ #" not in seen:
    seen += os.read(user, 4096)
assert termios.tcgetattr(terminal) != before, "the terminal is not in raw mode"
vmm.send_signal(signal.SIGBUS)
assert vmm.wait() == -signal.SIGBUS, vmm.returncode
assert termios.tcgetattr(terminal) == before, "the terminal is left in raw mode"
END
python3 fault.py tagvisor run "${kernel[@]}" --cmdline 'console=ttyS0 quiet'

payload crowd boot --cpus 8
console_has crowd '8 vCPUs'
