"""The step loop: plan, apply, run, sample. The only place where the other rooms meet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from quire.attention import native
from quire.decode.grammar import FIELD, Grammars, Matcher
from quire.decode.rng import derive_seed
from quire.decode.sampling import RowState, Sampled, TokenLogprobs, prompt_logprobs, sample
from quire.decode.stopping import StopStrings, finish_reason
from quire.engine.facts import make_facts
from quire.engine.keeper import Keeper
from quire.engine.limits import PAGE_TOKENS, Limits
from quire.engine.prefixes import Prefixes
from quire.engine.request import EngineRequest, EngineResult, SampleResult
from quire.engine.runner import Runner
from quire.engine.shorten import Shortener
from quire.engine.world import Work, World
from quire.errors import EngineStallError, InvalidRequestError
from quire.kv.arena import Arena, TiledArena, token_bytes
from quire.kv.method import Recipe, Shorten
from quire.kv.recipes import check
from quire.kv.tiers.prefixes import PrefixFiles
from quire.models.decoder import Decoder
from quire.models.tokenizer import Detokenizer, Tokenizer
from quire.schedule.state import Policy
from quire.schedule.state import Sequence as Seq


@dataclass
class _Live:
    """A sequence's decoding state."""

    row: RowState
    index: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stops: StopStrings | None = None
    detokenizer: Detokenizer | None = None
    text: str = ""


@dataclass
class _Pending:
    """A request of which some samples are unfinished."""

    request: EngineRequest
    sequences: list[Seq]
    results: list[SampleResult] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


@dataclass
class Times:
    """Seconds spent in each part of the step loop."""

    insert: float = 0.0  # planning windows: tree, segments, order
    plan: float = 0.0  # planning steps and applying the plans
    model: float = 0.0
    sample: float = 0.0


class Engine:
    """Runs requests to their end over one model and one KV arena.

    ``kv_bytes`` bounds the KV; ``chunk`` the tokens of a step. ``tokenizer`` may be None when no
    text is wanted (no stop strings then), ``grammars`` when no request has a structure.
    ``recipe``: the KV methods; None: exact KV. ``files``: where prompts' KV is kept and found.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        *,
        policy: Policy,
        kv_bytes: int,
        chunk: int,
        eos_ids: tuple[int, ...] = (),
        grammars: Grammars | None = None,
        plain: bool = False,
        deterministic: bool = False,
        recipe: Recipe | None = None,
        files: PrefixFiles | None = None,
    ) -> None:
        spec = model.spec
        layers = len(spec.layers)
        size = token_bytes(layers, spec.kv_heads, spec.head_dim, model.dtype)
        self.limits = Limits.make(spec.context, kv_bytes, size)
        pages = self.limits.pages
        self.world = World(pages, PAGE_TOKENS, chunk, policy)
        sizes = (layers, spec.kv_heads, spec.head_dim, pages * PAGE_TOKENS, model.dtype)
        tiled = native.fits(torch.empty(0, dtype=model.dtype, device=model.device), spec.head_dim)
        if deterministic and not tiled:
            raise InvalidRequestError(
                "Deterministic mode needs the native CPU kernels, float32 or bfloat16, and heads "
                f"of a multiple of 16 up to {native.LONGEST_HEAD} wide.",
                field="deterministic",
                action="quire info tells which kernels are live and why.",
            )
        arena = TiledArena.make(*sizes) if tiled else Arena.make(*sizes, model.device)
        self.keeper: Keeper | None = None
        if recipe is not None and not recipe.plain:
            facts = make_facts(model, tokenizer)
            check(recipe, facts.windows, spec.context, deterministic=deterministic)
            self.keeper = Keeper(recipe, facts, arena, self.world, self.limits.page_bytes)
            if recipe.select is not None:
                self.world.state.stride = recipe.select.every
        self.prefixes: Prefixes | None = None
        if files is not None:
            if self.keeper is not None and self.keeper.mass:
                raise InvalidRequestError(
                    "A KV method that looks at the attention of the whole prompt cannot go without "
                    "computing it.",
                    field="kv_dir",
                    action="Leave --kv-dir away, or take a method that looks at the last queries.",
                )
            tail = self.keeper.window if self.keeper is not None else 0
            self.prefixes = Prefixes(files, arena, self.world, tail)
        self.runner = Runner(model, arena, plain, deterministic, self.keeper)
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.grammars = grammars
        self.times = Times()
        self._pending: dict[int, _Pending] = {}
        self._live: dict[int, _Live] = {}
        self._structured = False  # whether any unfinished request has a structure

    @property
    def unfinished(self) -> int:
        """Requests that are not finished."""
        return len(self._pending)

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        return len(self.world.state.waiting)

    def add(self, requests: Iterable[EngineRequest]) -> list[Seq]:
        """Add requests as one planning window; returns their sequences.

        Raises PromptTooLongError for one beyond limits.
        """
        started = time.perf_counter()
        batch = list(requests)
        if self.keeper is not None and self.keeper.recipe.shorten is not None:
            batch = self._shorten(batch, self.keeper.recipe.shorten)
        added = self.world.add(
            (
                r.id,
                r.prompt,
                r.params.n,
                self.limits.output_tokens(len(r.prompt), r.params.max_tokens),
                r.params.prompt_logprobs is None,
            )
            for r in batch
        )
        structured = any(r.params.structure is not None for r in batch)
        self._structured = structured or (self._structured and bool(self._pending))
        self._pending.update({r.id: _Pending(r, []) for r in batch})
        for seq in added:
            pending = self._pending[seq.request]
            pending.sequences.append(seq)
            self._live[seq.id] = self._new_live(seq, pending.request)
        self.times.insert += time.perf_counter() - started
        return added

    def _shorten(self, batch: list[EngineRequest], method: Shorten) -> list[EngineRequest]:
        """The requests with shortened prompts, but for those whose whole prompt is scored."""
        run = Shortener(self.runner.model, method, self.world.state.chunk)
        found = list(batch)
        for i in sorted(range(len(batch)), key=lambda i: batch[i].prompt.tobytes()):
            request = batch[i]
            if request.params.prompt_logprobs is None:
                kept = run.places(request.prompt)
                if kept is not None:
                    found[i] = replace(request, prompt=request.prompt[kept])
        return found

    def _new_live(self, seq: Seq, request: EngineRequest) -> _Live:
        params = request.params
        row = RowState(
            params=params,
            seed=derive_seed(request.seed, seq.sample),
            prompt=seq.prompt,
            output=seq.output,
            eos_ids=self.eos_ids,
            bad_words=request.bad_words,
            matcher=None if params.structure is None else Matcher(params.structure),
        )
        live = _Live(row, seq.sample)
        if params.stop and self.tokenizer is not None:
            live.stops = StopStrings(params.stop)
            live.detokenizer = Detokenizer(self.tokenizer, seq.prompt.tolist())
        return live

    def step(self) -> list[EngineResult]:
        """Run one step; returns the requests that it finished.

        Raises EngineStallError if there is work and nothing can be done.
        """
        started = time.perf_counter()
        plan = self.world.plan()
        works = left = self.world.apply(plan)
        if self.prefixes is not None:
            left = self.prefixes.load(works, self._scored)
        self.times.plan += time.perf_counter() - started
        started = time.perf_counter()
        self._start_masks()
        wanted = [self._wanted(work) for work in left]
        hidden = self.runner.forward(left, wanted) if left else None
        self.times.model += time.perf_counter() - started
        started, head = time.perf_counter(), self.runner.head_seconds
        with torch.inference_mode():
            ready, rows = self._caught_up(left, wanted, hidden)
        if self.prefixes is not None:
            self.prefixes.keep(left)
        if self.keeper is not None:
            self.keeper.after(works)
        finished = self._sample(ready, rows)
        head = self.runner.head_seconds - head
        self.times.model += head
        self.times.sample += time.perf_counter() - started - head
        if self._pending and finished is None and not plan.changes:
            raise EngineStallError(f"The engine can make no progress.\n{self.describe()}")
        return finished or []

    def _scored(self, seq: Seq) -> bool:
        """Whether log-probabilities of the whole prompt are wanted."""
        return self._pending[seq.request].request.params.prompt_logprobs is not None

    def _wanted(self, work: Work) -> int:
        """Of how many of the work's last tokens the hidden states are needed."""
        node = work.node
        if node is None:
            return int(len(work.sequence.output) == work.sequence.tail.length)
        if self._scored(work.sequence):
            return work.item.count
        return int(node.missing == 0 and node.ends > 0)

    def _caught_up(
        self, works: Sequence[Work], wanted: Sequence[int], hidden: Tensor | None
    ) -> tuple[list[Seq], list[Tensor]]:
        """Sequences whose output has caught up, and their last hidden states.

        Nodes at which prompts end get theirs to keep. ``hidden`` ``[sum of wanted, hidden]``.
        """
        ready: list[Seq] = []
        rows: list[Tensor] = []
        last = 0
        for work, count in zip(works, wanted, strict=True):
            if not count:
                continue
            assert hidden is not None
            first, last = last, last + count
            node = work.node
            if node is None:
                ready.append(work.sequence)
                rows.append(hidden[last - 1])
                continue
            if node.missing == 0 and node.ends:
                node.hidden = hidden[last - 1].clone()
            scored = self._pending[work.sequence.request].request.params.prompt_logprobs
            if scored is not None:
                self._score_prompt(work, hidden[first:last], scored)
        return ready, rows

    def _sample(self, ready: list[Seq], rows: list[Tensor]) -> list[EngineResult] | None:
        """Sample for ``ready`` and for every sequence at its first token; None if there are none.

        ``rows``: the hidden states of ``ready``.
        """
        for seq in self.world.state.running:
            if not seq.output and not seq.leaf.missing:
                assert isinstance(seq.leaf.hidden, Tensor)
                ready.append(seq)
                rows.append(seq.leaf.hidden)
        if not ready:
            return None
        if self._structured and self.grammars is not None:
            self.grammars.wait()
        tokens: list[int] = []
        details: list[TokenLogprobs | None] = []

        def draw(logits: Tensor, first: int) -> None:
            drawn = self.choose(logits, ready[first : first + len(logits)])
            tokens.extend(drawn.tokens)
            details.extend(drawn.logprobs)

        with torch.inference_mode():
            self.runner.each_logits(torch.stack(rows), draw)
        finished = []
        for seq, token, detail in zip(ready, tokens, details, strict=True):
            result = self._accept(seq, token, detail) if seq.id in self._live else None
            if result is not None:
                finished.append(result)
        return finished

    def _start_masks(self) -> None:
        """Let the masks of running sequences be computed while the model runs."""
        if self._structured and self.grammars is not None:
            matchers = (self._live[seq.id].row.matcher for seq in self.world.state.running)
            self.grammars.start([m for m in matchers if m is not None and m.stale])

    def choose(self, logits: Tensor, sequences: Sequence[Seq]) -> Sampled:
        """The next token of each sequence, from ``logits`` float32 ``[sequences, vocab]``.

        The logits are overwritten.
        """
        return sample(logits, [self._live[seq.id].row for seq in sequences])

    def _score_prompt(self, work: Work, hidden: Tensor, k: int) -> None:
        """Log-probabilities of the prompt tokens that follow the rows ``hidden``."""
        pending = self._pending[work.sequence.request]
        start = work.item.start
        targets = torch.from_numpy(pending.request.prompt[start + 1 : start + 1 + len(hidden)])
        hidden = hidden[: len(targets)]

        def score(logits: Tensor, first: int) -> None:
            part = targets[first : first + len(logits)].long().to(logits.device)
            for offset, entry in enumerate(prompt_logprobs(logits, part, k)):
                pending.prompt_logprobs[start + first + offset] = entry

        self.runner.each_logits(hidden, score)

    def _accept(self, seq: Seq, token: int, detail: TokenLogprobs | None) -> EngineResult | None:
        """Append a sampled token, and those that its structure then forces.

        Returns the request's result if that finished it.
        """
        if not seq.output:
            seq.leaf.ends -= 1
            self.world.counters.prompt_asked += len(seq.prompt)
        live = self._live[seq.id]
        if detail is not None:
            live.logprobs.append(detail)
        matcher = live.row.matcher
        if matcher is None:
            return self._append(seq, live, token)
        forced: list[int] = []
        if matcher.error is None and token not in self.eos_ids:
            # Log-probabilities are those of sampled tokens, and KV methods see decoded tokens one
            # by one, so no token is then taken unsampled.
            forced = matcher.accept(token, jump=detail is None and self.keeper is None)
        if matcher.error is not None:
            return self._fail(seq.request, matcher.error)
        for index, each in enumerate([token, *forced]):
            whole = matcher.done and index == len(forced)
            result = self._append(seq, live, each, whole)
            if seq.id not in self._live:
                return result
        return None

    def _append(
        self, seq: Seq, live: _Live, token: int, whole: bool = False
    ) -> EngineResult | None:
        """Append one token. ``whole``: nothing may follow it."""
        seq.output.append(token)
        self.world.counters.output += 1
        reason = "stop" if whole else finish_reason(live.row.params, seq.output, self.eos_ids)
        if reason is None and len(seq.output) >= seq.max_new:
            reason = "length"
        if live.stops is not None and live.detokenizer is not None:
            new = live.detokenizer.push([token])
            if reason is not None:
                new += live.detokenizer.finish()
            live.text += new
            stop = live.stops.feed(new)
            if stop is not None:
                live.text, reason = live.text[:stop], "stop"
        return self._finish(seq, reason) if reason is not None else None

    def _finish(self, seq: Seq, reason: str) -> EngineResult | None:
        live = self._live.pop(seq.id)
        pending = self._pending[seq.request]
        pending.results.append(
            SampleResult(seq.sample, seq.output, self._text(seq, live), reason, live.logprobs)
        )
        self.world.finish(seq)
        if len(pending.results) < len(pending.sequences):
            return None
        del self._pending[seq.request]
        prompt = len(pending.request.prompt)
        scored = [entry for _, entry in sorted(pending.prompt_logprobs.items())]
        return EngineResult(
            pending.request.id,
            prompt,
            max(0, prompt - sum(s.computed_here for s in pending.sequences)),
            sorted(pending.results, key=lambda r: r.index),
            scored if pending.request.params.prompt_logprobs is not None else None,
        )

    def _fail(self, request: int, reason: str) -> EngineResult:
        """Give up a request whose structure came to a dead end, with all its samples."""
        pending = self._pending.pop(request)
        self.world.abort([s for s in pending.sequences if self._live.pop(s.id, None) is not None])
        error = InvalidRequestError(
            f"The output could not follow its structure to the end: {reason}.", field=FIELD
        )
        return EngineResult(request, len(pending.request.prompt), 0, [], error=error)

    def _text(self, seq: Seq, live: _Live) -> str:
        if live.stops is not None or self.tokenizer is None:
            return live.text
        detokenizer = Detokenizer(self.tokenizer, seq.prompt.tolist())
        return detokenizer.push(seq.output) + detokenizer.finish()

    def not_started(self) -> list[int]:
        """Requests of which nothing has been computed, in the order in which they would start."""
        fresh = Counter(
            seq.request
            for seq in self.world.state.waiting
            if not seq.output and not seq.computed_here
        )
        return [id for id, count in fresh.items() if count == len(self._pending[id].sequences)]

    def withdraw(self, requests: Iterable[int]) -> None:
        """Drop these unfinished requests, started or not, and give their KV back."""
        gone = [self._pending.pop(id) for id in requests]
        sequences = [seq for each in gone for seq in each.sequences if seq.id in self._live]
        self.world.abort(sequences)
        for seq in sequences:
            del self._live[seq.id]

    def abort_all(self) -> None:
        """Drop every unfinished request and give its KV back."""
        self.withdraw(list(self._pending))
        if self.grammars is not None:
            self.grammars.wait()

    def describe(self) -> str:
        """The state of queues, pool and counters, for people who look for a fault."""
        state, pool = self.world.state, self.world.pool
        lines = [
            f"step {self.world.steps}: {len(state.running)} running, {len(state.waiting)} waiting",
            f"pages: {pool.used_pages} used of {pool.pages}, peak {pool.peak_pages}, "
            f"{PAGE_TOKENS} tokens each",
            f"counters: {asdict(self.world.counters)}",
        ]
        for seq in state.running[:20]:
            lines.append(
                f"  sequence {seq.id} of request {seq.request}: prompt {len(seq.prompt)}, missing "
                f"{seq.leaf.missing}, output {len(seq.output)}, tail {seq.tail.length}"
            )
        return "\n".join(lines)
