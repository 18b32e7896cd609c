"""Time one knowledge-distillation step in plain PyTorch: the peer of zebroid's own benchmark.

    python kd_step.py TEACHER [--mla 2] [--kv-rank 16] [--q-rank N] [--rope-dim 8] [--seq-len 256]
                      [--batch-size 16] [--steps 8] [--warmup 2] [--threads 2] [--device cpu] [--stage kd] [--compile]

TEACHER is a Hugging Face Llama folder (`config.json`, `model.safetensors`) with tied embeddings.
The student has the teacher's sizes, MLA mixers in the layers that `--mla` lists (comma separated)
and Mamba2 mixers in the others. Only speed is measured, so its weights and all token ids are random.
Everything is float32. A step is the teacher's forward without gradients, the student's forward and
per-token forward KL, backward, gradient clipping at norm 1 and AdamW. With `--stage ild` every layer of the student reads the
teacher's input of that layer and learns its output and its mixer's (relative errors), is walked back and clipped by itself.
`--compile`: models by `torch.compile`.

Prints one JSON object; times are medians over the measured steps. Needs only torch and safetensors.
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


def split_heads(x, heads):
    """[batch, time, heads * width] -> [batch, heads, time, width]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def causal_attention(q, k, v):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    """cos and sin of each position's angles, [time, width / 2], and the two ways to pair dimensions."""

    def __init__(self, width, theta, length):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, a, b):
        return a * self.cos - b * self.sin, b * self.cos + a * self.sin

    def rotate_halves(self, x):
        return torch.cat(self.turn(*x.chunk(2, dim=-1)), dim=-1)

    def rotate_pairs(self, x):
        return torch.stack(self.turn(x[..., 0::2], x[..., 1::2]), dim=-1).flatten(-2)


class Attention(nn.Module):
    """The teacher's grouped-query attention."""

    def __init__(self, config, length):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, width = config.hidden_size, config.head_dim
        self.q_proj = linear(hidden, self.heads * width)
        self.k_proj = linear(hidden, self.kv_heads * width)
        self.v_proj = linear(hidden, self.kv_heads * width)
        self.o_proj = linear(self.heads * width, hidden)
        self.rotary = Rotary(width, config.rope_theta, length)

    def forward(self, x):
        q = self.rotary.rotate_halves(split_heads(self.q_proj(x), self.heads))
        k = self.rotary.rotate_halves(split_heads(self.k_proj(x), self.kv_heads))
        v = split_heads(self.v_proj(x), self.kv_heads)
        return self.o_proj(causal_attention(q, k, v))


class LatentAttention(nn.Module):
    """MLA: low-rank queries, one joint kv latent, one rotary key that all heads share."""

    def __init__(self, config, length, q_rank, kv_rank, rope_dim):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, width = config.hidden_size, config.head_dim
        nope_dim = width - rope_dim
        self.q_parts, self.down_parts = (nope_dim, rope_dim), (kv_rank, rope_dim)
        self.kv_parts = (nope_dim, width)
        self.q_down, self.q_up = linear(hidden, q_rank), linear(q_rank, self.heads * width)
        self.kv_down = linear(hidden, sum(self.down_parts))
        self.kv_up = linear(kv_rank, self.kv_heads * sum(self.kv_parts))
        self.out = linear(self.heads * width, hidden)
        self.rotary = Rotary(rope_dim, config.rope_theta, length)

    def forward(self, x):
        q_nope, q_rope = split_heads(self.q_up(self.q_down(x)), self.heads).split(self.q_parts, dim=-1)
        latent, k_rope = self.kv_down(x).split(self.down_parts, dim=-1)
        k_nope, v = split_heads(self.kv_up(latent), self.kv_heads).split(self.kv_parts, dim=-1)
        k_rope = self.rotary.rotate_pairs(k_rope).unsqueeze(1).expand(-1, self.kv_heads, -1, -1)
        q = torch.cat((q_nope, self.rotary.rotate_pairs(q_rope)), dim=-1)
        return self.out(causal_attention(q, torch.cat((k_nope, k_rope), dim=-1), v))


def chunked_ssd(x, log_decay, b, c):
    """The outputs y_t = S_t c_t of S_t = exp(log_decay_t) S_{t-1} + x_t b_t^T, chunk by chunk.

    x, b, c: [batch, time, heads, width]; log_decay: [batch, time, heads].
    """
    x, b, c, log_decay = (t.unflatten(1, (-1, CHUNK)).transpose(2, 3) for t in (x, b, c, log_decay))
    total = log_decay.cumsum(dim=-1)  # [batch, chunk, heads, time within the chunk]
    future = torch.full((CHUNK, CHUNK), -math.inf, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2) + future).exp()
    within = (c @ b.mT * decay) @ x

    to_chunk_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    added = b.mT @ (x * to_chunk_end)  # S^T that each chunk adds: [batch, chunk, heads, width, width]
    chunk_decay = total[..., -1, None, None].exp()
    entering = [torch.zeros_like(added[:, 0])]
    for chunk in range(added.shape[1] - 1):
        entering.append(entering[-1] * chunk_decay[:, chunk] + added[:, chunk])
    across = (c * total.exp().unsqueeze(-1)) @ torch.stack(entering, dim=1)
    return (within + across).transpose(2, 3).flatten(1, 2)


class Mamba2(nn.Module):
    """Mamba2 with a state group per head; x and B have the teacher's kv heads, repeated."""

    def __init__(self, config):
        super().__init__()
        hidden, self.width, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        self.repeat = heads // config.num_key_value_heads
        inner, grouped = heads * self.width, config.num_key_value_heads * self.width
        self.xbc_parts = (grouped, grouped, inner)
        channels = sum(self.xbc_parts)
        self.in_parts = (inner, channels, heads)
        self.in_proj, self.out_proj = linear(hidden, sum(self.in_parts)), linear(inner, hidden)
        self.conv_weight = nn.Parameter(torch.empty(CONV_WIDTH, channels).uniform_(-0.5, 0.5))
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-0.5, 0.5))
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads, 1))
        self.norm_weight = nn.Parameter(torch.ones(inner))

    def causal_conv(self, x):
        # Shifted multiply-adds: on CPU faster than conv1d, whose layout needs two transposes.
        padded, y = F.pad(x, (0, 0, CONV_WIDTH - 1, 0)), self.conv_bias
        for tap in range(CONV_WIDTH):
            y = torch.addcmul(y, padded[:, tap:tap + x.shape[1]], self.conv_weight[tap])
        return y

    def forward(self, u):
        z, xbc, dt = self.in_proj(u).split(self.in_parts, dim=-1)
        xbc = F.silu(self.causal_conv(xbc)).split(self.xbc_parts, dim=-1)
        x, b, c = (t.unflatten(-1, (-1, self.width)) for t in xbc)
        x, b = x.repeat_interleave(self.repeat, dim=2), b.repeat_interleave(self.repeat, dim=2)
        dt = F.softplus(dt + self.dt_bias)
        y = chunked_ssd(x * dt.unsqueeze(-1), -self.A_log.exp() * dt, b, c) + self.D * x
        y = F.rms_norm(y * F.silu(z).view_as(y), (self.width,), eps=1e-5)
        return self.out_proj(y.flatten(2) * self.norm_weight)


class Layer(nn.Module):
    def __init__(self, config, mixer):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.self_attn = mixer
        self.mlp = nn.ModuleDict({"gate_proj": linear(hidden, inner), "up_proj": linear(hidden, inner),
                                  "down_proj": linear(inner, hidden)})
        self.input_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)

    def forward(self, x):
        return self.outputs(x)[0]

    def outputs(self, x):
        """What the layer gives, and what its mixer gives."""
        mixed = self.self_attn(self.input_layernorm(x))
        x = x + mixed
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h)), mixed


class LanguageModel(nn.Module):
    """A decoder with tied embeddings whose parameters are named as in Hugging Face's Llama."""

    def __init__(self, config, mixers):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.Sequential(*(Layer(config, mixer) for mixer in mixers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids):
        x = self.norm(self.layers(self.embed_tokens(ids)))
        return F.linear(x, self.embed_tokens.weight)


def load_teacher(folder, length):
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    assert config.tie_word_embeddings, "the teacher's embeddings must be tied"
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    teacher = LanguageModel(config, [Attention(config, length) for _ in range(config.num_hidden_layers)])
    weights = load_file(folder / "model.safetensors")
    teacher.load_state_dict({name.removeprefix("model."): weight.float()
                             for name, weight in weights.items() if name != "lm_head.weight"})
    return config, teacher.requires_grad_(False)


def new_student(config, args):
    query_rank = min(config.hidden_size, config.num_attention_heads * config.head_dim)
    q_rank = args.q_rank or min(math.ceil(query_rank * 3 / 4 / 8) * 8, query_rank)
    return LanguageModel(config, [
        LatentAttention(config, args.seq_len, q_rank, args.kv_rank, args.rope_dim)
        if layer in args.mla else Mamba2(config) for layer in range(config.num_hidden_layers)])


def timed_ild_step(teacher, student, lessons, optimizer, ids, clock):
    """The same of a step of ILD; `lessons`: a function of every layer, from the teacher's layer's input and outputs to the loss."""
    marks = [clock()]
    with torch.no_grad():
        x, taught = teacher.embed_tokens(ids), []
        for layer in teacher.layers:
            given = layer.outputs(x)
            taught.append((x, *given))
            x = given[0]
        taught[-1] = (taught[-1][0], teacher.norm(x), taught[-1][2])
    marks.append(clock())
    backward = 0.0
    for layer, lesson, of_layer in zip(student.layers, lessons, taught):
        loss = lesson(*of_layer)
        begun = clock()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0, error_if_nonfinite=True)
        backward += clock() - begun
    marks.append(clock() - backward)
    marks.append(clock())
    optimizer.step()
    optimizer.zero_grad()
    marks.append(clock())
    return [end - start for start, end in zip(marks, marks[1:])]


def lesson(layer, norm):
    """The loss of a layer; `norm`: what follows the last one."""
    def relative(x, target):
        return (x - target).square().sum() / target.square().sum()

    def loss(x, hidden, mixed):
        out, own = layer.outputs(x)
        return relative(out if norm is None else norm(out), hidden) + relative(own, mixed)
    return loss


def timed_step(teacher, student, optimizer, ids, clock):
    """Takes one step and returns its seconds per phase, in the order of PHASES."""
    marks = [clock()]
    with torch.no_grad():
        target = F.log_softmax(teacher(ids), dim=-1)
    marks.append(clock())
    predicted = F.log_softmax(student(ids), dim=-1)
    loss = F.kl_div(predicted, target, reduction="sum", log_target=True) / ids.numel()
    marks.append(clock())
    loss.backward()
    marks.append(clock())
    nn.utils.clip_grad_norm_(student.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    marks.append(clock())
    return [end - start for start, end in zip(marks, marks[1:])]


def main():
    parser = argparse.ArgumentParser(description="Time one KD or ILD step of a hybrid student in PyTorch.")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--mla", type=lambda text: [int(i) for i in text.split(",")], default=[2])
    parser.add_argument("--q-rank", type=int, help="default: 3/4 of the teacher's query rank")
    for option, default in {"kv-rank": 16, "rope-dim": 8, "seq-len": 256, "batch-size": 16,
                            "steps": 8, "warmup": 2, "threads": 2}.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stage", choices=["kd", "ild"], default="kd")
    parser.add_argument("--compile", action="store_true", help="by torch.compile instead of eagerly")
    args = parser.parse_args()
    if args.seq_len % CHUNK:
        parser.error(f"--seq-len must be a multiple of {CHUNK}")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config, teacher = load_teacher(args.teacher, args.seq_len)
    teacher, student = teacher.to(args.device), new_student(config, args).to(args.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    compiled = torch.compile if args.compile else lambda model: model
    if args.stage == "ild":
        last = config.num_hidden_layers - 1
        for layer in teacher.layers:
            layer.outputs = compiled(layer.outputs)
        lessons = [compiled(lesson(layer, teacher.norm if i == last else None)) for i, layer in enumerate(student.layers)]

        def step(ids):
            return timed_ild_step(teacher, student, lessons, optimizer, ids, clock)
    else:
        teacher, student = compiled(teacher), compiled(student)

        def step(ids):
            return timed_step(teacher, student, optimizer, ids, clock)

    def clock():
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    steps = []
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(config.vocab_size, (args.batch_size, args.seq_len), device=args.device)
        steps.append(step(ids))
    del steps[:args.warmup]
    tokens = args.batch_size * args.seq_len
    print(json.dumps({
        "tokens_per_s": statistics.median(tokens / sum(phases) for phases in steps),
        "seconds": {name: statistics.median(times) for name, times in zip(PHASES, zip(*steps))},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in student.parameters()),
    }, indent=2))


if __name__ == "__main__":
    main()
