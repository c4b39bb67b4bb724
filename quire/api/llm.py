"""The Python face: load a model once, generate for many prompts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quire.api.outputs import RequestOutput, Stats, complete
from quire.api.prepare import OVERLONG, Overlong, Prepared, Preparer, Windows
from quire.api.setup import DTYPES, Prompt, Setup
from quire.decode.grammar import Grammars
from quire.decode.params import SamplingParams
from quire.engine.budget import Budget, parse_bytes
from quire.engine.engine import Engine
from quire.engine.watchdog import Watchdog
from quire.errors import EngineStallError, InvalidRequestError, QuireError
from quire.kernels import native
from quire.kv.method import Recipe
from quire.kv.recipes import parse as parse_recipe
from quire.kv.tiers.prefixes import PrefixFiles
from quire.models.loader import load_model
from quire.schedule.groups import Group, largest_groups
from quire.schedule.policies import POLICIES

LARGEST_GROUPS = 64  # of a window, for `on_groups`


class LLM:
    """A model with its KV memory. Use as a context manager, or `close` it.

    ``dtype``: ``"float32"``, ``"float16"``, ``"bfloat16"`` or None for the checkpoint's.
    ``memory``: limit for everything ("6GiB"); ``kv_memory``: for the KV alone. ``policy``:
    ``"batch"`` plans all prompts together, ``"fcfs"`` takes them in order. ``chunk``: most tokens
    in a step. ``window``: most requests planned together. ``context``: longest sequence (default:
    the model's). ``on_overlong``: what to do with a prompt that leaves no room in the context.
    ``weights``: ``"int8"`` or ``"int4"`` quantises them on load (`quire.weights.quantise.parse` has
    all forms). ``deterministic``: a request's tokens do not depend on what it is batched with.
    ``kv``: a recipe of KV methods, such as ``"snapkv(budget=1024)+kivi(bits=2)"`` (docs/kv.md).
    ``kv_dir``: folder in which the KV of prompts is kept and found, by later runs too; ``kv_disk``
    limits its size. ``plain`` uses PyTorch alone and the reference attention, for the whole
    process until the next LLM is made. ``stall_seconds``: a step longer than that is a fault.
    ``on_budget`` receives the shares of memory before weights are loaded.

    Raises ModelError, MemoryBudgetError or InvalidRequestError (a bad option).
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str | None = None,
        weights: str | None = None,
        kv: str | Recipe = "none",
        memory: str | int | None = None,
        kv_memory: str | int | None = None,
        kv_dir: str | Path | None = None,
        kv_disk: str | int = "16GiB",
        policy: str = "batch",
        threads: int | None = None,
        chunk: int = 512,
        window: int = 32768,
        context: int | None = None,
        device: str = "cpu",
        seed: int = 0,
        on_overlong: Overlong = "error",
        deterministic: bool = False,
        plain: bool = False,
        stall_seconds: float = 600.0,
        on_budget: Callable[[Budget], None] | None = None,
    ) -> None:
        _check_option("policy", policy, POLICIES)
        _check_option("dtype", dtype, [None, *DTYPES])
        _check_option("on_overlong", on_overlong, OVERLONG)
        for name, value in (("chunk", chunk), ("window", window), ("threads", threads)):
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} must be at least 1.", field=name, value=value)
        if threads is not None:
            torch.set_num_threads(threads)
        recipe = parse_recipe(kv) if isinstance(kv, str) else kv
        native.configure(plain=plain)
        if device == "cpu" and not plain:
            native.warn_if_missing()
        self.setup = Setup.make(
            model,
            dtype=dtype,
            weights=weights,
            memory=memory,
            kv_memory=kv_memory,
            chunk=chunk,
            context=context,
            device=device,
        )
        if on_budget is not None:
            on_budget(self.setup.budget)
        self.model = str(model)
        self.policy = policy
        self.tokenizer = self.setup.tokenizer
        self.window = window
        self.stall_seconds = stall_seconds
        self.grammars = Grammars(
            self.tokenizer.to_json,
            self.setup.spec.vocab_size,
            self.tokenizer.eos_ids,
            torch.get_num_threads(),
        )
        self._files: PrefixFiles | None = None
        if kv_dir is not None:
            how = (self.setup.dtype, weights, self.setup.spec.context, replace(recipe, name=""))
            self._files = self.setup.prefix_files(
                Path(kv_dir), parse_bytes(kv_disk), str((*how, deterministic, plain))
            )
        self._preparer = Preparer(self.setup, self.grammars, seed, on_overlong)
        self._engine: Engine | None = Engine(
            load_model(
                self.setup.folder,
                dtype=self.setup.dtype,
                device=device,
                context=context,
                weights=self.setup.weights,
                deterministic=deterministic,
            ),
            self.tokenizer,
            policy=POLICIES[policy],
            kv_bytes=self.setup.budget.kv,
            chunk=chunk,
            eos_ids=self.tokenizer.eos_ids,
            grammars=self.grammars,
            plain=plain,
            deterministic=deterministic,
            recipe=recipe,
            files=self._files,
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory of weights and KV back. Nothing can be generated afterwards."""
        self._engine = None
        if self._files is not None:
            self._files.close()
        gc.collect()

    @property
    def engine(self) -> Engine:
        """The engine behind this LLM; QuireError after `close`."""
        if self._engine is None:
            raise QuireError("This LLM is closed.", action="Make a new one.")
        return self._engine

    @property
    def stats(self) -> Stats:
        """Work done so far."""
        engine = self.engine
        world, times = engine.world, engine.times
        counters = world.counters
        return Stats(
            steps=world.steps,
            running=len(world.state.running),
            waiting=len(world.state.waiting),
            prompt_tokens=counters.prompt_asked,
            computed_tokens=counters.prompt_computed,
            recomputed_tokens=counters.recomputed,
            loaded_tokens=counters.prompt_loaded,
            decode_tokens=counters.output_computed,
            output_tokens=counters.output,
            preemptions=counters.preemptions,
            plan_seconds=times.insert + times.plan,
            model_seconds=times.model,
            sample_seconds=times.sample,
            step_seconds=times.plan + times.model + times.sample,
            kv_bytes=world.pool.pages * engine.limits.page_bytes,
            kv_used_bytes=world.pool.used_pages * engine.limits.page_bytes,
            peak_kv_bytes=world.pool.peak_pages * engine.limits.page_bytes,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts; results in the order of the prompts.

        A prompt is a string, ``{"prompt": str}`` or ``{"prompt_token_ids": [int, ...]}``.
        ``sampling_params``: one for all, or one each. A request that cannot run has `error` set.
        """
        if isinstance(prompts, (str, Mapping)):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts came with {len(params)} sampling parameters.",
                field="sampling_params",
                value=len(params),
                limit=len(prompts),
                action="Give one for all, or one each.",
            )
        found = self.generate_iter(zip(prompts, params, strict=True))
        return sorted(found, key=lambda output: output.request_id)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation (a list of messages) or a list of them."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([{"messages": list(m)} for m in conversations], sampling_params)

    def generate_iter(
        self,
        requests: Iterable[tuple[Prompt, SamplingParams]],
        *,
        on_step: Callable[[Stats], None] | None = None,
        on_groups: Callable[[list[Group]], None] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Yield each request's output as it finishes; ``request_id`` is its place in the input.

        ``requests`` is read window by window, one ahead, so that it may be longer than memory;
        another thread reads and tokenizes it. ``on_step`` is called after every step,
        ``on_groups`` with the prefixes that save most whenever a window is planned.
        """
        engine = self.engine
        known: dict[int, RequestOutput] = {}
        watchdog = Watchdog(self.stall_seconds, engine.describe)
        try:
            with Windows(self._preparer, requests, self.window) as windows, watchdog:
                while windows.more or engine.unfinished:
                    if windows.more and engine.waiting <= self.window // 2:
                        yield from self._add(windows.take(), known, on_groups)
                    if not engine.unfinished:
                        continue
                    watchdog.start()
                    results = engine.step()
                    watchdog.end()
                    for result in results:
                        yield complete(known.pop(result.id), result)
                    if on_step is not None:
                        on_step(self.stats)
        except KeyboardInterrupt:
            if watchdog.fired:
                raise EngineStallError(
                    f"A step has taken more than {self.stall_seconds:g} s.\n{engine.describe()}"
                ) from None
            raise
        finally:
            engine.abort_all()

    def _add(
        self,
        window: list[Prepared],
        known: dict[int, RequestOutput],
        on_groups: Callable[[list[Group]], None] | None,
    ) -> Iterator[RequestOutput]:
        """Hand a window to the engine; yields the requests that cannot run."""
        yield from (output for output, request in window if request is None)
        known.update({request.id: output for output, request in window if request is not None})
        added = self.engine.add(request for _, request in window if request is not None)
        if on_groups is not None:
            on_groups(largest_groups((seq.leaf for seq in added), LARGEST_GROUPS))


def _check_option(name: str, value: object, allowed: Iterable[object]) -> None:
    names = [a for a in allowed if a is not None]
    if value not in [*names, None] or (value is None and name == "policy"):
        raise InvalidRequestError(
            f"{name} is {value!r}.",
            field=name,
            value=value,
            limit=names,
            action=f"Choose one of {', '.join(map(str, names))}.",
        )
