#!/usr/bin/env bash
# KD from stored logits against KD by the teacher itself: held-out KL of the refined way (Muon, plateau and decay) of
# recipes/tables/proof-NAME.toml, one seed, everything else equal.
#   recipes/offline.sh TEACHERS DATA OUT [K ..] [-- KEY=VALUE ..]
# TEACHERS, DATA: as recipes/tables.sh has them. OUT: where logits and runs are kept; what is there is not made again. K: tokens that are
# stored of each place [default: 64]. SEED: of the runs [default: 0]. NAMES: of the teachers [default: both].
# Settings behind -- replace those of the recipe (kd.train.tokens=500000).
set -euo pipefail
teachers=$1 data=$2 out=$3
shift 3
stored=() settings=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do stored+=("$1") && shift; done
[ $# -eq 0 ] || shift
for setting in "$@"; do settings+=(--set "$setting"); done
[ ${#stored[@]} -gt 0 ] || stored=(64)
repo=$(cd "$(dirname "$0")/.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
out=$(mkdir -p "$out" && cd "$out" && pwd)

for name in ${NAMES:-stories260K babyllama-1m-char}; do
  recipe=$repo/recipes/tables/proof-$name.toml
  read -r ild muon half < <(sed -n \
    's/.*"refined, Muon".*ild.train.lr = \([^,]*\), .* lr = \([^,]*\), adamw_lr = \([^ ]*\) .*/\1 \2 \3/p' "$recipe")
  ways='{ name = "the teacher itself" }'
  for k in "${stored[@]}"; do
    logits=$out/logits-$name-$k
    [ -d "$logits" ] || "$zebroid" teach "$teachers/$name" "$logits" --data "$data/train.jsonl" --top-k "$k"
    ways+=", { name = \"$k stored\", kd.teacher_logits = \"$logits\" }"
  done
  echo "== $name"
  "$zebroid" run "$recipe" --out "$out/$name" --teacher "$teachers/$name" --train "$data/train.jsonl" \
    --validation "$data/validation.jsonl#1/3" --set "sweep=[[$ways]]" --set seed="${SEED:-0}" --set init=refined \
    --set ild.objective.loss=relative_mse --set ild.train.lr="$ild" --set kd.train.lr="$muon" --set kd.train.adamw_lr="$half" \
    --set kd.train.optimizer=muon --set kd.train.lr_scheduler=wsd "${settings[@]}"
done
