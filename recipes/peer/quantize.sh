#!/usr/bin/env bash
# KL of our quantised models beside those of llama.cpp's quantiser, at the same types, with one importance matrix, measured by one program
# (docs/results.md, table 7). Needs llama-cpp-python (python3 -m pip install llama-cpp-python numpy).
#   recipes/peer/quantize.sh MODEL TRAIN.jsonl VALIDATION.jsonl OUT [TYPES]
set -euo pipefail
model=$1 train=$2 validation=$3 out=$4 types=${5:-q8_0 q4_0}
repo=$(cd "$(dirname "$0")/../.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
mkdir -p "$out"
"$zebroid" export "$model" "$out/f32.gguf" --format gguf --force > /dev/null
for kind in $types; do
  "$zebroid" quantize "$model" "$out/ours-$kind.gguf" --type "$kind" --calibration "$train" --force \
    --save-importance "$out/importance.json" > /dev/null 2>&1
  "${PYTHON:-python3}" "$repo/recipes/peer/quantize.py" "$model" "$out/f32.gguf" "$out/importance.json" "$out/theirs-$kind.gguf" "$kind" 2> /dev/null
  for whose in ours theirs; do
    kl=$("$zebroid" eval kl --teacher "$model" --student "$out/$whose-$kind.gguf" --data "$validation" --json 2> /dev/null)
    echo "$(basename "$model") $kind $whose: $(stat -c %s "$out/$whose-$kind.gguf") bytes," \
      "KL $(grep -o '"kl": [^,]*' <<< "$kl" | cut -d' ' -f2), agreement $(grep -o '"agreement": [^,]*' <<< "$kl" | cut -d' ' -f2)"
  done
done
