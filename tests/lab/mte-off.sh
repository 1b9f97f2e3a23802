#!/bin/bash
# With --mte off a guest sees no MTE, and the MTE registers are undefined to it.
. "$(dirname "$0")/guests.bash"

linux_succeeds off trixie --mte off -- mte-checks absent
payload registers-off mte-registers --cpus 2 --cmdline mte=off --mte off
