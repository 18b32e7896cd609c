#!/usr/bin/env bash
# One KD step, ours and PyTorch's, on one machine in turn.   recipes/peer/kd_speed.sh TEACHER [PYTHON]
# TEACHER: babyllama-1m-char, a Hugging Face Llama folder. PYTHON: one with torch and safetensors.
set -euo pipefail
cd "$(dirname "$0")/../.."
teacher=$1 python=${2:-python3}
cargo build --release --quiet
for turn in 1 2 3; do
  echo "== turn $turn: zebroid"
  target/release/zebroid bench train "$teacher" --mla 2 --kv-rank 16 --rope-dim 8 --batch-size 16 --seq-len 256 --threads 2 --steps 12 --json
  echo "== turn $turn: PyTorch eager"
  "$python" recipes/peer/kd_step.py "$teacher" --mla 2 --kv-rank 16 --rope-dim 8 --batch-size 16 --seq-len 256 --threads 2 --steps 12
done
