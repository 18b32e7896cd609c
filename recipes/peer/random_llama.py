"""A Llama with random weights and a small teacher's tokenizer: of 104 M parameters in f32 (arithmetic, not Python, decides how fast
it is evaluated), or of the shape of a config.json in bf16 (recipes/teachers/llama-3.2-1b/config.json: 2.5 GB). Needs nothing beside.
    random_llama.py TOKENIZER_FOLDER OUT [CONFIG_JSON]"""
import json
import math
import random
import shutil
import struct
import sys
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
own = json.loads((source / "config.json").read_text())
if len(sys.argv) > 3:
    config, dtype = json.loads(Path(sys.argv[3]).read_text()), "BF16"
else:
    config, dtype = dict(model_type="llama", vocab_size=own["vocab_size"], hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                         num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-6,
                         rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True), "F32"
config |= {"architectures": ["LlamaForCausalLM"], "bos_token_id": own["bos_token_id"], "eos_token_id": own["eos_token_id"]}

d, ff, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
shapes = {"model.embed_tokens.weight": [config["vocab_size"], d]}
for i in range(config["num_hidden_layers"]):
    layer = {"self_attn.q_proj": [q, d], "self_attn.k_proj": [kv, d], "self_attn.v_proj": [kv, d], "self_attn.o_proj": [d, q],
             "mlp.gate_proj": [ff, d], "mlp.up_proj": [ff, d], "mlp.down_proj": [d, ff],
             "input_layernorm": [d], "post_attention_layernorm": [d]}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
shapes["model.norm.weight"] = [d]
if not config["tie_word_embeddings"]:
    shapes["lm_head.weight"] = [config["vocab_size"], d]

header, at = {}, 0
for name, shape in shapes.items():
    size = math.prod(shape) * (2 if dtype == "BF16" else 4)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
    at += size
head = json.dumps(header).encode()
head += b" " * (-len(head) % 8)

random.seed(0)
signs = bytes(0x3C | byte & 0x80 for byte in range(256))
upper = bytes(0x80 | byte for byte in range(256))


def entries(count):
    """Of either sign, between 1/64 and 1/32."""
    width = 2 if dtype == "BF16" else 4
    x = bytearray(random.randbytes(count * width))
    x[width - 1 :: width] = x[width - 1 :: width].translate(signs)
    x[width - 2 :: width] = x[width - 2 :: width].translate(upper)
    return x


one = bytes([0x80, 0x3F]) if dtype == "BF16" else struct.pack("<f", 1)
out.mkdir(parents=True, exist_ok=True)
with open(out / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(head)) + head)
    for shape in shapes.values():
        count = math.prod(shape)
        if len(shape) == 1:
            file.write(one * count)
            continue
        for first in range(0, count, 1 << 24):
            file.write(entries(min(1 << 24, count - first)))
(out / "config.json").write_text(json.dumps(config, indent=2))
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(source / name, out / name)
print(f"{sum(map(math.prod, shapes.values())) / 1e6:.1f} M parameters")
