"""What KV methods may know of the model: its shape, its rotation, and a calibration run."""

from __future__ import annotations

import functools
from importlib.resources import files

import torch
from torch import Tensor

from quire.kv.method import Calibration, Facts
from quire.models import rope
from quire.models.decoder import Decoder
from quire.models.tokenizer import Tokenizer

CALIBRATION_TOKENS = 1024
FULL_STOPS = tuple(".!?…。！？")
AFTER_STOPS = " \t\r\n\"'”’»)]}*_"  # may follow in the same token


def make_facts(model: Decoder, tokenizer: Tokenizer | None) -> Facts:
    """The facts of a loaded model. Without a tokenizer, it is calibrated on random tokens."""
    spec = model.spec

    def turn(layer: int, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        kind = spec.layers[layer].rope
        if kind is None:
            return x
        at = positions.expand(x.shape[:-1]).flatten()
        cos, sin = rope.tables(kind, at)
        if back:  # the tables may hold a factor: R = f * rotation
            square = cos.square() + sin.square()
            cos, sin = cos / square, -sin / square
        flat = x.reshape(len(at), 1, x.shape[-1])
        return rope.rotate(flat.float(), cos, sin).view(x.shape).to(x.dtype)

    return Facts(
        len(spec.layers),
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        model.dtype,
        spec.scale,
        tuple(layer.window for layer in spec.layers),
        turn,
        functools.cache(lambda: _calibrate(model, tokenizer)),
        spec.softcap,
        functools.cache(lambda: _sentence_ends(spec.vocab_size, tokenizer)),
    )


def _sentence_ends(vocab: int, tokenizer: Tokenizer | None) -> Tensor | None:
    """Tokens that close with a full stop or the like, or hold a blank line; bool ``[vocab]``."""
    if tokenizer is None:
        return None
    texts = (tokenizer.token_text(token) for token in range(vocab))
    return torch.tensor(
        [text.rstrip(AFTER_STOPS).endswith(FULL_STOPS) or text.count("\n") > 1 for text in texts]
    )


def _calibrate(model: Decoder, tokenizer: Tokenizer | None) -> Calibration:
    """Run the model over the bundled text, or random tokens, with dense attention."""
    spec = model.spec
    length = min(CALIBRATION_TOKENS, spec.context)
    if tokenizer is None:
        ids = torch.randint(spec.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    else:
        text = (files("quire") / "kv" / "calibration.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer.encode(text)[:length])
    found = Calibration([], [], [])
    at = torch.arange(len(ids))

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        for kept, x in ((found.queries, q), (found.keys, k), (found.values, v)):
            kept.append(x.float().clone())
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        window = spec.layers[layer].window or len(ids)
        apart = at[:, None] - at
        visible = (apart >= 0) & (apart < window)
        group = spec.heads // spec.kv_heads
        keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q.float(), keys) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, values).to(q.dtype)

    with torch.inference_mode():
        model.forward(ids, at, attend)
    return found
