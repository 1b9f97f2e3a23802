#!/bin/bash
# lab: kernel=bookworm
# On a host with Linux 6.1, which refuses shared memory to guests with MTE, they run on private memory and the kernel
# copies their tags; what then is impossible is refused.
. "$(dirname "$0")/guests.bash"

tagvisor check
tagvisor check --json | grep -q '"ioctl: KVM_ARM_MTE_COPY_TAGS' || fail 'tags are not reached by the ioctl'
refused 1 '--tag-access alias: this host' tagvisor run --flat "$LAB/bin/boot.bin" --tag-access alias
linux_succeeds old trixie --cpus 2 -- mte-checks
console_lacks old FAIL
payload registers mte-registers --cpus 2 --cmdline mte=on
