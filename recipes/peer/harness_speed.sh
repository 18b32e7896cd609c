#!/usr/bin/env bash
# Documents a second of `eval harness` and of `lm_eval --model hf` on ARC-Easy and BLiMP, in turn on one machine.
#   recipes/peer/harness_speed.sh MODEL DATA [PYTHON]      PYTHON: one with lm-eval[hf]==0.4.13 and pyarrow
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 data=$2 python=${3:-python3}
cargo build --release --quiet
for turn in 1 2; do
  for task in arc_easy blimp; do
    # ARC-Easy: all documents; BLiMP: so many of every paradigm.
    limit=10000
    [ $task = arc_easy ] || limit=100
    echo "$task, turn $turn, zebroid:" \
      "$(RAYON_NUM_THREADS=2 target/release/zebroid eval harness "$model" --tasks $task --data-dir "$data" --fresh --limit $limit 2> /dev/null | tail -n 1)"
    for batch in 1 64; do
      echo "$task, turn $turn, lm_eval, batch size $batch:" \
        "$("$python" recipes/peer/harness_speed.py "$model" "$data" $task $batch $limit 2> /dev/null | tail -n 1)"
    done
  done
done
