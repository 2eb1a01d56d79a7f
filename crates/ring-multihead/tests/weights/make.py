"""Writes the files that the test loads: state dicts made by modules of PyTorch, and what these modules compute, in float64.

    python make.py        (PyTorch 2; files go beside this script)

Attention is computed from its definition, pair by pair, unless PyTorch has a class for it.
"""

import json
import math
import pathlib
import struct

import torch
from torch import nn
from torch.nn import functional

HERE = pathlib.Path(__file__).parent
EMBED, HEADS, HIDDEN, LENGTH, VOCABULARY = 32, 4, 40, 48, 16
SEGMENT_LENGTHS, DILATION_RATES = (16, 48), (1, 2)


def write_safetensors(name, tensors):
    """The format: length of the header, header in JSON, data."""
    header, data = {}, b""
    for key, tensor in tensors.items():
        raw = tensor.detach().contiguous().to(torch.float32).numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (HERE / name).write_bytes(struct.pack("<Q", len(text)) + text + data)


def selected(head, heads, branch, mixing, offsets):
    """Positions of a branch that a key/value head selects, with their segments; none if the head lacks the branch."""
    length, rate = SEGMENT_LENGTHS[branch], DILATION_RATES[branch]
    if mixing == "head-groups":
        groups = len(DILATION_RATES)
        if head // (heads // groups) != branch:
            return {}
        offset = branch % rate
    else:
        offset = head % rate if offsets == "cyclic" else head // math.ceil(heads / rate)
    return {n: n // length for n in range(LENGTH) if n % length % rate == offset}


def dilated(query, key, value, mixing, offsets="cyclic", scale=None):
    """Causal dilated attention of [batch, heads, positions, head size]."""
    heads, kv_heads = query.shape[1], key.shape[1]
    multiplicity = torch.zeros(heads, LENGTH, LENGTH, dtype=torch.float64)
    for head in range(heads):
        for branch in range(len(DILATION_RATES)):
            rows = selected(head * kv_heads // heads, kv_heads, branch, mixing, offsets)
            for n, segment in rows.items():
                for m, other in rows.items():
                    multiplicity[head, n, m] += float(segment == other and m <= n)
    key, value = (tensor.repeat_interleave(heads // kv_heads, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    weights = multiplicity * torch.exp(scores)
    sums = weights.sum(-1, keepdim=True)
    output = torch.where(sums > 0, weights @ value / sums.clamp_min(1e-300), 0.0)
    return output / (len(DILATION_RATES) if mixing == "head-groups" else 1)


def rotated(tensor):
    """Rotary positions; element i goes with element i + head size / 2."""
    half = tensor.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequencies
    first, second = tensor[..., :half], tensor[..., half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


class Attention(nn.Module):
    """Four projections, and a norm of any name before the last."""

    def __init__(self, norm=None, kv_heads=HEADS, bias=True):
        super().__init__()
        size = EMBED // HEADS * kv_heads
        self.q_proj = nn.Linear(EMBED, EMBED, bias=bias)
        self.k_proj = nn.Linear(EMBED, size, bias=bias)
        self.v_proj = nn.Linear(EMBED, size, bias=bias)
        self.out_proj = nn.Linear(EMBED, EMBED, bias=bias)
        self.norm_name, self.kv_heads = norm, kv_heads
        if norm:
            setattr(self, norm, nn.LayerNorm(EMBED))

    def forward(self, x, mixing, rotary=False, **options):
        split = lambda projected, heads: projected.unflatten(-1, (heads, -1)).transpose(1, 2)
        query, key = split(self.q_proj(x), HEADS), split(self.k_proj(x), self.kv_heads)
        if rotary:
            query, key = rotated(query), rotated(key)
        attended = dilated(query, key, split(self.v_proj(x), self.kv_heads), mixing, **options)
        attended = attended.transpose(1, 2).flatten(-2)
        return self.out_proj(getattr(self, self.norm_name)(attended) if self.norm_name else attended)


class EncoderLayer(nn.Module):
    """A layer under the names of dilated-attention-pytorch."""

    def __init__(self):
        super().__init__()
        self.norm1, self.self_attn, self.norm2 = nn.LayerNorm(EMBED), Attention("norm"), nn.LayerNorm(EMBED)
        self.linear1, self.norm3, self.linear2 = nn.Linear(EMBED, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, EMBED)

    def forward(self, x, **options):
        x = x + self.self_attn(self.norm1(x), **options)
        return x + self.linear2(self.norm3(functional.gelu(self.linear1(self.norm2(x)))))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.ffn_layernorm, self.fc2 = nn.Linear(EMBED, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, EMBED)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(functional.gelu(self.fc1(x))))


class DecoderLayer(nn.Module):
    """A layer under the names of torchscale."""

    def __init__(self):
        super().__init__()
        self.self_attn_layer_norm, self.self_attn = nn.LayerNorm(EMBED), Attention("inner_attn_ln")
        self.final_layer_norm, self.ffn = nn.LayerNorm(EMBED), FeedForward()

    def forward(self, x, **options):
        x = x + self.self_attn(self.self_attn_layer_norm(x), **options)
        return x + self.ffn(self.final_layer_norm(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, EMBED)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(2))
        self.layer_norm = nn.LayerNorm(EMBED)
        self.output_projection = nn.Linear(EMBED, VOCABULARY, bias=False)

    def forward(self, tokens, **options):
        x = stacked(self.layers, self.embed_tokens(tokens), **options)
        return self.output_projection(self.layer_norm(x))


def stacked(layers, x, **options):
    for layer in layers:
        x = layer(x, **options)
    return x


def drawn(module, dtype=torch.float32):
    """The module with every parameter drawn, norms and biases too, as a file of that type keeps it."""
    for name, parameter in module.named_parameters():
        values = torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3)
        is_gain = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = (values + float(is_gain)).to(dtype).to(torch.float32)
    return module


def wrapped(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def main():
    torch.manual_seed(11)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    x = torch.randn(1, LENGTH, EMBED).double()
    tokens = torch.randint(VOCABULARY, (1, LENGTH))
    expected = {"input": x, "tokens": tokens}

    attention = drawn(Attention("norm"))
    torch.save(attention.state_dict(), HERE / "projections.pt")
    expected["projections"] = attention.double()(x, mixing="longnet")

    attention = drawn(Attention(), torch.bfloat16)
    state = {}
    for parameter in ("weight", "bias"):
        parts = [getattr(attention, part + "_proj") for part in "qkv"]
        state["qkv_proj." + parameter] = torch.cat([getattr(part, parameter).data for part in parts])
        state["out_proj." + parameter] = getattr(attention.out_proj, parameter).data
    state = {name: tensor.bfloat16() for name, tensor in wrapped("module.", state).items()}
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}}
    torch.save({"model": state, "optimizer": moments, "epoch": 3}, HERE / "fused.pt")
    expected["fused"] = attention.double()(x, mixing="head-groups")

    attention = drawn(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    write_safetensors("in_proj.safetensors", attention.state_dict())
    expected["in_proj"] = attention.double()(x, x, x, attn_mask=causal, need_weights=False)[0]

    attention = drawn(Attention(kv_heads=2, bias=False))
    write_safetensors("grouped.safetensors", attention.state_dict())
    expected["grouped"] = attention.double()(x, mixing="longnet", scale=0.5)

    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, HIDDEN, dropout=0.0, activation="gelu", layer_norm_eps=0.01, batch_first=True, norm_first=True
    )
    torch.save(drawn(layer).state_dict(), HERE / "layer.pt")
    expected["layer"] = layer.double()(x, src_mask=causal)

    layers = drawn(nn.ModuleList(EncoderLayer() for _ in range(2)))
    state = wrapped("encoder.layers.", layers.state_dict())
    other = {"decoder.layers.0.norm1.weight": torch.ones(EMBED)}
    torch.save(state | other, HERE / "encoder.pt")
    expected["encoder"] = stacked(layers.double(), x, mixing="head-groups")

    decoder = drawn(Decoder())
    write_safetensors("decoder.safetensors", wrapped("decoder.", decoder.state_dict()))
    expected["decoder.blocks"] = stacked(decoder.double().layers, x, mixing="longnet", offsets="blocked")
    expected["decoder"] = decoder(tokens, mixing="longnet", rotary=True)

    write_safetensors("expected.safetensors", expected)


if __name__ == "__main__":
    with torch.no_grad():
        main()
