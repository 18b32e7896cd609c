"""llama.cpp's decoding speed on a GGUF file: tokens a second at batch 1, after a prompt of one token.

    python recipes/peer/llama_cpp_speed.py MODEL.gguf [TOKENS] [THREADS]
"""

import sys
import time

import llama_cpp

path, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
model.eval([1])
started = time.time()
for i in range(tokens):
    model.eval([20 + i])
print(f"{tokens / (time.time() - started):.2f}")
