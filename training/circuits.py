"""Recall circuits, written into the weights before training sharpens them.

A small model finds "look for the last time this happened, and copy what came next" only after
long training. The circuit is well known (induction heads, Olsson et al., arXiv 2209.11895), so it
is put in place by construction and then trained like every other weight:

- layer 0, heads 0 and 1 attend one and two tokens back (through the fast rotary pairs and a
  constant direction of the embedding) and write a code of that token into the residual stream;
- layer 1, head 0 looks for positions whose previous token is the current token, head 2 for
  positions whose last but one is the current token's previous one; both copy the token found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.model import Demo, DemoShape

CODE = 32  # numbers in a token's code; one slow rotary dimension each
FAST_PAIRS = 6  # rotary pairs by which the look-back heads tell offsets
LOOK_BACK = 100.0  # score of the right offset
MATCH = 30.0  # mean score of equal codes
COPY = 3.0  # strength of a copied token


@torch.no_grad()
def install(model: Demo, shape: DemoShape) -> None:
    """Write the circuits into ``model``, in place."""
    backbone = model.model
    embedding = backbone.embed_tokens.weight
    embedding -= embedding.mean(0)  # a constant shift of all logits
    _, spread, axes = torch.linalg.svd(embedding, full_matrices=True)
    spread = spread / len(embedding) ** 0.5  # standard deviation along each axis
    code, first, second = axes[:CODE], axes[-1 - CODE : -1], axes[-1 - 2 * CODE : -1 - CODE]
    constant = axes[-1]
    size = float(embedding.square().sum(1).mean().sqrt())
    embedding += 0.7 * size * constant

    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(CODE, CODE, generator=generator)).Q
    read_code = turn @ (code / spread[:CODE, None])  # [code, hidden]: unit variance
    scale = float(embedding.square().mean(1).sqrt().mean())  # what the norm divides by
    read_code = read_code * scale
    one = constant * scale / (0.7 * size)  # reads 1 from every token

    lower, upper = backbone.layers[0], backbone.layers[1]
    width, half = shape.head_dim, shape.head_dim // 2
    gain = lower.input_layernorm.weight
    step = torch.zeros(width)
    step[:FAST_PAIRS] = FAST_PAIRS**-0.5
    strength = (LOOK_BACK * width**0.5) ** 0.5
    attention = lower.self_attn
    attention.k_proj.weight[:width] = strength * torch.outer(_turned(step, 1, shape), one / gain)
    for head, back in ((0, 0), (1, -1)):
        rows = slice(head * width, (head + 1) * width)
        attention.q_proj.weight[rows] = strength * torch.outer(
            _turned(step, back, shape), one / gain
        )
    attention.v_proj.weight[:width] = 0.0
    attention.v_proj.weight[:CODE] = read_code / gain
    # Nothing else in layer 0 may write where the codes are.
    reserved = torch.cat([code, first, second, constant[None]])
    for matrix in (attention.o_proj.weight, lower.mlp.down_proj.weight):
        matrix -= reserved.T @ (reserved @ matrix)
    written = size * 0.5 * CODE**-0.5
    attention.o_proj.weight[:, : 2 * width] = 0.0
    attention.o_proj.weight[:, :CODE] = written * first.T
    attention.o_proj.weight[:, width : width + CODE] = written * second.T

    ids = torch.arange(shape.vocab)[torch.randperm(shape.vocab, generator=generator)][None]
    cos, sin = model.cos[: ids.shape[1]], model.sin[: ids.shape[1]]
    after = lower(backbone.embed_tokens(ids), cos, sin)
    scale = float(after.square().mean(-1).sqrt().mean())
    gain = upper.input_layernorm.weight
    slow = torch.zeros(width, CODE)
    slow[
        torch.cat(
            [
                torch.arange(CODE // 2) + half - CODE // 2,
                torch.arange(CODE // 2) + width - CODE // 2,
            ]
        )
    ] = torch.eye(CODE)
    strength = (MATCH * width**0.5 / CODE) ** 0.5
    now = read_code / float(embedding.square().mean(1).sqrt().mean()) * scale
    back_one, back_two = first * scale / written, second * scale / written
    attention = upper.self_attn
    attention.q_proj.weight[:width] = strength * slow @ now / gain
    attention.k_proj.weight[:width] = strength * slow @ back_one / gain
    attention.q_proj.weight[2 * width : 3 * width] = strength * slow @ back_one / gain
    attention.k_proj.weight[width:] = strength * slow @ back_two / gain
    token = axes[:CODE] / spread[:CODE, None]  # tells tokens apart, frequent or rare
    attention.v_proj.weight.zero_()
    copied = token.T * float(spread[:CODE].square().sum().sqrt() / CODE**0.5)
    copied = copied / copied.norm() * CODE**0.5  # columns of length about one
    for head, rows in ((0, 0), (2, width)):
        attention.v_proj.weight[rows : rows + CODE] = token * scale / gain
        attention.o_proj.weight[:, head * width : (head + 1) * width] = 0.0
        columns = slice(head * width, head * width + CODE)
        attention.o_proj.weight[:, columns] = COPY * size * CODE**-0.5 * copied


def _turned(vector: Tensor, tokens: int, shape: DemoShape) -> Tensor:
    """``vector`` ``[head_dim]`` rotated as at position ``tokens``."""
    half = shape.head_dim // 2
    angle = tokens * shape.rope_theta ** (-torch.arange(half) / half)
    low, high = vector[:half], vector[half:]
    return torch.cat(
        [low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()]
    )
