#!/usr/bin/env bash
# SMART's placement of one MLA layer against the uniform and the worst one (docs/results.md, claim 4): one bank of the refined way, then
# the same 0.4 M tokens of KD for each placement, with the rates of recipes/proof.rates (recipes/proof.sh finds them).
#   recipes/smart.sh TEACHERS DATA OUT "stories260K babyllama-1m-char embedded" [SEEDS]
# TEACHERS, DATA, OUT as for proof.sh. Validation text in thirds, as there: one has tuned the rates, one is reported, and the
# last scores the layers.
set -euo pipefail
teachers=$1 data=$2 out=$3 names=$4 seeds=${5:-0 1 2}
repo=$(cd "$(dirname "$0")/.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
# What another program made is not used: folders are named by what this one computes.
out=$out/$("$zebroid" --version | grep -o '[0-9a-f]\{16\}')/smart
mkdir -p "$out"
for name in $names; do
  train=$data/train.jsonl validation=$data/validation.jsonl teacher=$teachers/$name
  case $name in
    stories260K) kv=8 rope=4 ;;
    babyllama-1m-char) kv=16 rope=8 ;;
    embedded)
      kv=32 rope=8 teacher=$repo/assets/teacher train=$out/stories-2/stories.jsonl validation=$out/stories-3/stories.jsonl
      [ -d "$out/stories-2" ] || "$zebroid" stories "$out/stories-2" --count 20000 --seed 2 > /dev/null
      [ -d "$out/stories-3" ] || "$zebroid" stories "$out/stories-3" --count 600 --seed 3 > /dev/null
      ;;
  esac
  report=$out/$name-report.jsonl score=$out/$name-score.jsonl
  awk 'NR % 3 == 1' "$validation" > "$report"
  awk 'NR % 3 == 2' "$validation" > "$score"
  read -r ild muon < <(grep "^$name refined " "$repo/recipes/proof.rates" | cut -d' ' -f3,5)
  kl() { "$zebroid" eval kl --teacher "$teacher" --student "$1" --data "$report" --json 2> /dev/null | grep -o '"kl": [0-9.]*' | cut -d' ' -f2; }
  for seed in $seeds; do
    bank=$out/$name-$seed-bank scores=$out/$name-$seed.json
    [ -d "$bank" ] || "$zebroid" train ild --teacher "$teacher" --data "$train" "$bank" --kv-rank "$kv" --rope-dim "$rope" \
      --init refined --loss relative-mse --beta2 0.999 --tokens 400000 --lr "$ild" --seed "$seed" > /dev/null 2>&1
    [ -f "$scores" ] || "$zebroid" select --teacher "$teacher" --bank "$bank" --data "$score" --count 1 --tokens 32768 \
      --save-scores "$scores" > /dev/null 2>&1
    # The lowest score of all: the worst placement.
    list=$(grep -o '"score": [-0-9.e]*' "$scores" | cut -d' ' -f2)
    worst=$(awk 'NR == 1 || $1 < least { least = $1; at = NR - 1 } END { print at }' <<< "$list")
    for method in smart uniform worst; do
      place=$worst
      [ $method = worst ] || place=$("$zebroid" select --scores "$scores" --count 1 --method $method | tail -n 1 | cut -d' ' -f2)
      run=$out/$name-$seed-$place
      [ -d "$run-hybrid" ] || "$zebroid" compose "$teacher" "$run-hybrid" --mla "$place" --kv-rank "$kv" --rope-dim "$rope" \
        --bank "$bank" > /dev/null 2>&1
      [ -d "$run" ] || "$zebroid" train kd --teacher "$teacher" --student "$run-hybrid" --data "$train" "$run" \
        --optimizer muon --lr-scheduler wsd --lr "$muon" --adamw-lr "$(awk "BEGIN { print $muon / 2 }")" --tokens 400000 \
        --seed "$((seed + 20))" > /dev/null 2>&1
      echo "$name seed $seed $method: layer $place, KL after ILD $(kl "$run-hybrid"), after KD $(kl "$run")"
    done
    echo "$name seed $seed scores:" $list
  done
done
