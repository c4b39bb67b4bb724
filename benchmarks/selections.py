"""What each selection keeps of the demonstration model's attention to a long text.

``python benchmarks/selections.py [--windows N] [--context N] [--budget SHARE] [RECIPE ...]`` prints
a Markdown table over windows of held-out prose. A window's last 64 tokens are given one by one
after the others, the prompt. Columns: entries that a head holds of the prompt, on average and at
most; the share of the tokens' attention to the prompt that falls on what is kept (of an exact run;
merging keeps a part of everything, so none is given); the relative error of attention's outputs
over the prompt's entries as selected and all later ones; how often the likeliest next token is that
of the uncompressed cache, in the engine, selections while decoding included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from quire import SamplingParams
from quire.api.setup import Setup
from quire.attention.composed import partial, weigh
from quire.engine.engine import Engine
from quire.engine.facts import make_facts
from quire.engine.request import EngineRequest, EngineResult
from quire.kernels import native
from quire.kv.method import Entries, Facts, Seen, Select, join
from quire.kv.recipes import parse
from quire.models import rope
from quire.models.decoder import Decoder
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES
from quire.schedule.state import Sequence as Seq
from training.train import read_text

GIVEN = 64  # tokens after the prompt
RECIPES = (
    "streaming(budget={b})",
    "h2o(budget={b})",
    "h2o(budget={b},every=1)",
    "h2o(budget={b},fair=true)",
    "scissorhands(budget={b},drop=0.0)",
    "scissorhands(budget={b})",
    "snapkv(budget={b})",
    "snapkv(budget={b},tilt=-0.5)",
    "prefixkv(budget={b})",
    "elastic(budget={b})",
    "elastic(budget={b},merge=false)",
    "elastic(budget={b},unrotate=true)",
    "elastic(budget={b},reach=4)",
    "kvmerger(budget={b},eps=-1.0)",
    "kvmerger(budget={b},eps=-1.0,value_mass=false)",
    "kvmerger(budget={b},eps=-1.0,value_mass=false,mass_bias=true)",
    "kvmerger(budget={b})",
    "chelsea(budget={b})",
    "chelsea(budget={b},mass_bias=true)",
    "chelsea(budget={b},mass_bias=true,unrotate=true)",
    "gemfilter(budget={b})",
)


@dataclass
class Exact:
    """An exact run over a window: of each layer rotated ``queries`` ``[tokens, heads, d]``, and
    ``keys``, ``values`` ``[kv_heads, tokens, d]``, float32.
    """

    model: Decoder
    facts: Facts
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)

    def run(self, ids: Tensor) -> Exact:
        """Run the model over a window's ``ids``."""
        self.model.forward(ids, torch.arange(len(ids)), self._attend)
        return self

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Any) -> Tensor:
        q, k = (rope.rotate(x, *rotation) for x in (q, k))
        self.queries.append(q.float())
        self.keys.append(k.float().transpose(0, 1))
        self.values.append(v.float().transpose(0, 1))
        entries, at = self.entries(layer, 0, len(q)), torch.arange(len(q))
        seen = entries.positions <= at[:, None, None]
        return partial(q, entries, scale=self.facts.scale, softcap=None, visible=seen).out.to(q)

    def entries(self, layer: int, start: int, stop: int) -> Entries:
        """The entries of the tokens ``[start, stop)``."""
        at = torch.arange(start, stop).expand(self.facts.kv_heads, -1)
        return Entries(self.keys[layer][:, start:stop], self.values[layer][:, start:stop], at)

    def weights(self, layer: int, entries: Entries, start: int, stop: int) -> Tensor:
        """Of the tokens' queries: ``[rows, kv_heads, group, n]``."""
        seen = entries.positions <= torch.arange(start, stop)[:, None, None]
        q = self.queries[layer][start:stop]
        scores = weigh(q, entries, scale=self.facts.scale, softcap=None, visible=seen)
        return scores.softmax(-1)

    def seen(self, prompt: int, window: int) -> Seen:
        """The prompt as a method is shown it."""
        if not self.mass:
            for layer in range(self.facts.layers):
                weights = self.weights(layer, self.entries(layer, 0, prompt), 0, prompt)
                self.mass.append(weights.sum((0, 2)))
        return Seen(
            self.facts,
            prompt,
            prompt,
            lambda layer: self.entries(layer, 0, prompt),
            lambda layer: self.queries[layer][max(0, prompt - window) : prompt],
            self.mass.__getitem__,
        )


def kept(exact: Exact, method: Select, prompt: int) -> tuple[float, float, float, float]:
    """Entries a head on average and at most, the share of attention kept, the outputs' error."""
    found = method.select(exact.seen(prompt, method.window))
    assert found is not None
    total = prompt + GIVEN
    counts, shares, errors = [], [], []
    for layer, choice in enumerate(found):
        whole = exact.entries(layer, 0, total)
        entries = choice if isinstance(choice, Entries) else whole.take(choice)
        heads = [len(entries.head(h)) for h in range(exact.facts.kv_heads)]
        counts += heads
        weights = exact.weights(layer, whole, prompt, total)
        for head in range(exact.facts.kv_heads):
            if not isinstance(choice, Entries):
                old = weights[:, head, :, :prompt]
                shares.append(float(old[..., choice[head]].sum() / old.sum()))
        right, mine = (
            partial(
                exact.queries[layer][prompt:],
                held,
                scale=exact.facts.scale,
                softcap=None,
                visible=held.positions <= torch.arange(prompt, total)[:, None, None],
            ).out
            for held in (whole, join([entries, exact.entries(layer, prompt, total)]))
        )
        errors.append(float((mine - right).norm() / right.norm()))
    return np.mean(counts), max(counts), np.mean(shares) if shares else np.nan, np.mean(errors)


class Given(Engine):
    """An engine whose only sequence says what it is given; ``said``: what it would have."""

    tokens: Sequence[int] = ()

    def _accept(self, seq: Seq, token: int, detail: Any) -> EngineResult | None:
        self.said.append(token)
        return super()._accept(seq, self.tokens[len(seq.output)], detail)

    def follow(self, prompt: list[int], given: list[int]) -> list[int]:
        """Run to the end of ``given``; what the model would have said."""
        self.said: list[int] = []
        self.tokens = given
        params = SamplingParams(temperature=0.0, max_tokens=len(given), ignore_eos=True)
        self.add([EngineRequest(0, np.array(prompt, dtype=np.int32), params, 0)])
        while self.unfinished:
            self.step()
        return self.said


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="{b} stands for the budget")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=0.25)
    args = parser.parse_args()
    native.configure()
    setup = Setup.make("demo")
    model = load_model(setup.folder)
    facts = make_facts(model, setup.tokenizer)
    ids = setup.tokenizer.encode(read_text("books", held_out=True))
    windows = [ids[i * args.context : (i + 1) * args.context] for i in range(args.windows)]
    prompt = args.context - GIVEN
    options = {"policy": POLICIES["batch"], "kv_bytes": 64 << 20, "chunk": 512}
    with torch.inference_mode():
        exact = [Exact(model, facts).run(torch.tensor(window)) for window in windows]
        engine = Given(model, None, **options)
        reference = [engine.follow(w[:prompt], w[prompt:]) for w in windows]
        print("| recipe | entries | at most | attention kept | output error | same token |")
        print("|---|---:|---:|---:|---:|---:|")
        for text in args.recipes:
            name = text.format(b=args.budget)
            recipe = parse(name)
            engine = Given(model, None, recipe=recipe, **options)
            said = [engine.follow(w[:prompt], w[prompt:]) for w in windows]
            same = np.mean(np.array(said) == np.array(reference))
            cells = [""] * 4
            if recipe.select is not None:
                found = np.mean([kept(e, recipe.select, prompt) for e in exact], axis=0)
                share = "" if np.isnan(found[2]) else f"{found[2]:.1%}"
                cells = [f"{found[0]:.0f}", f"{found[1]:.0f}", share, f"{found[3]:.3f}"]
            print(f"| `{name}` | {' | '.join(cells)} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    main()
