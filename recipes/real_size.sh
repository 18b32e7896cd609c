#!/usr/bin/env bash
# Memory and time at the size the program is made for: a Llama-3.2-1B shape with random bf16 weights (docs/log.md, "Measured").
#   recipes/real_size.sh TOKENIZER DATA OUT
# TOKENIZER: folder with tokenizer.json (its words are fewer than the model's); DATA: JSON lines of text; OUT: a new folder, 11 GB.
# Needs Python with numpy, for the weights and to read how much memory a command took.
set -euo pipefail
tokenizer=$1 data=$2 out=$3
repo=$(cd "$(dirname "$0")/.." && pwd)
zebroid=${ZEBROID:-$repo/target/release/zebroid}
python=${PYTHON:-python3}
mkdir "$out"
"$python" "$repo/recipes/peer/random_llama.py" "$tokenizer" "$out/teacher" "$repo/recipes/teachers/llama-3.2-1b/config.json"
# What a command says on standard output, its seconds, and the most memory that it held.
measured() {
  echo "== $*"
  "$python" - "$zebroid" "$@" <<'PYTHON'
import resource, subprocess, sys, time
started = time.time()
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
print(f"{time.time() - started:.1f} s, {peak:.2f} GB at most")
PYTHON
}
text="Once upon a time"
long=$(printf 'Once upon a time there was a little girl. %.0s' {1..24})
measured generate "$out/teacher" --prompt "$text" --max-tokens 40 --json
measured generate "$out/teacher" --prompt "$text" --max-tokens 40 --json --frozen f32
measured generate "$out/teacher" --prompt "$long" --max-tokens 1 --json
measured compose "$out/teacher" "$out/hybrid" --mla 0,5,10,15 --kv-rank 128 --rope-dim 32 --init published
measured export "$out/hybrid" "$out/bf16" --format zebroid --dtype bf16
measured generate "$out/hybrid" --prompt "$text" --max-tokens 40 --json
measured generate "$out/bf16" --prompt "$text" --max-tokens 40 --json
measured train kd --teacher "$out/teacher" --student "$out/hybrid" --data "$data" "$out/distilled" --trained mixers \
  --batch-size 1 --seq-len 256 --steps 2 --lr 1e-4 --json
# Each says beside its peak what `plan --train` predicts of it (predicted_bytes).
for flags in "--trained mixers" "--trained mixers --optimizer adamw_8bit --gradient-checkpointing true" "--optimizer adamw_8bit --gradient-checkpointing true" \
  "--optimizer adamw_8bit --gradient-checkpointing true --clip-by layer --weights bf16"; do
  # shellcheck disable=SC2086
  measured bench train "$out/teacher" --mla 0,5,10,15 --kv-rank 128 --rope-dim 32 --batch-size 1 --seq-len 1024 --steps 1 --warmup 0 $flags --json
done
# ILD of one candidate in all 16 layers: four at a time and all at once; the results are the same files.
for layers in 4 16; do
  measured train ild --teacher "$out/teacher" --data "$data" "$out/bank$layers" --init published --candidates mamba2 --layers-at-once "$layers" \
    --steps 1 --batch-size 1 --seq-len 512 --lr 1e-4 --json
done
cmp "$out"/bank{4,16}/mamba2/model.safetensors
