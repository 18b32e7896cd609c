#!/usr/bin/env bash
# Registers, spills and shared memory of every CUDA kernel, as the compiler says them, held against resources.txt beside this.
# Needs nvcc of CUDA 13.0 (NVCC, CUDA_HOME or PATH) and no GPU. With --record what is found becomes the record.
set -euo pipefail
cd "$(dirname "$0")/../.."
nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
for kernels in src/op/*/kernel.cuh; do echo "#include \"${kernels#src/op/}\""; done > "$room/kernels.cu"
{
  echo "architecture kernel registers spilled_bytes stack_bytes shared_bytes"
  for architecture in sm_80 sm_90a; do
    "$nvcc" -std=c++17 -O3 -Isrc/op -arch="$architecture" -cubin -Xptxas -v "$room/kernels.cu" -o "$room/kernels.cubin" 2>&1 |
      awk -v architecture="$architecture" '
        /Compiling entry function/ { split($0, quoted, "\x27"); kernel = quoted[2] }
        /bytes stack frame/ { stack = $1; spilled = $5 + $9 }
        /Used [0-9]+ registers/ {
          shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
          match($0, /Used [0-9]+/)
          print architecture, kernel, substr($0, RSTART + 5, RLENGTH - 5), spilled, stack, shared
        }
        /warning|error/ { print > "/dev/stderr" }' | sort
  done
} > "$room/found.txt"
if [ "${1:-}" = --record ]; then
  cp "$room/found.txt" recipes/gpu/resources.txt
else
  diff -u recipes/gpu/resources.txt "$room/found.txt" && echo "as recorded: $(($(wc -l < "$room/found.txt") - 1)) kernels"
fi
