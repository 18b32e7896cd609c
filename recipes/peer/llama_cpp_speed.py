"""llama.cpp's speed on a GGUF file, as `zebroid bench` measures it: tokens a second.

    python recipes/peer/llama_cpp_speed.py MODEL.gguf THREADS decode DEPTH TOKENS
    python recipes/peer/llama_cpp_speed.py MODEL.gguf THREADS prefill LENGTH
    python recipes/peer/llama_cpp_speed.py MODEL.gguf THREADS batch SEQUENCES TOKENS

What stands in the cache at a depth is the entries of 512 tokens, read once and put there as often as it takes (reading 32,768 would take an
hour or more); this is not measured. REPACK=0: weights are used as they stand (its tiles of AMX crash with some versions and compilers).
"""

import ctypes
import os
import sys
import time

import llama_cpp as ll

path, threads, mode, first = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
tokens = int(sys.argv[5]) if len(sys.argv) > 5 else first
sequences = first if mode == "batch" else 1
room = {"decode": first + tokens, "prefill": first, "batch": sequences * (tokens + 2)}[mode] + 64

LOG = ll.llama_log_callback(lambda *_: None)
ll.llama_log_set(LOG, None)
ll.llama_backend_init()
params = ll.llama_model_default_params()
params.use_extra_bufts = os.environ.get("REPACK") != "0"
model = ll.llama_load_model_from_file(path.encode(), params)
settings = ll.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_ubatch = room, 512, 512
settings.n_threads = settings.n_threads_batch = threads
settings.n_seq_max = sequences + (mode == "decode")  # one to read with, aside
settings.kv_unified = True
context = ll.llama_new_context_with_model(model, settings)
vocab = ll.llama_n_vocab(ll.llama_model_get_vocab(model))
batch = ll.llama_batch_init(512, 0, 1)


def read(entries):
    """One pass over (token, position, sequence); logits of the last of each sequence."""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence) in enumerate(entries):
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = mode == "batch" or i == len(entries) - 1
    if ll.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    ll.llama_get_logits(context)


def token(i):
    return (i * 7919 + 13) % vocab


def prompt(length):
    for at in range(0, length, 512):
        read([(token(i), i, 0) for i in range(at, min(at + 512, length))])


def fill(depth):
    """Sequence 0 with so many entries in the cache, at positions that repeat; the next position."""
    memory, aside = ll.llama_get_memory(context), sequences
    for length, times in ((depth % 512, 1), (512, depth // 512)):
        if length * times == 0:
            continue
        ll.llama_memory_seq_rm(memory, aside, -1, -1)
        read([(token(i), i, aside) for i in range(length)])
        size = ll.llama_state_seq_get_size(context, aside)
        state = (ctypes.c_uint8 * size)()
        ll.llama_state_seq_get_data(context, state, size, aside)
        for _ in range(times):
            if ll.llama_state_seq_set_data(context, state, size, aside) != size:
                sys.exit("llama_state_seq_set_data failed")
            ll.llama_memory_seq_cp(memory, aside, 0, -1, -1)
    ll.llama_memory_seq_rm(memory, aside, -1, -1)
    return min(depth, 512)


if mode == "prefill":
    read([(token(0), 0, 0)])
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    started = time.time()
    prompt(first)
else:
    at = fill(first) if mode == "decode" else 0
    read([(token(s), at, s) for s in range(sequences)])
    started = time.time()
    for i in range(tokens):
        read([(token(i + 31 * s), at + 1 + i, s) for s in range(sequences)])
print(f"{sequences * tokens / (time.time() - started):.2f}")
