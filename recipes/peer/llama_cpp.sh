#!/usr/bin/env bash
# zebroid and llama.cpp on one GGUF file, in turn (docs/results.md, table 8): decoding at depths (DEPTHS, 0 and 2,048), eight sequences
# together, a prompt (PROMPT, 512 tokens). REPACK=0: llama.cpp uses weights as they stand. Needs llama-cpp-python built for this machine
# (CMAKE_ARGS=-DGGML_NATIVE=ON python3 -m pip install --no-binary llama-cpp-python llama-cpp-python). PEER: llama.cpp runs this file instead,
# as a model of granite_hybrid.py beside a hybrid of ours, which may be a folder.
#   recipes/peer/llama_cpp.sh MODEL.gguf [TURNS]
set -euo pipefail
model=$1 turns=${2:-3} prompt=${PROMPT:-512} peer=${PEER:-$1}
repo=$(cd "$(dirname "$0")/../.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
threads=$(nproc)
ours() { "$zebroid" bench "$@" --repeat 1 --json 2> /dev/null | sed -n 's/.*"tokens_per_s": \([0-9.]*\).*/\1/p'; }
theirs() { "${PYTHON:-python3}" "$repo/recipes/peer/llama_cpp_speed.py" "$peer" "$threads" "$@" 2> /dev/null; }
told() {
  local ratio
  ratio=$(awk "BEGIN { printf \"%.2f\", $2 / $3 }")
  echo "$(basename "$model") $1: zebroid $(printf %.1f "$2"), llama.cpp${PEER:+ on $(basename "$PEER")} $(printf %.1f "$3") tokens/s, ratio $ratio"
}
for ((turn = 0; turn < turns; turn++)); do
  for depth in ${DEPTHS:-0 2048}; do
    told "decode, depth $depth" "$(ours decode "$model" --depths "$depth" --tokens 24)" "$(theirs decode "$depth" 24)"
  done
  told "8 sequences" "$(ours batch "$model" --batches 8 --tokens 8)" "$(theirs batch 8 8)"
  told "prefill of $prompt" "$(ours prefill "$model" --lengths "$prompt")" "$(theirs prefill "$prompt")"
done
