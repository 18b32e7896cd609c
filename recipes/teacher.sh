#!/usr/bin/env bash
# Remakes assets/teacher: a small Llama trained on the program's own stories (seed 1), first among exercises in their words, without
# which it does not learn whose thing is what (docs/log.md). One thread, since the order of sums decides what comes of it: about 25 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
zebroid="cargo run --release --quiet --"
$zebroid stories runs/stories --count 100000 --seed 1
export RAYON_NUM_THREADS=1
how="--batch-size 4 --lr-scheduler wsd --seed 1 --save-every 1000"
$zebroid pretrain runs/exercised --data runs/stories/stories.jsonl#weight=1 --data runs/stories/exercises.jsonl#weight=3 \
  --tokenizer runs/stories --hidden-size 128 --intermediate-size 344 --num-layers 4 --num-heads 4 --num-kv-heads 4 \
  --tokens 12000000 --lr 3e-3 --warmup 0.02 $how
$zebroid pretrain runs/teacher --from runs/exercised --data runs/stories/stories.jsonl \
  --tokens 8000000 --lr 2e-3 --warmup 0.05 --decay 1 $how
mkdir -p assets/teacher
cp runs/teacher/{config.json,model.safetensors,tokenizer.json,tokenizer_config.json} assets/teacher/
