#!/bin/bash
# Debian's kernels of two releases boot as guests with MTE, and the workload finds every tag where it left it.
. "$(dirname "$0")/guests.bash"

linux_succeeds workload-6.12 trixie --cpus 2 -- tag-workload --passes 3
console_has workload-6.12 ' 0 differences'
linux_succeeds workload-6.1 bookworm --cpus 2 -- tag-workload --passes 1
console_has workload-6.1 ' 0 differences'
