#!/usr/bin/env bash
# A server under load, and the same load on llama.cpp's Python server with the same tiny Llama (docs/results.md, 12).
# Usage: recipes/peer/serve_load.sh HYBRID TEACHER [SECONDS] [PYTHON with llama-cpp-python[server]]
# HYBRID and TEACHER: checkpoint folders, e.g. the demo's hybrid (runs/demo/kd*) and stories260K, whose tokens llama.cpp reads as we do.
set -euo pipefail
hybrid=$1 teacher=$2 seconds=${3:-600} python=${4:-}
zebroid=${ZEBROID:-target/release/zebroid}
folder=$(mktemp -d)
trap 'kill "${pid:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT

wait_for() { for _ in $(seq 100); do curl -sf "http://127.0.0.1:8089/$1" >/dev/null && return; sleep 0.2; done; echo "no server" >&2; exit 1; }

load() { "$zebroid" bench serve http://127.0.0.1:8089 --clients 200 --max-tokens 48 --pid "$pid" "$@"; }

echo "== zebroid, hybrid: a fifth leaves in the middle"
"$zebroid" serve "$hybrid" --port 8089 --cache-memory 256MiB 2>"$folder/log" & pid=$!
wait_for ready
load --seconds "$seconds" --leave 0.2
kill "$pid"; wait "$pid" || true

echo "== zebroid, teacher: all stay"
"$zebroid" serve "$teacher" --port 8089 --cache-memory 256MiB 2>"$folder/log" & pid=$!
wait_for ready
load --seconds 60
kill "$pid"; wait "$pid" || true

if [ -n "$python" ]; then
  echo "== llama_cpp.server, the same teacher"
  "$zebroid" export "$teacher" "$folder/teacher.gguf" --format gguf >/dev/null
  context=$(grep -o '"max_position_embeddings": *[0-9]*' "$teacher/config.json" | grep -o '[0-9]*$')
  "$python" -m llama_cpp.server --model "$folder/teacher.gguf" --port 8089 --n_ctx "$context" --interrupt_requests False >"$folder/log" 2>&1 & pid=$!
  wait_for v1/models
  load --seconds 60
fi
