#!/bin/bash
# lab: timeout=900
# Debian's gdb and lldb on a guest that runs: registers, breakpoints, steps, watchpoints and memory tags; the guest goes on as if
# nothing had been, also when a client sends garbage or vanishes; a tag that gdb changes is one that the guest's program dies of; and
# gdb is told how a machine ended, and finds the next one.
. "$(dirname "$0")/guests.bash"

# A program with a tagged heap, which says where a piece of it is, looks at it again and again, and says so. Its kernel has a
# probe where it writes: a BRK of the guest's own.
perl_into guest
cat > guest/beat.pl << 'END'
$| = 1;
my $text = "tagged heap " x 100;
printf "buffer %#x\n", unpack("Q", pack("p", $text));
for (my $beat = 1;; $beat++) {
    print "beat $beat ", substr($text, 0, 6), "\n";
    select undef, undef, undef, 0.2;
}
END
cat > guest/work << END
grep -E ' (__arm64_sys_pselect6|jiffies_64)\$' /proc/kallsyms
mount -t tracefs tracefs /sys/kernel/tracing
cd /sys/kernel/tracing
echo 'p:written __arm64_sys_write' > kprobe_events
echo 1 > events/kprobes/written/enable
(while :; do sed 's/^/kprobe /' kprobe_profile; sleep 1; done) &
export GLIBC_TUNABLES=glibc.mem.tagging=3
mte-checks tag-fault $perl /beat.pl
END
initrd_with trixie guest

tagvisor run --name web --cpus 2 --memory 256M --no-reboot --kernel "$LAB/kernels/trixie/Image" --initrd guest.initrd \
    --cmdline 'console=ttyS0 quiet panic=-1 -- sh /work' --console "file=$OUT/web.console" < /dev/null 2> web.err &
machine=$!
wait_for_console web 'beat 2 tagged' $machine
symbol() {
    sed -n "s/^\([0-9a-f]*\) . $1\r*\$/0x\1/p" "$OUT/web.console"
}
select=$(symbol __arm64_sys_pselect6)
jiffies=$(symbol jiffies_64)
buffer=$(sed -n 's/^buffer \(0x[0-9a-f]*\)\r*$/\1/p' "$OUT/web.console")
granule=$(printf '%#x' $((buffer & ~15)))
tag=$(printf '%x' $((buffer >> 56 & 15)))
# Two that it does not have.
first=$(printf '%x' $((0x$tag ^ 1)))
second=$(printf '%x' $((0x$tag ^ 2)))
echo "pselect6 $select, jiffies $jiffies, buffer $buffer"

# hits: how often the probe was come to, as the guest said last.
hits() {
    sed -n 's/^kprobe *written *\([0-9]*\) .*/\1/p' "$OUT/web.console" | tail -n 1
}

# beats_on WHO: the guest's program goes on.
beats_on() {
    local before
    before=$(grep -c '^beat' "$OUT/web.console")
    wait_for_console web "beat $((before + 3)) tagged" $machine
    echo "after $1 the guest goes on"
}

# gdb_does NAME: what standard input says is done by gdb.
gdb_does() {
    { printf 'set pagination off\nset confirm off\nset remotetimeout 60\nset trace-commands on\n'; cat; } > "$1.gdb"
    timeout $LIMIT gdb -nx -q -batch -x "$1.gdb" > "$OUT/$1.gdb.out" 2>&1 ||
        fail "$1: gdb ended with status $?: $(tail -n 20 "$OUT/$1.gdb.out")"
}
says() {
    grep -qE -- "$2" "$OUT/$1.gdb.out" || fail "$1: gdb does not say '$2': $(cat "$OUT/$1.gdb.out")"
}

refused 1 'could read and change all of the guest' tagvisor gdb web --listen tcp://0.0.0.0:0
tagvisor gdb web --listen "unix:$PWD/gdb.sock"
tagvisor gdb web --listen tcp://127.0.0.1:0 --json > listen.json
[ ! -e gdb.sock ] || fail 'the door before is still there'
port=$(jq -r .listen listen.json | sed 's/.*://')

wait_for_console web 'written ' $machine
before=$(hits)
gdb_does session << END
target remote 127.0.0.1:$port
info threads
info registers pc sp cpsr
info registers SCTLR_EL1 TTBR0_EL1 GCR_EL1 tag_ctl
hbreak *$select
continue
printf "at the hardware breakpoint: %d\n", \$pc == $select
info registers pc ESR_EL1 v0
x/2i \$pc
x/s $buffer
delete
stepi
printf "one instruction on: %d\n", \$pc == $select + 4
memory-tag print-logical-tag $buffer
memory-tag print-allocation-tag $buffer
memory-tag check $buffer
memory-tag with-logical-tag $buffer 0a
memory-tag set-allocation-tag $granule 32 0${first}0$second
memory-tag print-allocation-tag $granule
memory-tag print-allocation-tag $granule + 16
memory-tag check $buffer
memory-tag set-allocation-tag $granule 32 0$tag
memory-tag check $buffer
break *$select
continue
printf "at the software breakpoint: %d\n", \$pc == $select
x/1xw $select
continue
printf "at it again: %d\n", \$pc == $select
continue 4
printf "four times more: %d\n", \$pc == $select
stepi
printf "stepped off it: %d\n", \$pc == $select + 4
delete
watch *(unsigned long *)$jiffies
continue
info threads
delete
detach
END
cat "$OUT/session.gdb.out"
says session 'Thread 1\.1 .*vCPU 0'
says session 'Thread 1\.2 .*vCPU 1'
says session '^tag_ctl +0x'
says session '^at the hardware breakpoint: 1'
says session "\"tagged heap tagged"
says session '^one instruction on: 1'
says session "^\\\$[0-9]+ = 0x$tag\$"
says session 'Memory tags for address .* match'
says session '^\$[0-9]+ = .* 0xa0'
says session 'Allocation tag\(s\) updated successfully'
says session "^\\\$[0-9]+ = 0x$first\$"
says session "^\\\$[0-9]+ = 0x$second\$"
says session "Logical tag .* does not match the allocation tag \(0x$first\)"
says session '^at the software breakpoint: 1'
says session '^at it again: 1'
says session '^four times more: 1'
says session '^stepped off it: 1'
says session 'Hardware watchpoint .*jiffies|Hardware watchpoint [0-9]+: \*\(unsigned long'
says session '^New value = [0-9]+'
says session 'detached\]'
beats_on 'a session'
sleep 2
[ "$(hits)" -gt "$before" ] || fail "the guest's probe was hit $before times before gdb came and $(hits) times since"

# Garbage, and clients that vanish: with a breakpoint set, at the breakpoint, while the guest runs.
head -c 100000 /dev/urandom | timeout 20 socat - "TCP:127.0.0.1:$port" > /dev/null || true
beats_on garbage
cat > vanish.py << 'END'
import socket, sys
port, address, then = int(sys.argv[1]), sys.argv[2][2:], sys.argv[3:]
client = socket.create_connection(("127.0.0.1", port))
client.settimeout(100)
def say(body):
    client.sendall(b"$%s#%02x" % (body.encode(), sum(body.encode()) % 256))
def hear():
    seen = b""
    while b"#" not in seen[:-2]:
        seen += client.recv(1)
    return seen
say("QStartNoAckMode"); assert b"OK" in hear()
say(f"Z0,{address},4"); assert b"OK" in hear()
say("vCont;c")
if "stopped" in then:
    assert b"T05" in hear()
print("gone", flush=True)
END
python3 vanish.py "$port" "$select"
beats_on 'a client that vanished while the guest ran'
python3 vanish.py "$port" "$select" stopped
beats_on 'a client that vanished at its breakpoint'

# While a debugger has the machine nobody else does.
mkfifo hold
gdb -nx -q -batch -ex 'set remotetimeout 60' -ex "target remote 127.0.0.1:$port" -ex 'shell cat hold' -ex detach > hold.out 2>&1 &
holder=$!
until tagvisor info web | grep -q 'a debugger has it'; do
    kill -0 $holder || fail "gdb ended: $(cat hold.out)"
    sleep 0.2
done
refused 1 'a debugger has the VM' tagvisor snapshot web file
refused 1 'a debugger has the VM' tagvisor resume web
refused 1 'a debugger has the VM' tagvisor migrate web tcp://127.0.0.1:1
echo > hold
wait $holder
beats_on 'a debugger that held it'

# lldb.
cat > session.lldb << END
settings set plugin.process.gdb-remote.packet-timeout 100
gdb-remote 127.0.0.1:$port
thread list
register read TTBR0_EL1
breakpoint set -H -a $select
continue
memory read -c 12 $buffer
memory tag read $granule
memory tag write $granule $((0x$first))
memory tag read $granule
memory tag write $granule $((0x$tag))
memory tag read $granule
breakpoint delete --force
thread step-inst
detach
END
timeout $LIMIT lldb --no-lldbinit --no-use-colors --batch --source session.lldb > "$OUT/lldb.out" 2>&1 || fail "lldb ended with status $?: $(cat "$OUT/lldb.out")"
cat "$OUT/lldb.out"
lldb_says() {
    grep -qE -- "$1" "$OUT/lldb.out" || fail "lldb does not say '$1'"
}
lldb_says 'thread #2: .*tid = 0x0002'
lldb_says '^ *TTBR0_EL1 = 0x'
lldb_says 'stop reason = breakpoint 1\.'
lldb_says ' tagged heap'
mapfile -t tags < <(sed -n 's/^\[.*): \(0x[0-9a-f]*\).*/\1/p' "$OUT/lldb.out")
[ "${tags[*]}" = "0x$tag 0x$first 0x$tag" ] || fail "lldb sees the tags ${tags[*]}"
beats_on lldb

# A tag that gdb changes is one that the guest's program dies of. gdb stays until the machine is switched off.
gdb_does kill << END
target remote 127.0.0.1:$port
hbreak *$select
continue
memory-tag set-allocation-tag $granule 16 0$first
delete
continue
END
ended_as 0 $machine
console_has web 'guest: exit 0'
says kill 'the guest switched its machine off'
says kill 'exited normally'

# A machine that is reset starts over without its debugger, who finds it at the same address. This one does nothing but reset itself.
tagvisor run --name again --flat "$LAB/bin/tag-fault.bin" --console "file=$OUT/again.console" < /dev/null 2> again.err &
machine=$!
wait_for_console again 'tag-fault: pointer' $machine
tagvisor gdb again --listen "unix:$PWD/gdb.sock"
gdb_does reset << END
target remote $PWD/gdb.sock
continue
target remote $PWD/gdb.sock
continue
END
[ "$(grep -c 'come again at the same address' "$OUT/reset.gdb.out")" = 2 ] || fail "gdb was not told of two resets: $(cat "$OUT/reset.gdb.out")"
seen=$(grep -c 'tag-fault: pointer' "$OUT/again.console")
wait_for_console_times again 'tag-fault: pointer' $((seen + 2)) $machine
tagvisor stop again
ended_as 3 $machine
