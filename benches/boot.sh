#!/bin/bash
# lab: cpus=2 memory=4G timeout=1500
# From the start of the VMM to the first line of the guest's user space, and the memory of the VMM itself, beside Debian's
# QEMU: same host, kernel, initrd, memory and CPUs, in turn.
set -euo pipefail

. /lab/benches/figures.bash
rounds=${ROUNDS:-5}
cpus=2
memory=512
kernel=/lab/kernels/trixie/Image
initrd=/lab/kernels/trixie/initrd.cpio

tagvisor_run() {
    exec tagvisor run --kernel $kernel --initrd $initrd --cpus $cpus --memory ${memory}M --no-reboot \
        --cmdline "console=ttyS0 quiet -- $*"
}

qemu_run() {
    exec qemu-system-aarch64 -M virt,mte=on,gic-version=3 -accel kvm -cpu host -smp $cpus -m ${memory}M \
        -nographic -nic none -no-reboot -kernel $kernel -initrd $initrd -append "console=ttyAMA0 quiet -- $*"
}

# boot_ms VMM: milliseconds to the guest's first line.
boot_ms() {
    local begun=$EPOCHREALTIME line
    while IFS= read -r line; do
        case $line in
        *'guest: userspace'*) echo $(((${EPOCHREALTIME/./} - ${begun/./}) / 1000)) ;;
        esac
    done < <("$1"_run true < /dev/null 2>&1)
}

# own_kib VMM: KiB resident in the VMM while its guest idles, without what maps the guest's memory.
own_kib() {
    mkfifo lines
    "$1"_run 'echo idle; sleep 1000' < /dev/null > lines 2>&1 &
    local vmm=$! line
    exec 3< lines
    while IFS= read -r line <&3; do
        case $line in *idle*) break ;; esac
    done
    awk -v guest=$((memory * 1024)) '/^Size:/ { size = $2 } /^Rss:/ { if (size < guest) sum += $2 } END { print sum }' \
        /proc/$vmm/smaps
    kill -KILL $vmm
    wait $vmm 2> /dev/null || true
    exec 3<&-
    rm lines
}

cd "$(mktemp -d)"
# The first start of each reads files that later ones find in memory.
boot_ms tagvisor > /dev/null
boot_ms qemu > /dev/null
for ((round = 0; round < rounds; round++)); do
    tagvisor_ms+=("$(boot_ms tagvisor)")
    qemu_ms+=("$(boot_ms qemu)")
done
tagvisor_median=$(median "${tagvisor_ms[@]}")
qemu_median=$(median "${qemu_ms[@]}")

echo "Start of the VMM to the guest's first line ($cpus CPUs, $memory MiB, MTE, $rounds runs each, in turn)"
echo "  Tagvisor       median $tagvisor_median ms   (${tagvisor_ms[*]})"
echo "  QEMU           median $qemu_median ms   (${qemu_ms[*]})   $(qemu-system-aarch64 --version | head -n 1)"
goal 'Tagvisor over QEMU' "$(ratio "$tagvisor_median" "$qemu_median")" 0.800
echo 'Resident memory of the VMM beyond the guest, guest idle'
goal 'Tagvisor, KiB' "$(own_kib tagvisor)" 5120
printf '  %-52s %8s\n' 'QEMU, KiB' "$(own_kib qemu)"
echo 'Size of the program, statically linked, as it is released'
goal 'tagvisor, KiB' "$(ratio "$(stat -c %s "$(command -v tagvisor)")" 1024)" 8192
exit $missed
