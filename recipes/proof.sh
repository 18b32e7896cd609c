#!/usr/bin/env bash
# The whole recipe against the published one, and what each part is worth (docs/results.md, claim 3).
#   recipes/proof.sh TEACHERS DATA OUT "stories260K babyllama-1m-char embedded" [SEEDS] [TOKENS]
# TEACHERS, DATA: folders with the teachers and with TinyStories' train.jsonl and validation.jsonl. OUT: where runs are kept, in a
# folder named by what the program computes; what is there is not made again.
#
# Four arms, initialisation and ILD loss by optimizer of KD: published | refined, by AdamW with a cosine | Muon with a plateau. ILD is
# trained with AdamW always. AdamW's betas are (0.9, 0.999), warm-up 1 %, clip 1, no weight decay, as the reference's code has them.
# It departs from the reference's settings in two things, in all arms alike: documents do not see each other (the reference packs
# without borders), and the KL is a mean per token (the reference's sum over tokens makes its clip of 1 act at every step).
#
# Rates: every arm searches the same grid (factor 2), ILD's by the KL of the composed hybrid, then KD's, with seed 0 and 2 M tokens, on
# a third of the validation text; a search goes on until the best rate is inside the grid. Results are on another third; the
# last third is left for selections. Rates that a search has found stand in recipes/proof.rates and are taken from there; RETUNE=1
# searches anew.
set -euo pipefail
teachers=$1 data=$2 out=$3 names=$4 seeds=${5:-0 1 2} tokens=${6:-2000000}
repo=$(cd "$(dirname "$0")/.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
tuned=2000000 # tokens that rates are tuned at
out=$out/$("$zebroid" --version | grep -o '[0-9a-f]\{16\}')
mkdir -p "$out"
rates=$out/rates # a line each: TEACHER WAY ILD KD_ADAMW KD_MUON
[ -f "$rates" ] || if [ -n "${RETUNE:-}" ]; then touch "$rates"; else cp "$repo/recipes/proof.rates" "$rates"; fi

kl() { # CHECKPOINT TEXT
  "$zebroid" eval kl --teacher "$teacher" --student "$1" --data "$2" --json 2> /dev/null
}
field() { grep -o "\"$1\": [-0-9.e]*" | cut -d' ' -f2; }

# A bank and its hybrid: WAY SEED RATE TOKENS; prints the hybrid's folder.
hybrid() {
  local run=$out/$name/$1-$2-$3-$4 init
  case $1 in
    published) init="--init published --loss l2-norm" ;;
    refined) init="--init refined --loss relative-mse" ;;
  esac
  if [ ! -d "$run-hybrid" ]; then
    rm -rf "$run-bank"
    "$zebroid" train ild --teacher "$teacher" --data "$train" "$run-bank" --kv-rank "$kv" --rope-dim "$rope" $init \
      --beta2 0.999 --tokens $(($4 / 5)) --lr "$3" --seed "$2" > /dev/null 2>&1
    "$zebroid" compose "$teacher" "$run-hybrid" --mla "$mla" --kv-rank "$kv" --rope-dim "$rope" --bank "$run-bank" > /dev/null 2>&1
    rm -rf "$run-bank"
  fi
  echo "$run-hybrid"
}

# KD after it: WAY OPTIMIZER SEED ILD_RATE KD_RATE TOKENS; prints the student's folder.
distilled() {
  local run=$out/$name/$1-$2-$3-$4-$5-$6 rates
  case $2 in
    adamw) rates="--beta2 0.999 --lr $5" ;;
    # What Muon leaves to AdamW learns at half the rate.
    muon) rates="--optimizer muon --lr-scheduler wsd --lr $5 --adamw-lr $(awk "BEGIN { print $5 / 2 }")" ;;
  esac
  if [ ! -d "$run" ]; then
    "$zebroid" train kd --teacher "$teacher" --student "$(hybrid "$1" "$3" "$4" "$6")" --data "$train" "$run" $rates \
      --tokens $(($6 / 5 * 4)) --seed "$(($3 + 10))" > /dev/null 2>&1
  fi
  echo "$run"
}

# The best rate: LABEL COMMAND..; COMMAND with a rate appended prints a checkpoint. Starts with three rates and goes on
# beyond an edge that is the best; prints the rate, and every trial on standard error.
grid=(6.25e-5 1.25e-4 2.5e-4 5e-4 1e-3 2e-3 4e-3 8e-3 1.6e-2 3.2e-2)
search() {
  local label=$1 low=4 high=6 best at i
  shift
  local -A found=()
  while :; do
    for ((i = low; i <= high; i++)); do
      [ -n "${found[$i]:-}" ] || found[$i]=$(kl "$("$@" "${grid[i]}")" "$tune" | field kl)
    done
    best=$(for i in "${!found[@]}"; do echo "${found[$i]} $i"; done | sort -g | head -n 1 | cut -d' ' -f2)
    if [ "$best" = "$low" ] && [ "$low" -gt 0 ]; then low=$((low - 1));
    elif [ "$best" = "$high" ] && [ "$high" -lt 9 ]; then high=$((high + 1));
    else break; fi
  done
  for ((i = low; i <= high; i++)); do
    at=""
    [ "$i" != "$best" ] || at=" *"
    echo "tuning $name $label ${grid[i]} ${found[$i]}$at" >&2
  done
  echo "${grid[best]}"
}
kd_at() { distilled "$1" "$2" 0 "$3" "$4" "$tuned"; } # WAY OPTIMIZER ILD_RATE KD_RATE
ild_at() { hybrid "$1" 0 "$2" "$tuned"; }             # WAY ILD_RATE

for name in $names; do
  train=$data/train.jsonl validation=$data/validation.jsonl teacher=$teachers/$name
  case $name in
    stories260K) mla=2 kv=8 rope=4 ;;
    babyllama-1m-char) mla=2 kv=16 rope=8 ;;
    embedded)
      mla=1 kv=32 rope=8 teacher=$repo/assets/teacher train=$out/stories-2/stories.jsonl validation=$out/stories-3/stories.jsonl
      [ -d "$out/stories-2" ] || "$zebroid" stories "$out/stories-2" --count 20000 --seed 2 > /dev/null
      [ -d "$out/stories-3" ] || "$zebroid" stories "$out/stories-3" --count 600 --seed 3 > /dev/null
      ;;
  esac
  mkdir -p "$out/$name"
  tune=$out/$name/tune.jsonl report=$out/$name/report.jsonl
  awk 'NR % 3 == 0' "$validation" > "$tune"
  awk 'NR % 3 == 1' "$validation" > "$report"
  for way in published refined; do
    if ! grep -q "^$name $way " "$rates"; then
      ild=$(search "$way ILD" ild_at "$way")
      adamw=$(search "$way KD adamw" kd_at "$way" adamw "$ild")
      muon=$(search "$way KD muon" kd_at "$way" muon "$ild")
      echo "$name $way $ild $adamw $muon" >> "$rates"
    fi
    read -r ild adamw muon < <(grep "^$name $way " "$rates" | cut -d' ' -f3-)
    for optimizer in adamw muon; do
      for seed in $seeds; do
        student=$(distilled "$way" $optimizer "$seed" "$ild" "${!optimizer}" "$tokens")
        found=$(kl "$student" "$report")
        echo "result $name $way $optimizer seed $seed tokens $tokens ILD $ild KD ${!optimizer}:" \
          "after ILD $(kl "$(hybrid "$way" "$seed" "$ild" "$tokens")" "$report" | field kl)," \
          "KL $(field kl <<< "$found"), agreement $(field agreement <<< "$found")"
      done
    done
  done
done
