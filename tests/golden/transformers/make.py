"""Makes this folder: tiny random models and their logits, by Hugging Face transformers in f32.

    pip install torch transformers safetensors
    python tests/golden/transformers/make.py [NAME ..]
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
import transformers

HERE = Path(__file__).parent
# Of each: the class' name before `Config` and `ForCausalLM`, what its config says beside the common sizes.
VARIANTS = {
    "plain": ("Llama", dict(tie_word_embeddings=True)),
    "linear": ("Llama", dict(rope_scaling=dict(rope_type="linear", factor=2.5), tie_word_embeddings=False)),
    "llama3": ("Llama", dict(
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
        head_dim=12,
        tie_word_embeddings=True,
    )),
    "yarn": ("Llama", dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), tie_word_embeddings=False
    )),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=False)),
    "smollm3": ("SmolLM3", dict(
        num_hidden_layers=4, no_rope_layer_interval=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )),
    "granite": ("Granite", dict(
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=2.5, tie_word_embeddings=True
    )),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=8, tie_word_embeddings=False)),
}

for name, (family, extra) in VARIANTS.items():
    if sys.argv[1:] and name not in sys.argv[1:]:
        continue
    torch.manual_seed(len(name))
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-5,
    )
    config = getattr(transformers, f"{family}Config")(**(sizes | extra))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4).add_(1.0 if parameter.dim() == 1 else 0.0)
    ids = torch.randint(0, 40, (2, 50))
    with torch.no_grad():
        logits = model(ids).logits
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"input_ids": ids, "logits": logits}, folder / "expected.safetensors")
    print(name, json.loads((folder / "config.json").read_text()).get("rope_parameters"))
