"""Time one knowledge-distillation step in plain eager PyTorch: the peer of zebroid's `bench`.

    python kd_step.py TEACHER [--mla 2] [--kv-rank 16] [--q-rank N] [--rope-dim 8]
                      [--seq-len 256] [--batch-size 16] [--steps 8] [--warmup 2]
                      [--threads 2] [--device cpu]

TEACHER is a Hugging Face Llama folder (`config.json`, `model.safetensors`) with tied embeddings.
The student has the teacher's sizes, MLA mixers in the layers listed by `--mla` (comma separated)
and Mamba2 mixers in the others. Its weights are random, as are the token ids: only speed is
measured. Everything is float32. A step is the teacher's forward without gradients, the student's
forward and per-token forward KL, backward, gradient clipping at norm 1 and AdamW.

Prints one JSON object; times are medians over the measured steps, in seconds.
Needs only `torch` and `safetensors`.

Shape letters: B batch, T tokens, H heads, G kv heads, P head width, K chunks, Q chunk length.
"""
import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

CONV_WIDTH = 4
CHUNK = 64
PHASES = ("teacher_forward", "student_forward", "backward", "optimizer")


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def read_config(folder):
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    assert config.tie_word_embeddings, "the teacher must tie its embeddings"
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


class RotaryTable(nn.Module):
    """cos and sin of every position's angles, [T, width / 2] each."""

    def __init__(self, width, theta, length):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate_halves(self, x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin,
                          second * self.cos + first * self.sin), dim=-1)

    def rotate_pairs(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * self.cos - odd * self.sin,
                            odd * self.cos + even * self.sin), dim=-1).flatten(-2)


class Attention(nn.Module):
    """The teacher's grouped-query attention."""

    def __init__(self, config, length):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj, self.o_proj = linear(hidden, query_width), linear(query_width, hidden)
        self.k_proj, self.v_proj = linear(hidden, kv_width), linear(hidden, kv_width)
        self.rotary = RotaryTable(self.head_dim, config.rope_theta, length)

    def forward(self, x):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotary.rotate_halves(q), self.rotary.rotate_halves(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    """MLA: low-rank queries, one joint kv latent, one rotary key shared by all heads."""

    def __init__(self, config, length, q_rank, kv_rank, rope_dim):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.kv_heads, self.kv_rank, self.rope_dim = config.num_key_value_heads, kv_rank, rope_dim
        self.nope_dim = self.head_dim - rope_dim
        inner = config.num_attention_heads * self.head_dim
        self.q_down, self.q_up = linear(hidden, q_rank), linear(q_rank, inner)
        self.kv_down = linear(hidden, kv_rank + rope_dim)
        self.kv_up = linear(kv_rank, self.kv_heads * (self.nope_dim + self.head_dim))
        self.out = linear(inner, hidden)
        self.rotary = RotaryTable(rope_dim, config.rope_theta, length)

    def forward(self, x):
        q = self.q_up(self.q_down(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_down(x).split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.kv_up(latent).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.nope_dim, self.head_dim), dim=-1)
        k_rope = self.rotary.rotate_pairs(k_rope).unsqueeze(1).expand(-1, self.kv_heads, -1, -1)
        q = torch.cat((q_nope, self.rotary.rotate_pairs(q_rope)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def chunked_ssd(x, log_decay, b, c):
    """Outputs of S_t = exp(log_decay_t) S_{t-1} + x_t b_tᵀ, y_t = S_t c_t, chunk by chunk.

    x, b, c: [B, T, H, P]; log_decay: [B, T, H]. T must be a multiple of the chunk.
    """
    chunks = lambda t: t.unflatten(1, (-1, CHUNK)).transpose(2, 3)
    x, b, c = chunks(x), chunks(b), chunks(c)  # [B, K, H, Q, P]
    total = chunks(log_decay).cumsum(dim=-1)  # [B, K, H, Q]
    causal = torch.full((CHUNK, CHUNK), -math.inf, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2) + causal).exp()
    within = (c @ b.mT * decay) @ x

    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    added = b.mT @ (x * to_end)  # [B, K, H, P, P]: each chunk's own contribution to the state
    chunk_decay = total[..., -1, None, None].exp()
    entering = [torch.zeros_like(added[:, 0])]
    for k in range(added.shape[1] - 1):
        entering.append(entering[-1] * chunk_decay[:, k] + added[:, k])
    across = (c * total.unsqueeze(-1).exp()) @ torch.stack(entering, dim=1)
    return (within + across).transpose(2, 3).flatten(1, 2)


class Mamba2(nn.Module):
    """Mamba2 with one state group per head and the teacher's grouped x and B heads."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.group = self.heads // config.num_key_value_heads
        inner, grouped = self.heads * self.head_dim, config.num_key_value_heads * self.head_dim
        channels = inner + 2 * grouped
        self.in_widths, self.conv_widths = (inner, channels, self.heads), (grouped, grouped, inner)
        self.in_proj = linear(config.hidden_size, sum(self.in_widths))
        self.conv = nn.Conv1d(channels, channels, CONV_WIDTH, groups=channels, padding=CONV_WIDTH - 1)
        step = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # inverse softplus
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads, 1))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = linear(inner, config.hidden_size)

    def forward(self, x):
        z, xbc, dt = self.in_proj(x).split(self.in_widths, dim=-1)
        xbc = F.silu(self.conv(xbc.mT)[..., :x.shape[1]].mT)
        x, b, c = (t.unflatten(-1, (-1, self.head_dim)) for t in xbc.split(self.conv_widths, dim=-1))
        x, b = x.repeat_interleave(self.group, dim=2), b.repeat_interleave(self.group, dim=2)
        dt = F.softplus(dt + self.dt_bias)
        y = chunked_ssd(x * dt.unsqueeze(-1), -self.A_log.exp() * dt, b, c) + self.D * x
        y = F.rms_norm(y * F.silu(z).view_as(y), (self.head_dim,), eps=1e-5)
        return self.out_proj(y.flatten(2) * self.norm_weight)


class SwiGlu(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config, mixer):
        super().__init__()
        self.self_attn, self.mlp = mixer, SwiGlu(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Decoder with tied embeddings; parameters are named as in Hugging Face's Llama."""

    def __init__(self, config, mixers):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.Sequential(*(Layer(config, mixer) for mixer in mixers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids):
        x = self.norm(self.layers(self.embed_tokens(ids)))
        return F.linear(x, self.embed_tokens.weight)


def build_teacher(folder, config, length):
    teacher = LanguageModel(config, [Attention(config, length) for _ in range(config.num_hidden_layers)])
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    teacher.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
    return teacher.requires_grad_(False)


def build_student(config, args):
    latent = lambda: LatentAttention(config, args.seq_len, args.q_rank, args.kv_rank, args.rope_dim)
    return LanguageModel(config, [latent() if layer in args.mla else Mamba2(config)
                                  for layer in range(config.num_hidden_layers)])


def timed_step(teacher, student, optimizer, ids, clock):
    """One KD step; returns the seconds of each phase, in the order of PHASES."""
    marks = [clock()]
    with torch.no_grad():
        target = F.log_softmax(teacher(ids), dim=-1)
    marks.append(clock())
    predicted = F.log_softmax(student(ids), dim=-1)
    loss = F.kl_div(predicted, target, reduction="sum", log_target=True) / ids.numel()
    marks.append(clock())
    loss.backward()
    marks.append(clock())
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    marks.append(clock())
    assert math.isfinite(loss.item()), f"the loss is {loss.item()}"
    return [end - start for start, end in zip(marks, marks[1:])]


def parse_args():
    parser = argparse.ArgumentParser(description="Time one KD step of a hybrid student in eager PyTorch.")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--mla", type=lambda text: [int(i) for i in text.split(",")], default=[2])
    parser.add_argument("--q-rank", type=int, help="default: 3/4 of the query rank, in eights")
    for option, default in {"kv-rank": 16, "rope-dim": 8, "seq-len": 256, "batch-size": 16,
                            "steps": 8, "warmup": 2, "threads": 2}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    assert args.seq_len % CHUNK == 0, f"--seq-len must be a multiple of {CHUNK}"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = read_config(args.teacher)
    query_rank = min(config.hidden_size, config.num_attention_heads * config.head_dim)
    args.q_rank = args.q_rank or min(math.ceil(query_rank * 3 / 4 / 8) * 8, query_rank)
    teacher = build_teacher(args.teacher, config, args.seq_len).to(args.device)
    student = build_student(config, args).to(args.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def clock():
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    runs = []
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(config.vocab_size, (args.batch_size, args.seq_len), device=args.device)
        runs.append(timed_step(teacher, student, optimizer, ids, clock))
    runs = runs[args.warmup:]
    tokens = args.batch_size * args.seq_len
    print(json.dumps({
        "tokens_per_s": statistics.median(tokens / sum(run) for run in runs),
        "seconds": {phase: statistics.median(run) for phase, run in zip(PHASES, zip(*runs))},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in student.parameters()),
    }, indent=2))


if __name__ == "__main__":
    main()
