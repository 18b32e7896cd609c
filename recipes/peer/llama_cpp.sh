#!/usr/bin/env bash
# Decoding at batch 1: zebroid and llama.cpp on one GGUF file, in turn (docs/results.md, table 8). Needs llama-cpp-python built for this
# machine (CMAKE_ARGS=-DGGML_NATIVE=ON python3 -m pip install --no-binary llama-cpp-python llama-cpp-python).
#   recipes/peer/llama_cpp.sh MODEL.gguf [TURNS]
set -euo pipefail
model=$1 turns=${2:-3}
repo=$(cd "$(dirname "$0")/../.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
for ((turn = 0; turn < turns; turn++)); do
  ours=$("$zebroid" generate "$model" --prompt "Once" --max-tokens 64 --json | grep -o '"decode_tokens_per_s": [0-9.]*' | cut -d' ' -f2)
  theirs=$("${PYTHON:-python3}" "$repo/recipes/peer/llama_cpp_speed.py" "$model" 64 "$(nproc)" 2> /dev/null)
  echo "$(basename "$model"): zebroid $ours, llama.cpp $theirs tokens/s, ratio $(awk "BEGIN { printf \"%.2f\", $ours / $theirs }")"
done
