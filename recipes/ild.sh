#!/usr/bin/env bash
# ILD banks from either initialisation, 400 k tokens each (docs/results.md, claim 2): tokens that the refined one
# needs to reach the published one's last loss (means over 10 steps).
#   recipes/ild.sh TEACHERS DATA [SEEDS]
set -euo pipefail
cd "$(dirname "$0")/.."
teachers=$1 data=$2 seeds=${3:-0}
cargo build --release --quiet
# What another program made is not used: folders are named by what this one computes.
runs=runs/ild/$(target/release/zebroid --version | grep -o '[0-9a-f]\{16\}')
mkdir -p "$runs"
while read -r teacher kv rope lr; do
  for seed in $seeds; do
    for init in reference refined; do
      out=$runs/$teacher-$init-$seed
      [ -d "$out" ] || target/release/zebroid train ild --teacher "$teachers/$teacher" --data "$data/train.jsonl" "$out" \
        --kv-rank "$kv" --rope-dim "$rope" --tokens 400000 --lr "$lr" --init $init --seed "$seed"
    done
    python3 - "$runs/$teacher-reference-$seed" "$runs/$teacher-refined-$seed" <<'PY'
import json, sys
lines = [[json.loads(l) for l in open(f + "/metrics.jsonl")] for f in sys.argv[1:]]
for name in ("mla", "mamba2"):
    smooth = [[sum(m[name] for m in run[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(run))] for run in lines]
    goal = smooth[0][-1]
    reached = next((m["tokens"] for m, s in zip(lines[1], smooth[1]) if s <= goal), None)
    print(sys.argv[1], name, f"published at {lines[0][-1]['tokens']}: {goal:.4f}; refined there after {reached}, ends at {smooth[1][-1]:.4f}")
PY
  done
done << LIST
stories260K 8 4 6e-3
babyllama-1m-char 16 8 2e-3
LIST
