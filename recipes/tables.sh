#!/usr/bin/env bash
# Tables 1 to 4 of docs/results.md, out of recipes/tables/.
#   recipes/tables.sh untrained|ild|proof|default|smart|tune TEACHERS DATA OUT [TEACHER ..] [-- KEY=VALUE ..]
# TEACHERS, DATA: folders with the teachers, and with TinyStories' train.jsonl and validation.jsonl. OUT: where runs are kept; what
# is there is not made again. Settings behind -- replace those of the recipe (kd.train.tokens=6400000).
#
# The published way departs from the reference's settings in two things, in all arms alike: documents do not see each other (the
# reference packs without borders), and the KL is a mean per token (the reference's sum over tokens makes its clip of 1 act at every step).
# Of the validation text one third reports (#1/3), one selects (#2/3), one tunes (#3/3). `tune` searches every arm's rates on one grid
# (factor 2) with seed 0, ILD's by the KL of the composed hybrid, then KD's, until the best is inside the grid.
set -euo pipefail
table=$1 teachers=$2 data=$3 out=$4
shift 4
names=() settings=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do names+=("$1") && shift; done
[ $# -eq 0 ] || shift
for setting in "$@"; do settings+=(--set "$setting"); done
repo=$(cd "$(dirname "$0")/.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
case $table in
  untrained | ild) [ ${#names[@]} -gt 0 ] || names=(stories260K babyllama-1m-char) ;;
  *) [ ${#names[@]} -gt 0 ] || names=(stories260K babyllama-1m-char embedded) ;;
esac

run() { # RECIPE FLAGS..: the recipe with this teacher, its texts and sizes
  local recipe=$repo/recipes/tables/$1
  shift
  "$zebroid" run "$recipe" --out "$out/$name" "${flags[@]}" --set plan.kv_lora_rank="$kv" --set plan.qk_rope_head_dim="$rope" \
    "$@" "${settings[@]}"
}

# Rates of the refined way: ILD, Muon.
refined() { sed -n 's/.*"refined, Muon".*ild.train.lr = \([^,]*\), .* lr = \([^,]*\), adamw_lr.*/\1 \2/p' \
  "$repo/recipes/tables/proof-$name.toml"; }

kl() { python3 -c 'import json, sys; print(json.load(sys.stdin)["stages"][-1]["kl"]["kl"])'; }

# The best rate: LABEL KEY FLAGS..; prints it, and every trial on standard error.
grid=(6.25e-5 1.25e-4 2.5e-4 5e-4 1e-3 2e-3 4e-3 8e-3 1.6e-2 3.2e-2 6.4e-2 0.128)
search() {
  local label=$1 key=$2 low=4 high=6 best i half
  shift 2
  local -A found=()
  while :; do
    for ((i = low; i <= high; i++)); do
      half=$(awk "BEGIN { print ${grid[i]} / 2 }")
      [ -n "${found[$i]:-}" ] || found[$i]=$(run "proof-$name.toml" --json --set 'sweep=[]' "${@//HALF/$half}" \
        --set "$key=${grid[i]}" 2> /dev/null | kl)
    done
    best=$(for i in "${!found[@]}"; do echo "${found[$i]} $i"; done | sort -g | sed -n '1s/.* //p')
    if [ "$best" = "$low" ] && [ "$low" -gt 0 ]; then low=$((low - 1));
    elif [ "$best" = "$high" ] && [ "$high" -lt $((${#grid[@]} - 1)) ]; then high=$((high + 1));
    else break; fi
  done
  for ((i = low; i <= high; i++)); do echo "$name $label ${grid[i]} ${found[$i]}" >&2; done
  echo "${grid[best]}"
}

for name in "${names[@]}"; do
  case $name in
    stories260K) kv=8 rope=4 lr=6e-3 ;;
    babyllama-1m-char) kv=16 rope=8 lr=2e-3 ;;
    embedded) kv=32 rope=8 lr=8e-3 ;;
  esac
  flags=()
  text() { [ "$name" = embedded ] && echo "stories:3:600$1" || echo "$data/validation.jsonl$1"; }
  [ "$name" = embedded ] || flags=(--teacher "$teachers/$name" --train "$data/train.jsonl")
  echo "== $name"
  case $table in
    untrained) run untrained.toml --validation "$(text "")" ;;
    ild)
      run ild.toml --json --validation "$(text "")" --set ild.train.lr=$lr > "$out-$name.json"
      python3 - "$out-$name.json" << 'PY'
import json, sys
runs = json.load(open(sys.argv[1]))
lines = {r["variant"]: [json.loads(l) for l in open(r["outcome"]["stages"][0]["folder"] + "/metrics.jsonl")] for r in runs}
for published in [v for v in lines if "published" in v]:
    pair = [lines[published], lines[published.replace("published", "refined")]]
    names = [k for k in pair[0][0] if k.split(":")[0] in ("mla", "mamba2")]
    for name in names:
        smooth = [[sum(m[name] for m in run[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(run))] for run in pair]
        goal = smooth[0][-1]
        reached = next((m["tokens"] for m, s in zip(pair[1], smooth[1]) if s <= goal), None)
        print(published, name, f"published at {pair[0][-1]['tokens']}: {goal:.4f}; refined there after {reached}, ends at {smooth[1][-1]:.4f}")
PY
      ;;
    default) run ../convert.toml --validation "$(text '#1/3')" --set plan.mla='[2]' ;;
    proof) run "proof-$name.toml" --validation "$(text '#1/3')" ;;
    smart)
      read -r ild muon < <(refined)
      run smart.toml --validation "$(text '#1/3')" --set "data.selection=$(text '#2/3')" --set "ild.train.lr=$ild" \
        --set "kd.train.lr=$muon" --set "kd.train.adamw_lr=$(awk "BEGIN { print $muon / 2 }")"
      ;;
    tune)
      flags+=(--validation "$(text '#3/3')")
      for way in published refined; do
        loss=relative_mse
        [ $way = refined ] || loss=l2_norm
        arm=(--set init=$way --set ild.objective.loss=$loss)
        ild=$(search "$way ILD" ild.train.lr "${arm[@]}" --set 'kd=[]')
        arm+=(--set "ild.train.lr=$ild")
        adamw=$(search "$way KD AdamW" kd.train.lr "${arm[@]}")
        muon=$(search "$way KD Muon" kd.train.lr "${arm[@]}" --set kd.train.optimizer=muon --set kd.train.lr_scheduler=wsd \
          --set kd.train.adamw_lr=HALF)
        echo "$name $way: ILD $ild, KD $adamw (AdamW), $muon (Muon)"
      done
      ;;
  esac
done
