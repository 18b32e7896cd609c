"""Makes this folder: tiny random Llamas and their logits, by Hugging Face transformers in f32.

    pip install torch transformers safetensors
    python tests/golden/llama/make.py
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
VARIANTS = {
    "plain": dict(tie_word_embeddings=True),
    "linear": dict(rope_scaling=dict(rope_type="linear", factor=2.5), tie_word_embeddings=False),
    "llama3": dict(
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
        head_dim=12,
        tie_word_embeddings=True,
    ),
    "yarn": dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), tie_word_embeddings=False
    ),
}

for name, extra in VARIANTS.items():
    torch.manual_seed(len(name))
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-5, **extra,
    )
    model = LlamaForCausalLM(config).eval().float()
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
