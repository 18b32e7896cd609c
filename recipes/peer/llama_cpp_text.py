"""llama.cpp and zebroid on one GGUF file: the tokens of texts, each token's log-probability, what is written greedily after a beginning.

    zebroid export assets/teacher teacher.gguf --format gguf && zebroid stories stories --count 40 --seed 5
    zebroid serve teacher.gguf --port 8089 --cache-type f32 &
    python recipes/peer/llama_cpp_text.py teacher.gguf http://127.0.0.1:8089 stories/stories.jsonl

Needs llama-cpp-python. A text begins at its first sentence's end.
"""

import json
import sys
import urllib.request

import llama_cpp
import numpy as np

path, server, texts = sys.argv[1:]
theirs = llama_cpp.Llama(
    path, n_ctx=256, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False
)


def ours(prompt, max_tokens):
    body = dict(prompt=prompt, echo=True, logprobs=0, max_tokens=max_tokens, temperature=0)
    request = urllib.request.Request(server + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))["choices"][0]


def piece(token):
    return theirs.detokenize([token], special=True).decode(errors="replace")


def log_probabilities(ids):
    """Of each token but the first, after those before it."""
    theirs.reset()
    theirs.eval(ids)
    logits = theirs.scores[: len(ids) - 1].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    logits -= largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


def greedy(beginning, count):
    ids = theirs.tokenize(beginning.encode(), add_bos=True)
    written = []
    for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == theirs.token_eos() or len(written) == count:
            break
        written.append(token)
    return beginning + theirs.detokenize(written, prev_tokens=ids).decode(errors="replace")


total, cut, written, apart = 0, [], [], 0.0
for text in (json.loads(line)["text"] for line in open(texts)):
    total += 1
    found = ours(text, 1)["logprobs"]
    ids = theirs.tokenize(text.encode(), add_bos=True)
    pieces = found["tokens"][:-1]
    if pieces != [piece(token) for token in ids]:
        cut.append((text, pieces, [piece(token) for token in ids]))
    else:
        apart = max(apart, np.abs(log_probabilities(ids) - found["token_logprobs"][1:-1]).max())
    beginning = text.split(". ")[0] + "."
    both = ours(beginning, 60)["text"], greedy(beginning, 60)
    if both[0] != both[1]:
        written.append(both)
print(f"{total} texts: {len(cut)} cut otherwise, {len(written)} go on otherwise, log-probabilities at most {apart:.1e} apart")
for other in cut + written:
    print(*other, sep="\n  ")
