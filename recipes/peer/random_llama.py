"""A Llama with random weights and a small teacher's tokenizer: of 104 M parameters in f32 (arithmetic, not Python, decides how fast
it is evaluated), or of the shape of a config.json in bf16 (recipes/teachers/llama-3.2-1b/config.json: 2.5 GB).
    random_llama.py TOKENIZER_FOLDER OUT [CONFIG_JSON]"""
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, out = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(source)
torch.manual_seed(0)
if len(sys.argv) > 3:
    config, dtype = LlamaConfig.from_json_file(sys.argv[3]), torch.bfloat16
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
else:
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                         num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    dtype = torch.float32
torch.set_default_dtype(dtype)
lm = LlamaForCausalLM(config)
lm.save_pretrained(out)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(source / name, out / name)
print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.1f} M parameters")
