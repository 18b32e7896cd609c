#!/usr/bin/env bash
# Remakes assets/teacher: a small Llama trained on the program's own stories (seed 1).
# On 2 cores about 25 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
zebroid="cargo run --release --quiet --"
$zebroid stories runs/stories --count 100000 --seed 1
$zebroid pretrain runs/teacher --data runs/stories/stories.jsonl --tokenizer runs/stories \
  --hidden-size 128 --intermediate-size 344 --num-layers 4 --num-heads 4 --num-kv-heads 4 \
  --tokens 24000000 --lr 3e-3 --warmup 0.02 --weight-decay 0.1 --save-every 500
mkdir -p assets/teacher
cp runs/teacher/{config.json,model.safetensors,tokenizer.json,tokenizer_config.json} assets/teacher/
