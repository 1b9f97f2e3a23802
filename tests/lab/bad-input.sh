#!/bin/bash
# What cannot be is refused: what failed, on what, why, what to do; status 1 or 2; nothing left behind.
. "$(dirname "$0")/guests.bash"

flat=$LAB/bin/boot.bin
image=$LAB/kernels/trixie/Image
initrd=$LAB/kernels/trixie/initrd.cpio
run=(tagvisor run --name bad)

refused 1 'cannot open /dev/no-kvm' "${run[@]}" --kvm /dev/no-kvm --flat "$flat"
refused 1 'is no KVM device' "${run[@]}" --kvm /dev/null --flat "$flat"
refused 1 'nothing to start' "${run[@]}"
refused 2 'cannot be used with' "${run[@]}" --flat "$flat" --kernel "$image"
refused 1 'not an arm64 Linux kernel' "${run[@]}" --kernel /bin/ls
refused 1 'kernel /no/such: No such file' "${run[@]}" --kernel /no/such
refused 1 'kernel /tmp: is a directory' "${run[@]}" --kernel /tmp
truncate -s 1G big.cpio
refused 1 'initrd big.cpio: it ends' "${run[@]}" --kernel "$image" --initrd big.cpio
mkfifo pipe
refused 1 'kernel pipe: ' "${run[@]}" --kernel pipe
: > empty
refused 1 'kernel empty: ' "${run[@]}" --kernel empty
refused 1 'initrd empty: ' "${run[@]}" --kernel "$image" --initrd empty
refused 1 '2047' "${run[@]}" --kernel "$image" --cmdline "$(printf '%02048d' 0)"
refused 1 'must be a multiple of 4096 bytes' "${run[@]}" --flat "$flat" --memory 67108865B
refused 1 'and more than none' "${run[@]}" --flat "$flat" --memory 0
refused 1 'the device tree alone takes' "${run[@]}" --flat "$flat" --memory 1M
refused 1 'this host gives a guest at most' "${run[@]}" --flat "$flat" --memory 8192T
refused 1 '--cpus 100000: this host gives a guest 1 to' "${run[@]}" --flat "$flat" --cpus 100000
refused 1 '--cpus 0' "${run[@]}" --flat "$flat" --cpus 0
refused 1 'a guest with --mte off has no tags' "${run[@]}" --flat "$flat" --mte off --tag-access ioctl
refused 1 'this host offers MTE3' "${run[@]}" --flat "$flat" --mte 2
refused 2 'expected `off`, `on`' "${run[@]}" --flat "$flat" --mte maybe
refused 1 'refuses them to a guest with MTE' "${run[@]}" --flat "$flat" --huge-pages

refused 1 'missing.img' "${run[@]}" --flat "$flat" --disk missing.img
head -c 1000 /dev/zero > odd.img
refused 1 'multiple of 512' "${run[@]}" --flat "$flat" --disk odd.img
truncate -s 1M locked.img
refused 1 'locked.img' "${run[@]}" --flat "$flat" --disk locked.img --disk locked.img
refused 1 'ip tuntap add dev' "${run[@]}" --flat "$flat" --net no-tap
refused 2 'unknown option `read-only`' "${run[@]}" --flat "$flat" --disk locked.img,read-only

printf 'flat = "%s"\nmemroy = "1G"\n' "$flat" > misspelt.toml
refused 1 'did you mean `memory`?' "${run[@]}" --config misspelt.toml
refused 1 'name `a/b`' tagvisor run --name a/b --flat "$flat"
refused 2 "unexpected argument '--memroy'" "${run[@]}" --memroy 1G

# A configuration that is right, and the command line before it.
printf '{"flat": "%s", "cpus": 3, "memory": "64M", "no-reboot": true, "name": "configured"}\n' "$flat" > good.json
tagvisor run --config good.json --cpus 2 < /dev/null > "$OUT/configured.console" 2>&1
console_has configured '2 vCPUs'

[ -z "$(ls -A /run/tagvisor)" ] || fail "left behind: $(ls -A /run/tagvisor)"
