#!/usr/bin/env bash
# Memory and speed of the data path: a text of generated stories is tokenised into the cache, then found there (docs/results.md).
#   recipes/data_size.sh OUT COUNT..
# OUT: a new folder; COUNT: stories of each text (some 520 bytes each), e.g. 200000 3000000.
set -euo pipefail
out=$1
shift
repo=$(cd "$(dirname "$0")/.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
mkdir "$out"
export ZEBROID_CACHE=$out/cache
for count in "$@"; do
  "$zebroid" stories "$out/$count" --count "$count"
  for turn in tokenised found; do
    echo "== $count stories, $turn"
    "$zebroid" bench data "$out/$count/stories.jsonl" --tokenizer "$out/$count" --seq-len 256 --batch-size 16 --batches 20000
  done
done
