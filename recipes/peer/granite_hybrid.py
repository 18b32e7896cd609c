"""A hybrid of llama.cpp's own (attention and Mamba2, its architecture `granitehybrid`) with random bf16 weights, as a peer for our hybrid.

    python recipes/peer/granite_hybrid.py LLAMA.gguf OUT.gguf [ATTENTION_LAYERS, as 0,5,10,15]

Width, depth, heads, MLP, vocabulary (tied) and tokenizer are LLAMA.gguf's; the other layers are Mamba2 as in Granite-4.0-H: expand 2 (llama.cpp
asserts it), heads of 64, states of 128, one group, four taps of convolution, attention without positions. Needs PyPI's numpy and gguf.
"""

import math
import sys

import gguf
import numpy
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

source, out = gguf.GGUFReader(sys.argv[1]), sys.argv[2]
attention = [int(layer) for layer in (sys.argv[3] if len(sys.argv) > 3 else "0,5,10,15").split(",")]


def own(key):
    return source.fields[f"llama.{key}"].contents()


layers, d, ff, head = own("block_count"), own("embedding_length"), own("feed_forward_length"), own("attention.key_length")
q, kv = own("attention.head_count") * head, own("attention.head_count_kv") * head
vocab = len(source.fields["tokenizer.ggml.tokens"].data)
inner, state, groups, taps = 2 * d, 128, 1, 4
heads, mixed = inner // 64, inner + 2 * groups * state

writer = gguf.GGUFWriter(out, "granitehybrid")
writer.add_block_count(layers)
writer.add_context_length(own("context_length"))
writer.add_embedding_length(d)
writer.add_feed_forward_length(ff)
writer.add_vocab_size(vocab)
writer.add_head_count(own("attention.head_count"))
writer.add_head_count_kv([own("attention.head_count_kv") if i in attention else 0 for i in range(layers)])  # none: Mamba2
writer.add_key_length(head)
writer.add_value_length(head)
writer.add_layer_norm_rms_eps(own("attention.layer_norm_rms_epsilon"))
writer.add_rope_dimension_count(head)
writer.add_rope_scaling_finetuned(False)  # so the architecture says: no positions
writer.add_ssm_conv_kernel(taps)
writer.add_ssm_inner_size(inner)
writer.add_ssm_state_size(state)
writer.add_ssm_time_step_rank(heads)
writer.add_ssm_group_count(groups)
writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
for key, field in source.fields.items():
    if key.startswith("tokenizer.ggml."):
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == Value.ARRAY else None)

random = numpy.random.default_rng(0)


def matrix(shape):
    """bf16 of either sign, between 1/64 and 1/32, as random_llama.py."""
    return numpy.frombuffer(random.bytes(2 * math.prod(shape)), numpy.uint16) & 0x807F | 0x3C80


def ones(shape):
    return numpy.ones(shape, numpy.float32)


def uniform(low, high):
    return lambda shape: random.uniform(low, high, shape).astype(numpy.float32)


def time_steps(shape):
    """What softplus turns into steps between 0.001 and 0.1, even in their logarithm."""
    steps = numpy.exp(random.uniform(math.log(0.001), math.log(0.1), shape))
    return numpy.log(numpy.expm1(steps)).astype(numpy.float32)


tensors = {"token_embd.weight": ([vocab, d], matrix)}
for i in range(layers):
    if i in attention:
        layer = {"attn_q.weight": ([q, d], matrix), "attn_k.weight": ([kv, d], matrix), "attn_v.weight": ([kv, d], matrix),
                 "attn_output.weight": ([d, q], matrix)}
    else:
        layer = {"ssm_in.weight": ([inner + mixed + heads, d], matrix), "ssm_conv1d.weight": ([mixed, taps], uniform(-0.5, 0.5)),
                 "ssm_conv1d.bias": ([mixed], uniform(-0.5, 0.5)), "ssm_dt.bias": ([heads], time_steps),
                 "ssm_a": ([heads, 1], uniform(-16, -1)), "ssm_d": ([heads, 1], ones),
                 "ssm_norm.weight": ([groups, inner // groups], ones), "ssm_out.weight": ([d, inner], matrix)}
    layer |= {"attn_norm.weight": ([d], ones), "ffn_norm.weight": ([d], ones), "ffn_gate.weight": ([ff, d], matrix),
              "ffn_up.weight": ([ff, d], matrix), "ffn_down.weight": ([d, ff], matrix)}
    tensors |= {f"blk.{i}.{name}": tensor for name, tensor in layer.items()}
tensors["output_norm.weight"] = ([d], ones)

for name, (shape, fill) in tensors.items():
    kind, width = (Type.BF16, numpy.uint16) if fill is matrix else (Type.F32, numpy.float32)
    writer.add_tensor_info(name, shape, numpy.dtype(width), math.prod(shape) * numpy.dtype(width).itemsize, kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
for shape, fill in tensors.values():
    writer.write_tensor_data(fill(shape))
writer.close()
print(f"{sum(math.prod(shape) for shape, _ in tensors.values()) / 1e6:.1f} M parameters")
