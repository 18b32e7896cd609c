#!/usr/bin/env bash
# The whole recipe at 2 M tokens, 20 % ILD and 80 % KD, from either initialisation (docs/results.md, claim 3).
# published: its initialisation and its un-squared L2 losses; refined: ours and relative errors. Same data, batch,
# learning rates, tokens.
#   recipes/recipe.sh TEACHERS DATA [SEEDS]
set -euo pipefail
cd "$(dirname "$0")/.."
teachers=$1 data=$2 seeds=${3:-0}
cargo build --release --quiet
zebroid=target/release/zebroid
mkdir -p runs/recipe
while read -r teacher kv rope lr lr_ild; do
  for seed in $seeds; do
    for way in published refined; do
      out=runs/recipe/$teacher-$way-$seed
      case $way in
        published) init=(--init reference --loss l2-norm) ;;
        refined) init=(--init refined --loss relative-mse) ;;
      esac
      sizes=(--kv-rank "$kv" --rope-dim "$rope")
      [ -d "$out-bank" ] || $zebroid train --stage ild --teacher "$teachers/$teacher" --data "$data/train.jsonl" \
        "$out-bank" "${sizes[@]}" "${init[@]}" --tokens 400000 --lr "$lr_ild" --seed "$seed" 2> /dev/null
      $zebroid compose "$teachers/$teacher" "$out-hybrid" --force --mla 2 "${sizes[@]}" --bank "$out-bank" > /dev/null
      [ -d "$out" ] || $zebroid train --stage kd --teacher "$teachers/$teacher" --student "$out-hybrid" \
        --data "$data/train.jsonl" "$out" --tokens 1600000 --lr "$lr" --seed "$((seed + 1))" 2> /dev/null
      for stage in -hybrid ""; do
        echo "$teacher $way seed $seed ${stage:--distilled}" \
          "$($zebroid eval kl --teacher "$teachers/$teacher" --student "$out$stage" --data "$data/validation.jsonl" --json | tr -d '\n')"
      done
    done
  done
done << LIST
stories260K 8 4 3e-3 6e-3
babyllama-1m-char 16 8 1e-3 2e-3
LIST
