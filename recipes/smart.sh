#!/usr/bin/env bash
# SMART's placement of one MLA layer against the uniform and the worst one (docs/results.md, claim 4): from the banks of
# recipes/recipe.sh, the same 0.4 M tokens of KD for each.
#   recipes/smart.sh TEACHERS DATA [SEEDS]
set -euo pipefail
cd "$(dirname "$0")/.."
teachers=$1 data=$2 seeds=${3:-0 1 2}
cargo build --release --quiet
zebroid=target/release/zebroid
# What another program made is not used: folders are named by what this one computes.
numerics=$($zebroid --version | grep -o '[0-9a-f]\{16\}')
out=runs/smart/$numerics
mkdir -p "$out"
while read -r teacher kv rope rates; do
  for seed in $seeds; do
    bank=runs/recipe/$numerics/$teacher-refined-$seed-bank scores=$out/$teacher-$seed.json
    base=(--teacher "$teachers/$teacher")
    [ -f "$scores" ] || $zebroid select "${base[@]}" --bank "$bank" --data "$data/validation.jsonl" --count 1 --tokens 32768 \
      --save-scores "$scores" > /dev/null 2>&1
    # The lowest score of all: the worst placement.
    list=$(grep -o '"score": [-0-9.e]*' "$scores" | cut -d' ' -f2)
    worst=$(echo "$list" | awk 'NR == 1 || $1 < least { least = $1; at = NR - 1 } END { print at }')
    for method in smart uniform worst; do
      place=$worst
      [ $method = worst ] || place=$($zebroid select --scores "$scores" --count 1 --method $method | tail -n 1 | cut -d' ' -f2)
      run=$out/$teacher-$seed-$place
      [ -d "$run-hybrid" ] || $zebroid compose "$teachers/$teacher" "$run-hybrid" --mla "$place" --kv-rank "$kv" --rope-dim "$rope" \
        --bank "$bank" > /dev/null
      [ -d "$run" ] || $zebroid train --stage kd "${base[@]}" --student "$run-hybrid" --data "$data/train.jsonl" "$run" \
        --optimizer muon --lr-scheduler wsd $rates --tokens 400000 --seed "$((seed + 20))" 2> /dev/null
      kl() { $zebroid eval kl "${base[@]}" --student "$1" --data "$data/validation.jsonl" --json 2> /dev/null | grep -o '"kl": [0-9.]*' | cut -d' ' -f2; }
      echo "$teacher seed $seed $method: layer $place, KL after ILD $(kl "$run-hybrid"), after KD $(kl "$run")"
    done
    echo "$teacher seed $seed scores:" $list
  done
done << LIST
stories260K 8 4 --lr 1.5e-3 --adamw-lr 5e-4
babyllama-1m-char 16 8 --lr 5e-4 --adamw-lr 2.5e-4
LIST
