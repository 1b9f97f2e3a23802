#!/bin/bash
# `tagvisor check` finds MTE on this host, and the way to reach tags.
. "$(dirname "$0")/guests.bash"

tagvisor check
tagvisor check --json > check.json
python3 - << 'END'
import json
report = json.load(open("check.json"))
findings = {finding["id"]: finding for finding in report["findings"]}
assert report["mte_guests"] is True
assert findings["mte"]["value"].startswith("MTE3")
assert findings["tag-access"]["value"].startswith("alias")
assert findings["transparent-huge-pages"]["available"] is True
assert findings["userfaultfd-minor"]["available"] is True
assert all(finding["meaning"] for finding in report["findings"])
END
