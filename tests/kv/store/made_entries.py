"""Entries of random models, their facts, and runs of stores in the engine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "engine"))

from test_engine import pages_needed, random_requests, run, tokens

from quire import LLM, SamplingParams
from quire.kv.method import Entries, Facts
from quire.kv.recipes import parse
from quire.kv.store.parts import Composite
from toy import MockModel, spec


def make_entries(facts: Facts, n: int, seed: int = 0, first: int = 0) -> list[Entries]:
    """Keys whose channels have sizes and middles of their own, and values that have not."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = []
    for _ in range(facts.layers):
        heads, dim = facts.kv_heads, facts.head_dim
        keys = draw(heads, n, dim) * draw(heads, 1, dim).exp() + 2 * draw(heads, 1, dim)
        places = torch.arange(first, first + n).expand(heads, -1)
        found.append(
            Entries(keys.to(facts.dtype), draw(heads, n, dim).to(facts.dtype), places),
        )
    return found


def scattered(entries: list[Entries], factor: int = 3) -> list[Entries]:
    """The same at positions that are not neighbours'."""
    return [replace(e, positions=e.positions * factor) for e in entries]


def error(x: Tensor, y: Tensor) -> float:
    """Of y, relative to x (Frobenius)."""
    return float((x.double() - y.double()).norm() / x.double().norm())


def rounded(x: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """Each number of ``x``, of 3 axes, rounded between its group's least and largest."""
    out = torch.empty(x.shape, dtype=torch.float64)
    parts = x.double().movedim(axis, -1)
    places = out.movedim(axis, -1)
    for i in range(parts.shape[0]):
        for j in range(parts.shape[1]):
            for start in range(0, parts.shape[2], group):
                part = parts[i, j, start : start + group]
                low, high = float(part.min()), float(part.max())
                step = (high - low) / (2**bits - 1)
                codes = ((part - low) / step).round() if step else torch.zeros_like(part)
                places[i, j, start : start + group] = low + codes * step
    return out


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of which packed entries are read from now on."""
    read: list[int] = []
    plain = Composite.read

    def reading(self: Composite, layer: int, index: Tensor | None = None) -> Entries:
        read.append(layer)
        return plain(self, layer, index)

    monkeypatch.setattr(Composite, "read", reading)
    return read


def check_in_the_engine(
    text: str, monkeypatch: pytest.MonkeyPatch, layers: int = 2, seeds: tuple[int, ...] = (3, 8)
) -> None:
    """A mock model under ``text``: what it stores is read, whatever the memory and the chunks."""
    recipe = parse(text)
    read = watch_reads(monkeypatch)
    for seed in seeds:
        requests = random_requests(seed)
        wanted = None
        for chunk, extra, windows in ((512, 1000, None), (7, 1000, None), (16, 0, 2)):
            pages = (max(map(pages_needed, requests)) + extra) * layers // 2  # of two layers'
            model = MockModel(spec(layers))
            found, _ = run(
                requests, model=model, recipe=recipe, pages=pages, chunk=chunk, windows=windows
            )
            assert sorted(found) == [r.id for r in requests]
            if extra:
                assert wanted in (None, tokens(found))
                wanted = tokens(found)
    assert set(read) == set(range(layers))


def check_demonstration_model(text: str, monkeypatch: pytest.MonkeyPatch, least: float) -> None:
    """Prompts with a common beginning, several samples: mostly the tokens of the full cache."""
    read = watch_reads(monkeypatch)
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 4
    prompts = [story + end for end in ("Then", "The dog barked and", "She said that")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    outputs = []
    for kv, chunk, memory in (("none", 512, "64MiB"), (text, 512, "64MiB"), (text, 33, "1MiB")):
        options: dict[str, Any] = {"kv": kv, "kv_memory": memory, "chunk": chunk}
        with LLM("demo", dtype="float32", **options) as llm:
            made = llm.generate(prompts, params)
        outputs.append([token for o in made for token in o.outputs[0].token_ids])
    assert read
    for found in outputs[1:]:
        same = sum(a == b for a, b in zip(found, outputs[0], strict=True))
        assert same >= least * len(found)
