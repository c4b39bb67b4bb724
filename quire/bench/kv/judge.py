"""The judge: every recipe on the suite, beside the uncompressed cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, fsum, nan

import psutil

from quire.api.setup import Setup
from quire.bench.kv.cost import Cost, measure_cost
from quire.bench.kv.forced import Forced, Heard, divergence
from quire.bench.kv.recipes import fill
from quire.bench.kv.suite import MODES, TASKS, Question, Suite, make_suite, text_windows
from quire.errors import InvalidRequestError
from quire.kernels import native
from quire.kv.arena import token_bytes
from quire.kv.method import Recipe
from quire.kv.recipes import parse
from quire.models.decoder import Decoder
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES

SEQUENCES = 4  # that bytes and speed are measured with
CHUNK = 512
PAGE_ROOM = 32  # tokens of pages that a sequence may begin without filling


@dataclass(frozen=True)
class Plan:
    """What to judge. ``rounds``: of the speed, of which the fastest counts."""

    recipes: tuple[str, ...]
    model: str = "demo"
    lengths: tuple[int, ...] = (512, 1024, 2048)
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 16
    seed: int = 0
    rounds: int = 2


@dataclass(frozen=True)
class Score:
    """One recipe on the questions of one task, mode and turn. Shares are 0 to 1.

    ``score``: right by the task's rule; ``exact``: greedy decoding writes the whole answer. Means
    over the answers' tokens are ``logprob`` (in nats), ``reciprocal_rank`` and ``agreement``: the
    likeliest token in its place is that of the uncompressed cache.
    """

    recipe: str
    length: int
    task: str
    mode: str
    turn: int
    questions: int
    chance: float
    score: float
    exact: float
    logprob: float
    reciprocal_rank: float
    agreement: float


@dataclass(frozen=True)
class Fidelity:
    """One recipe on held-out prose, beside the uncompressed cache: how often both have the same
    likeliest token, the mean divergence of the distributions in nats, and perplexity.
    """

    agreement: float
    divergence: float
    perplexity: float


@dataclass(frozen=True)
class Judged:
    """What was found of a recipe at a length; ``error`` says why it could not be run."""

    recipe: str
    length: int
    scores: list[Score] = field(default_factory=list)
    fidelity: Fidelity | None = None
    cost: Cost | None = None
    error: str | None = None


def judge(plan: Plan) -> Iterator[Judged]:
    """Judge all recipes, length by length, the uncompressed cache first.

    Raises ModelError, MemoryBudgetError or InvalidRequestError before the first result. A recipe
    that fails later is said to have failed, and the others go on.
    """
    recipes = ["none", *(r for r in dict.fromkeys(plan.recipes) if r != "none")]
    known = {(r, n): parse(fill(r, n)) for r in recipes for n in plan.lengths}
    native.configure()
    setup = Setup.make(plan.model)
    _check(plan, setup.spec.context)
    encode = setup.tokenizer.encode
    bench = _Bench(load_model(setup.folder), setup)
    for length in plan.lengths:
        suite = make_suite(plan.tasks, encode, length=length, samples=plan.samples, seed=plan.seed)
        texts = text_windows(encode, length, SEQUENCES)
        reference: list[list[Heard]] | None = None
        for text in recipes:
            recipe = known[text, length]
            try:
                heard = bench.engine(recipe, suite.tokens).follow(suite.scripts)
                cost = measure_cost(bench.engine, recipe, texts, plan.rounds)
            except Exception as error:  # a method under test may fail in any way
                if reference is None:
                    raise
                yield Judged(text, length, error=f"{type(error).__name__}: {error}")
                continue
            reference = reference or heard
            yield Judged(
                text,
                length,
                _scores(text, length, suite, heard, reference),
                _fidelity(suite, heard, reference),
                cost,
            )


def _check(plan: Plan, context: int) -> None:
    unknown = [task for task in plan.tasks if task not in TASKS]
    if unknown:
        raise InvalidRequestError(
            f"{unknown[0]!r} is not a task.",
            field="task",
            value=unknown[0],
            action=f"Known are {', '.join(TASKS)}.",
        )
    if plan.samples < 1:
        raise InvalidRequestError("samples must be at least 1.", field="samples")
    for length in plan.lengths:
        if length > context:
            raise InvalidRequestError(
                f"{length} tokens are longer than the model's context of {context}.",
                field="length",
                value=length,
                limit=context,
            )


@dataclass
class _Bench:
    """A loaded model, and engines for it."""

    model: Decoder
    setup: Setup

    def engine(self, recipe: Recipe, tokens: int) -> Forced:
        """An engine with room for ``tokens``, as far as half of the free memory allows."""
        spec = self.model.spec
        size = token_bytes(len(spec.layers), spec.kv_heads, spec.head_dim, self.model.dtype)
        wanted = (2 * tokens + PAGE_ROOM) * size  # pages that are not full, and views
        return Forced(
            self.model,
            self.setup.tokenizer,
            policy=POLICIES["batch"],
            kv_bytes=min(wanted, psutil.virtual_memory().available // 2),
            chunk=CHUNK,
            eos_ids=self.setup.tokenizer.eos_ids,
            recipe=recipe,
        )


def _scores(
    recipe: str,
    length: int,
    suite: Suite,
    heard: Sequence[Sequence[Heard]],
    reference: Sequence[Sequence[Heard]],
) -> list[Score]:
    cells: dict[Question, list[tuple[Heard, Heard]]] = {}
    for questions, mine, theirs in zip(suite.questions, heard, reference, strict=True):
        for question, a, b in zip(questions, mine, theirs, strict=False):
            cells.setdefault(question, []).append((a, b))
    order = {mode: number for number, mode in enumerate(MODES)}
    tasks = {task: number for number, task in enumerate(TASKS)}
    found = []
    for question in sorted(cells, key=lambda q: (tasks[q.task], order[q.mode], q.turn)):
        pairs = cells[question]
        found.append(
            Score(
                recipe,
                length,
                question.task,
                question.mode,
                question.turn,
                len(pairs),
                question.chance,
                mean([float(right(mine)) for mine, _ in pairs]),
                mean([float(mine.exact) for mine, _ in pairs]),
                mean([p for mine, _ in pairs for p in mine.logprobs]),
                mean([1 / rank for mine, _ in pairs for rank in mine.ranks]),
                mean(_same(pairs)),
            )
        )
    return found


def right(heard: Heard) -> bool:
    """The rule: of choices, the right one is the likeliest; else the answer is written exactly."""
    return heard.exact if heard.chosen is None else heard.chosen == 0


def _same(pairs: Sequence[tuple[Heard, Heard]]) -> list[float]:
    return [
        float(a == b) for mine, theirs in pairs for a, b in zip(mine.tops, theirs.tops, strict=True)
    ]


def _fidelity(
    suite: Suite, heard: Sequence[Sequence[Heard]], reference: Sequence[Sequence[Heard]]
) -> Fidelity:
    pairs = [
        (mine[0], theirs[0])
        for questions, mine, theirs in zip(suite.questions, heard, reference, strict=True)
        if not questions
    ]
    return Fidelity(
        mean(_same(pairs)),
        mean(
            [
                divergence(b, a)
                for mine, theirs in pairs
                for a, b in zip(mine.spreads, theirs.spreads, strict=True)
            ]
        ),
        exp(-mean([p for mine, _ in pairs for p in mine.logprobs])),
    )


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return fsum(values) / len(values) if values else nan
