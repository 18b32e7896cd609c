#!/usr/bin/env bash
# Documents a second of `eval harness` and of `lm_eval --model hf`, f32, 2 threads each, in turn on one machine.
#   recipes/peer/harness_speed.sh MODEL DATA "TASK:LIMIT .." "BATCH_SIZE .." TURNS [PYTHON] | tee LINES
#   recipes/peer/harness_speed.py < LINES
# LIMIT: documents of the task, or of each of its parts (BLiMP). PYTHON: one with lm-eval[hf]==0.4.13 and pyarrow. A line a
# measurement: task, program, documents, seconds from the data on disk to the scores (the model is loaded), seconds of these without
# opening the data, seconds of processor time (zebroid's with starting and loading the model), the machine's load average before.
# The rows of docs/results.md: stories260K with "arc_easy:600 blimp:20" "64" 3; the model that random_llama.py makes with
# "arc_easy:20 blimp:2" "64 8" 1, then "arc_easy:20" "8" 2, and with a folder of three BLiMP paradigms "blimp:25" "8" 3.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 data=$2 tasks=$3 batches=$4 turns=$5 python=${6:-python3}
zebroid=${ZEBROID:-target/release/zebroid}
export RAYON_NUM_THREADS=2 OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1
# PyTorch's waiting threads spin otherwise, which stalls it for a multiple of the time when anything else runs on the machine.
export OMP_WAIT_POLICY=passive
TIMEFORMAT='%U %S'
load() { cut -d' ' -f1 /proc/loadavg; }
for _ in $(seq "$turns"); do
  for task in $tasks; do
    name=${task%:*} limit=${task#*:}
    before=$(load)
    # "N documents, R a second (S s of scoring, A s in all)"; the model is loaded before "in all" begins.
    found=$({ time "$zebroid" eval harness "$model" --tasks "$name" --data-dir "$data" --fresh --lossy --limit "$limit" 2> /dev/null; } 2>&1)
    numbers=($(tail -n 2 <<< "$found" | grep -o '[0-9.]\+'))
    printf '%s\tzebroid\t%s\t%s\t%s\t%s\t%s\n' "$name" "${numbers[0]}" "${numbers[3]}" "${numbers[2]}" \
      "$(awk "BEGIN { print ${numbers[4]} + ${numbers[5]} }")" "$before"
    for batch in $batches; do
      before=$(load)
      numbers=($("$python" recipes/peer/harness_speed.py "$model" "$data" "$name" "$batch" "$limit" 2> /dev/null | tail -n 1))
      printf '%s\tlm_eval, batch size %s\t%s\t%s\t%s\t%s\t%s\n' "$name" "$batch" "${numbers[@]}" "$before"
    done
  done
done
