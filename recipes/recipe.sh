#!/usr/bin/env bash
# The whole recipe at 2 M tokens, 20 % ILD and 80 % KD (docs/results.md, claim 3).
# published: its initialisation, un-squared L2 norms, AdamW with a cosine; refined: ours, relative errors, for KD Muon with
# warm-up, plateau and decay. Same data, batch, tokens and layer plan; each way has the best of the learning rates that were
# tried (docs/log.md).
#   recipes/recipe.sh TEACHERS DATA [SEEDS]
set -euo pipefail
cd "$(dirname "$0")/.."
teachers=$1 data=$2 seeds=${3:-0 1 2}
cargo build --release --quiet
zebroid=target/release/zebroid
# What another program made is not used: folders are named by what this one computes.
out=runs/recipe/$($zebroid --version | grep -o '[0-9a-f]\{16\}')
mkdir -p "$out"
while read -r teacher kv rope way lr_ild kd; do
  case $way in
    published) init=(--init reference --loss l2-norm) ;;
    refined) init=(--init refined --loss relative-mse) ;;
  esac
  for seed in $seeds; do
    run=$out/$teacher-$way-$seed
    common=(--teacher "$teachers/$teacher" --data "$data/train.jsonl")
    [ -d "$run-bank" ] || $zebroid train --stage ild "${common[@]}" "$run-bank" --kv-rank "$kv" --rope-dim "$rope" \
      "${init[@]}" --tokens 400000 --lr "$lr_ild" --seed "$seed" 2> /dev/null
    [ -d "$run-hybrid" ] || $zebroid compose "$teachers/$teacher" "$run-hybrid" --mla 2 --kv-rank "$kv" --rope-dim "$rope" \
      --bank "$run-bank" > /dev/null
    [ -d "$run" ] || $zebroid train --stage kd "${common[@]}" --student "$run-hybrid" "$run" $kd --tokens 1600000 \
      --seed "$((seed + 10))" --validation "$data/validation.jsonl" --eval-every 26 2> /dev/null
    for stage in -hybrid ""; do
      echo "$teacher $way seed $seed ${stage:--distilled}" \
        "$($zebroid eval kl --teacher "$teachers/$teacher" --student "$run$stage" --data "$data/validation.jsonl" --json | tr -d '\n')"
    done
  done
done << LIST
stories260K 8 4 published 6e-3 --lr 3e-3
stories260K 8 4 refined 6e-3 --optimizer muon --lr-scheduler wsd --lr 1.5e-3 --adamw-lr 5e-4
babyllama-1m-char 16 8 published 2e-3 --lr 5e-4
babyllama-1m-char 16 8 refined 1e-3 --optimizer muon --lr-scheduler wsd --lr 5e-4 --adamw-lr 2.5e-4
LIST
for teacher in stories260K babyllama-1m-char; do
  runs=()
  for way in published refined; do
    for seed in $seeds; do
      run=$out/$teacher-$way-$seed
      [ -d "$run" ] && runs+=("$way, seed $seed=$run")
    done
  done
  $zebroid plot "docs/kl-$teacher.svg" --metric eval_kl --title "$teacher: held-out KL (nats/token) over KD tokens, after 0.4 M of ILD" "${runs[@]}"
done
