#!/usr/bin/env bash
# Held-out KL of untrained hybrids, published against refined initialisation (docs/results.md, claim 1).
#   recipes/untrained.sh TEACHERS DATA     folders with stories260K, babyllama-1m-char; train, validation.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
teachers=$1 data=$2
cargo build --release --quiet
zebroid=target/release/zebroid
mkdir -p runs/untrained
while read -r teacher kv rope; do
  for seed in 0 1 2; do
    for init in reference refined; do
      out=runs/untrained/$teacher-$init-$seed
      $zebroid compose "$teachers/$teacher" "$out" --force --mla 2 --kv-rank "$kv" --rope-dim "$rope" \
        --init $init --seed $seed --calibration "$data/train.jsonl" > /dev/null
      echo "$teacher $init seed $seed" \
        "$($zebroid eval kl --teacher "$teachers/$teacher" --student "$out" --data "$data/validation.jsonl" --json | grep '"kl"')"
    done
  done
done << LIST
stories260K 8 4
babyllama-1m-char 16 8
LIST
