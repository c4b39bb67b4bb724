"""Sampling for a whole batch at once. Each option costs only for the rows that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.decode.grammar import Matcher
from quire.decode.params import SamplingParams
from quire.decode.rng import uniform
from quire.kernels import native
from quire.kernels import sampling as kernels

_LOWEST = -1e30  # a bias after which a token loses against any other


@dataclass
class RowState:
    """One sequence that samples. ``prompt`` int32 [tokens]; ``output`` the tokens so far.

    ``matcher``, with its mask computed, says which tokens its structure allows.
    """

    params: SamplingParams
    seed: int
    prompt: NDArray[np.int32]
    output: list[int]
    eos_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    matcher: Matcher | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of ``token``, its rank from 1, and the likeliest tokens, best first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampled:
    """One token a row, and its log-probabilities where the row asked for them."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits: Tensor, rows: Sequence[RowState]) -> Sampled:
    """Choose the next token of every row. ``logits`` float32 ``[rows, vocab]``; overwritten.

    In this order: logit bias; repetition penalty over prompt and output (positive logits divided,
    negative multiplied, Keskar et al. 2019), presence and frequency penalties over the output; what
    the row's structure does not allow is masked, then bad words and, before ``min_tokens``, stop
    tokens; temperature; top-k; top-p; min-p; then one inverse-CDF draw from the row's own random
    stream. Temperature 0 takes the largest logit before the temperature step, the lowest id on a
    tie. If bad words and ``min_tokens`` leave a row no token, they are ignored for it: the
    structure is not.
    """
    if not rows:
        return Sampled([], [])
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[scored].clone() if scored else logits
    _add_bias(logits, rows)
    _penalise(logits, rows)
    _constrain(logits, rows)
    _mask(logits, rows)
    chosen = kernels.argmax(logits) if native.fits(logits) else logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen[index] = _draw(logits[index], [rows[i] for i in drawn])
    tokens: list[int] = chosen.tolist()
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if scored:
        targets = chosen[torch.tensor(scored, device=logits.device)]
        counts = [rows[i].params.logprobs or 0 for i in scored]
        for i, entry in zip(scored, _score(raw, targets, counts), strict=True):
            found[i] = entry
    return Sampled(tokens, found)


def prompt_logprobs(logits: Tensor, targets: Tensor, k: int) -> list[TokenLogprobs]:
    """Score given tokens: ``logits`` float32 [tokens, vocab], ``targets`` int64 [tokens]."""
    return _score(logits, targets, [k] * len(targets))


def _score(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.log_softmax(-1)
    mine = logprobs.gather(1, targets[:, None])
    ranks = (logprobs > mine).sum(-1) + 1
    best = logprobs.topk(min(max(counts, default=0), logits.shape[1]), dim=-1)
    rows = zip(
        targets.tolist(),
        mine[:, 0].tolist(),
        ranks.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        counts,
        strict=True,
    )
    return [
        TokenLogprobs(token, value, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, value, rank, ids, values, count in rows
    ]


def _scatter(
    rows: Sequence[RowState], entries: Callable[[RowState], Sequence[tuple[int, float]]], size: int
) -> tuple[list[int], list[int], list[float]]:
    """Row indices, token ids below ``size`` and values of all rows' entries."""
    at: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for index, row in enumerate(rows):
        for token, value in entries(row):
            if 0 <= token < size:
                at.append(index)
                ids.append(token)
                values.append(float(value))
    return at, ids, values


def _add_bias(logits: Tensor, rows: Sequence[RowState]) -> None:
    def entries(row: RowState) -> list[tuple[int, float]]:
        least = -math.inf if row.matcher is None else _LOWEST  # a structure may leave no choice
        return [(token, max(value, least)) for token, value in row.params.logit_bias.items()]

    at, ids, values = _scatter(rows, entries, logits.shape[1])
    if at:
        logits[at, ids] += torch.tensor(values, device=logits.device)


def _constrain(logits: Tensor, rows: Sequence[RowState]) -> None:
    """Mask what the rows' structures do not allow."""
    matchers = {i: row.matcher for i, row in enumerate(rows) if row.matcher is not None}
    if not matchers:
        return
    masks = np.stack([matcher.mask for matcher in matchers.values()])  # int32 [rows, words]
    if native.fits(logits):
        kernels.mask(logits, list(matchers), masks)
        return
    bits = torch.from_numpy(masks).to(logits.device)[:, :, None] >> torch.arange(
        32, dtype=torch.int32, device=logits.device
    )
    allowed = (bits & 1).bool().flatten(1)[:, : logits.shape[1]]  # [rows, vocab]
    index = torch.tensor(list(matchers), device=logits.device)
    logits[index] = logits[index].masked_fill(~allowed, -math.inf)


def _mask(logits: Tensor, rows: Sequence[RowState]) -> None:
    at, ids, _ = _scatter(rows, _forbidden, logits.shape[1])
    if not at:
        return
    touched = sorted(set(at))
    before = logits[touched].clone()
    logits[at, ids] = -math.inf
    dead = (logits[touched] == -math.inf).all(-1)
    for index in dead.nonzero()[:, 0].tolist():
        logits[touched[index]] = before[index]


def _forbidden(row: RowState) -> list[tuple[int, float]]:
    """Tokens that the row may not take now: early stops, and last tokens of bad words."""
    params, output = row.params, row.output
    found: list[tuple[int, float]] = []
    if len(output) < params.min_tokens:
        found += [(token, 0.0) for token in (*row.eos_ids, *params.stop_token_ids)]
    for word in row.bad_words:
        head = list(word[:-1])
        if word and output[len(output) - len(head) :] == head:
            found.append((word[-1], 0.0))
    return found


def _penalise(logits: Tensor, rows: Sequence[RowState]) -> None:
    for index, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = np.unique(np.concatenate([row.prompt, np.array(row.output, dtype=np.int32)]))
            ids = torch.from_numpy(seen[seen < logits.shape[1]]).long().to(logits.device)
            values = logits[index, ids]
            scale = params.repetition_penalty
            logits[index, ids] = torch.where(values > 0, values / scale, values * scale)
        if row.output and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = np.unique(np.array(row.output), return_counts=True)
            cost = params.presence_penalty + params.frequency_penalty * counts
            logits[index, torch.from_numpy(tokens).to(logits.device)] -= torch.from_numpy(
                cost.astype(np.float32)
            ).to(logits.device)


def _draw(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Draw one token a row: ``logits`` float32 ``[rows, vocab]`` -> int64 ``[rows]``."""
    device = logits.device
    draws = uniform([row.seed for row in rows], [len(row.output) for row in rows])
    params = [row.params for row in rows]
    if native.fits(logits):
        return kernels.sample(
            logits,
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            torch.from_numpy(draws),
        )

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    logits = logits / column([row.params.temperature for row in rows])
    _keep_top_k(logits, rows)
    _keep_top_p(logits, rows)
    if any(row.params.min_p for row in rows):
        floor = logits.amax(-1, keepdim=True) + column(
            [math.log(r.params.min_p) if r.params.min_p else -math.inf for r in rows]
        )
        logits.masked_fill_(logits < floor, -math.inf)
    mass = logits.softmax(-1).double().cumsum(-1)  # [rows, vocab]
    point = torch.from_numpy(draws).to(device)[:, None] * mass[:, -1:]
    chosen = torch.searchsorted(mass, point, right=True)[:, 0]
    # Rounding can place the point at the very end: take the last token that has any mass.
    last = (mass < mass[:, -1:]).sum(-1)
    return torch.minimum(chosen, last)


def _keep_top_k(logits: Tensor, rows: Sequence[RowState]) -> None:
    """Mask what is below each row's k-th largest logit, in place."""
    vocab = logits.shape[1]
    limits = {i: r.params.top_k for i, r in enumerate(rows) if 0 < r.params.top_k < vocab}
    for k in set(limits.values()):
        members = torch.tensor([i for i, v in limits.items() if v == k], device=logits.device)
        part = logits[members]
        floor = part.topk(k, dim=-1).values[:, -1:]
        logits[members] = part.masked_fill(part < floor, -math.inf)


def _keep_top_p(logits: Tensor, rows: Sequence[RowState]) -> None:
    """Mask all but the likeliest tokens whose mass reaches top_p, in place."""
    members = [i for i, row in enumerate(rows) if row.params.top_p < 1.0]
    if not members:
        return
    index = torch.tensor(members, device=logits.device)
    share = torch.tensor([rows[i].params.top_p for i in members], device=logits.device)[:, None]
    values, order = logits[index].sort(dim=-1, descending=True, stable=True)
    weights = values.softmax(-1)
    before = weights.cumsum(-1) - weights  # mass of the likelier tokens
    values = values.masked_fill(before >= share, -math.inf)
    logits[index] = torch.empty_like(values).scatter_(1, order, values)
