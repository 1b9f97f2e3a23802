#!/bin/bash
# A guest's MTE does what the architecture says: faults of each kind, IRG under each vCPU's own mask, TFSRs apart.
. "$(dirname "$0")/guests.bash"

linux_succeeds checks trixie --cpus 4 -- mte-checks
console_lacks checks FAIL
payload registers mte-registers --cpus 4 --cmdline mte=on
# The level by name, and the other way to the tags.
payload registers-mte3 mte-registers --cpus 2 --cmdline mte=on --mte 3 --tag-access ioctl
