#!/bin/bash
# The core of a machine that runs on meanwhile (`--live`), read by binutils' readelf: it has a thread for each vCPU, and beside each
# piece of memory the tags that `tags dump` says.
. "$(dirname "$0")/guests.bash"

# A guest that has filled its memory with random data and tags, and now prints lines: tags stay as they are while it runs.
tagvisor run --name web --flat "$LAB/bin/fill.bin" --cpus 1 --memory 64M --no-reboot --cmdline 'size=all tags=random' \
    --console "file=$OUT/web.console" < /dev/null 2> web.err &
machine=$!
wait_for_console web ' pages' $machine

lines() {
    wc -l < "$OUT/web.console"
}

before=$(lines)
tagvisor core web live.core --live --json > summary
[ "$(lines)" -gt "$before" ] || fail 'the guest stood still while its core was made'
tagvisor info web | grep -q '^state  *Running' || fail "it does not run: $(tagvisor info web)"
jq -e '.tags and .vcpus == 1 and .pages > 16000 and .segments > 0' summary > answer || fail "the core is another: $(cat summary)"

readelf --notes --wide live.core > notes 2>&1
[ "$(grep -c NT_PRSTATUS notes)" = 1 ] || fail "readelf sees other threads: $(cat notes)"
readelf --segments --wide live.core > segments 2> segments.err
[ ! -s segments.err ] || fail "readelf complains: $(cat segments.err)"
cat segments
[ "$(grep -c ' LOAD ' segments)" = "$(jq .segments summary)" ] || fail 'readelf sees other memory'
[ "$(grep -c ' AARCH64_MEMTAG' segments)" = "$(jq .segments summary)" ] || fail 'readelf sees other tags'

# Kind, offset, virtual and physical address, size in the file and in memory.
while read -r kind offset address _ size covered _; do
    [ "$kind" = AARCH64_MEMTAG ] || continue
    dd if=live.core iflag=skip_bytes,count_bytes,fullblock bs=1M skip=$((offset)) count=$((size)) status=none > in.core
    tagvisor tags dump web --live --range "$address+$covered" --format binary > seen
    cmp in.core seen || fail "the tags from $address on are others"
    compared=$((${compared:-0} + size))
done < segments
# 128 bytes of packed tags a page.
[ "$((compared / 128))" -ge "$(jq .pages summary)" ] || fail "tags of $compared bytes were compared alone"
[ "$(tr -d '\0' < in.core | wc -c)" -gt 0 ] || fail 'there are no tags but 0'
echo "$compared bytes of tags in the core are those of the machine"

tagvisor stop web
ended_as 3 $machine
