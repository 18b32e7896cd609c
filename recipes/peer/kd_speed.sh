#!/usr/bin/env bash
# One step of KD or ILD, ours and PyTorch's, on one machine in turn.   recipes/peer/kd_speed.sh TEACHER [PYTHON [FLAGS]]
# TEACHER: babyllama-1m-char, a Hugging Face Llama folder. PYTHON: one with torch and safetensors. FLAGS: for both sides (--stage
# ild). COMPILE=1: by torch.compile, which needs a C++ compiler, too.
set -euo pipefail
cd "$(dirname "$0")/../.."
teacher=$1 python=${2:-python3}
shift $(($# < 2 ? $# : 2))
sizes=(--mla 2 --kv-rank 16 --rope-dim 8 --batch-size 16 --seq-len 256 --threads 2 --steps 12 "$@")
cargo build --release --quiet
for turn in 1 2 3; do
  echo "== turn $turn: zebroid"
  "${ZEBROID:-target/release/zebroid}" bench train "$teacher" "${sizes[@]}" --json
  echo "== turn $turn: PyTorch eager"
  "$python" recipes/peer/kd_step.py "$teacher" "${sizes[@]}"
  if [ -n "${COMPILE:-}" ]; then
    echo "== turn $turn: torch.compile"
    "$python" recipes/peer/kd_step.py "$teacher" "${sizes[@]}" --compile
  fi
done
