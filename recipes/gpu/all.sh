#!/usr/bin/env bash
# All that one short lease of a GPU can tell, most telling first, within 8 minutes.
#   recipes/gpu/all.sh build          here, with Rust and nvcc: target/lease.tar.xz, what travels (PROFILE: release)
#   recipes/gpu/all.sh run [FOLDER]   on the GPU machine, which needs CUDA 13's libraries and Python, no Rust and no network:
#                                     FOLDER/gpu.json and FOLDER/log.txt (FOLDER: $OUT, else target/lease/out)
set -uo pipefail
cd "$(dirname "$0")/../.."
lease=target/lease

build() {
  set -e
  profile=${PROFILE:-release}
  # Of candle's own kernels, which are for one capability and those above it ("90" is Hopper's alone).
  export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
  rm -rf $lease && mkdir -p $lease
  # Nothing is run: this machine has no GPU.
  cargo test --profile "$profile" --features cuda --lib --no-run --message-format=json > $lease/messages.json
  cargo build --profile "$profile" --features cuda --bin zebroid --message-format=json >> $lease/messages.json
  python3 - $lease/messages.json > $lease/programs <<'PY'
import json, sys
built = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
built = [m for m in built if m.get("executable")]
print([m["executable"] for m in built if m["profile"]["test"] and "lib" in m["target"]["kind"]][-1])
print([m["executable"] for m in built if not m["profile"]["test"] and m["target"]["name"] == "zebroid"][-1])
PY
  strip -o $lease/tests "$(sed -n 1p $lease/programs)"
  strip -o $lease/zebroid "$(sed -n 2p $lease/programs)"
  rm $lease/messages.json $lease/programs
  cp -r assets/teacher $lease/teacher
  cp recipes/peer/random_llama.py recipes/teachers/llama-3.2-1b/config.json $lease/
  golden=${ZEBROID_SHARED:-../shared}/golden
  if [ -d "$golden" ]; then cp -r "$golden" $lease/golden; fi
  tar -C $lease -c . | xz -9 > $lease.tar.xz
  echo "$lease.tar.xz: $(($(stat -c %s $lease.tar.xz) >> 20)) MiB of the 64 MiB that travel, sources too; then, there: recipes/gpu/all.sh run"
}

run() {
  if [ ! -x $lease/tests ]; then
    mkdir -p $lease && python3 -m tarfile -e $lease.tar.xz $lease && chmod +x $lease/tests $lease/zebroid || exit 1
  fi
  out=${1:-${OUT:-$lease/out}}
  mkdir -p "$out"
  export LD_LIBRARY_PATH=/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}
  export ZEBROID_TEST_DEVICE=cuda RUST_BACKTRACE=0
  steps=$(mktemp -d)
  deadline=$((SECONDS + 480))
  # step NAME LIMIT COMMAND...: its output, its end and its seconds are kept; a step that fails does not stop the rest.
  step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code
    shift 2
    if [ "$left" -lt 5 ]; then echo "$name: no time left"; return; fi
    timeout $((limit < left ? limit : left)) "$@" > "$steps/$name.txt" 2>&1
    code=$?
    printf '%s %s\n' $code $((SECONDS - started)) > "$steps/$name.end"
    echo "== $name: exit $code, $((SECONDS - started)) s"
    tail -n 12 "$steps/$name.txt"
  }
  teacher=$lease/teacher
  hybrid=(--mla 2 --kv-rank 16 --rope-dim 8)
  step device 20 nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
  step opens 30 $lease/zebroid doctor
  # Not once more for every set of the processor's instructions, and with no compiler in reach, which the emulator would use.
  step laws 150 env PATH= $lease/tests op:: mixer::tests::kernel_gradients --skip op::isa --test-threads 1
  step decodes 60 env PATH= $lease/tests generate::device_tests --test-threads 1
  for golden in "$lease"/golden/*/; do
    [ -d "$golden" ] || continue
    step "parity-$(basename "$golden")" 60 $lease/zebroid parity "$golden" "$golden/expected.safetensors" --tolerance 1e-3 --device cuda
  done
  # Decoding at the 1B shape, random weights: the Llama, half of its layers MLA and half Mamba2, both also in 8 bits.
  rooms=$(mktemp -d)
  step model 60 python3 $lease/random_llama.py $teacher "$rooms/llama" $lease/config.json
  step hybrid 90 $lease/zebroid compose "$rooms/llama" "$rooms/hybrid" --mla 0,2,4,6,8,10,12,14 --kv-rank 128 --init published
  for shape in llama hybrid; do
    [ -d "$rooms/$shape" ] || continue
    step "decode-$shape" 60 $lease/zebroid bench decode "$rooms/$shape" --depths 0,4096,32768 --device cuda --json
    step "decode-$shape-graphs" 60 $lease/zebroid bench decode "$rooms/$shape" --depths 0,4096,32768 --device cuda --cuda-graphs --json
    step "batch-$shape" 60 $lease/zebroid bench batch "$rooms/$shape" --batches 8,48 --depth 4096 --device cuda --json
    step "prefill-$shape" 60 $lease/zebroid bench prefill "$rooms/$shape" --lengths 2048 --device cuda --json
    if command -v nsys > /dev/null; then
      step "profile-$shape" 60 nsys profile --stats=true -o "$rooms/profile-$shape" \
        $lease/zebroid bench decode "$rooms/$shape" --depths 4096 --repeat 1 --device cuda --json
    fi
    step "quantize-$shape" 60 $lease/zebroid quantize "$rooms/$shape" "$rooms/$shape.gguf" --type q8_0
    step "decode-$shape-q8" 60 $lease/zebroid bench decode "$rooms/$shape.gguf" --depths 0,4096 --device cuda --json
  done
  rm -rf "$rooms"
  step speed 90 $lease/tests op::cuda::speed --ignored --nocapture --test-threads 1
  step train-cuda 60 $lease/zebroid bench train $teacher "${hybrid[@]}" --batch-size 4 --seq-len 128 --device cuda --json
  step train-cpu 60 $lease/zebroid bench train $teacher "${hybrid[@]}" --batch-size 4 --seq-len 128 --device cpu --json
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" 120 compute-sanitizer --tool $tool --error-exitcode 9 $lease/tests op:: \
      --skip ssd --skip attention --skip linear --skip blocks --skip op::isa --test-threads 1
  done
  cat "$steps"/*.txt > "$out/log.txt"
  python3 - "$steps" > "$out/gpu.json" <<'PY'
import json, pathlib, sys

def lines(text):
    """Whatever of a step's output is JSON, a line each; all of it, where it is one."""
    found = []
    for part in [text, *text.splitlines()]:
        try:
            found.append(json.loads(part))
        except ValueError:
            continue
        if part is text:
            break
    return [x for x in found if isinstance(x, dict)]

steps = {}
for end in sorted(pathlib.Path(sys.argv[1]).glob("*.end"), key=lambda p: p.stat().st_mtime_ns):
    code, seconds = map(int, end.read_text().split())
    text = end.with_suffix(".txt").read_text(errors="replace")
    steps[end.stem] = {"exit": code, "seconds": seconds, "json": lines(text), "tail": text.splitlines()[-40:]}
json.dump(steps, sys.stdout, indent=1)
PY
  echo "written: $out/gpu.json"
}

case ${1:-} in
  build) build ;;
  run) shift; run "$@" ;;
  *) sed -n '2,5p' "$0"; exit 2 ;;
esac
