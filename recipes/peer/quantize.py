"""llama.cpp's own quantiser, beside ours, on one model and one importance matrix.

    python recipes/peer/quantize.py MODEL IN.gguf IMPORTANCE.json OUT.gguf q4_0
    python recipes/peer/quantize.py IN.gguf OUT.gguf q4_k

MODEL: folder with config.json; IN: the model as `zebroid export --format gguf` writes it; IMPORTANCE: what `zebroid quantize
--save-importance` keeps of a text (without: all weights count the same). Needs llama-cpp-python. Every matrix gets the type (`pure`), as in
ours.
"""

import ctypes
import json
import sys

import numpy
import llama_cpp

*_, out, kind = sys.argv[1:]
source, importance = (sys.argv[2], sys.argv[3]) if len(sys.argv) == 6 else (sys.argv[1], None)
names = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def theirs(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"


params = llama_cpp.llama_model_quantize_default_params()
params.pure = True
params.ftype = {"q4_0": 2, "q8_0": 7, "q4_k": 14, "q6_k": 18}[kind]
if importance:
    entry = llama_cpp.llama_model_imatrix_data
    found = {theirs(name): numpy.array(values, numpy.float32) for name, values in json.load(open(importance)).items()}
    entries = (entry * (len(found) + 1))()
    for slot, (name, values) in zip(entries, found.items()):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = len(values)
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
sys.exit(status)
