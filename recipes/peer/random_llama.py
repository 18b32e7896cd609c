"""A Llama of 104 M parameters with random weights and a small teacher's tokenizer: arithmetic, not Python, decides how fast it
is evaluated.   random_llama.py TOKENIZER_FOLDER OUT"""
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, out = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(source)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                     num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
                     bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
lm = LlamaForCausalLM(config).float()
lm.save_pretrained(out)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(source / name, out / name)
print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M parameters")
