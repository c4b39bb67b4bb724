"""llama.cpp in batches that share prefixes: ``PYTHON llamacpp_peer.py JOB.json``.

Prompts are sorted and run in waves. What the prompts of a wave share is computed once and given
to all of them by copying sequences of the KV cache; the next wave keeps what it shares with the
last one. Then all sequences of the wave are decoded together. Where nothing is shared, each
sequence has a KV buffer of its own, which is faster for llama.cpp.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import Job, PeerError, Request, main, once
from numpy.typing import NDArray
from prefixes import Sample, Segment, Tokens, cells_needed, common, segments, waves

WAVE = int(os.environ.get("QUIRE_PEERS_WAVE", "64"))
BATCH, MICRO_BATCH = 2048, 512
LOGGED = (3, 4)  # warnings and errors


class Batch:
    """A ``llama_batch`` whose arrays are numpy's: one sequence for each token."""

    def __init__(self, capacity: int) -> None:
        import llama_cpp

        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.counts = np.ones(capacity, np.int32)
        self.sequences = np.zeros(capacity, np.int32)
        self.pointers = self.sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self.wanted = np.zeros(capacity, np.int8)
        fields = {
            "token": self.tokens,
            "pos": self.positions,
            "n_seq_id": self.counts,
            "seq_id": self.pointers,
            "logits": self.wanted,
        }
        self.raw = llama_cpp.llama_batch()
        kinds = dict(llama_cpp.llama_batch._fields_)
        for name, values in fields.items():
            setattr(self.raw, name, ctypes.cast(values.ctypes.data, kinds[name]))
        self.raw.embd = None


class LlamaCpp:
    """A model and a context that fits the job."""

    def __init__(self, job: Job) -> None:
        import importlib.metadata

        import llama_cpp
        from gguf_llama import write_gguf

        self.api: Any = llama_cpp
        self.version = importlib.metadata.version("llama-cpp-python")
        self.vocab: int = job.config["vocab_size"]
        self.rng = np.random.default_rng(0)
        self.cells = job.kv_limit // job.token_bytes
        samples = _samples(job.requests)
        self.sharing = any(
            common(left.prompt, right.prompt) > 0 for left, right in itertools.pairwise(samples)
        )
        file = once(
            job.cache / f"{job.checkpoint.name}-{job.precision}.gguf",
            lambda path: write_gguf(job.checkpoint, path, job.precision),
        )
        self.logger = llama_cpp.llama_log_callback(_log)
        llama_cpp.llama_log_set(self.logger, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise PeerError(f"{file} cannot be loaded")
        self.context = self._context(job, self._waves(job.requests))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = Batch(BATCH)

    def _context(self, job: Job, planned: list[list[Sample]]) -> Any:
        api = self.api
        options = api.llama_context_default_params()
        width = max(map(len, planned))
        if self.sharing:
            needed = max(
                cells_needed(wave) + len(before[-1].prompt)
                for before, wave in zip([planned[0], *planned], planned, strict=False)
            )
            needed = max(needed, job.longest)
        else:
            needed = width * (-(-job.longest // 256) * 256)
        options.n_ctx = -(-needed // 256) * 256
        options.kv_unified = self.sharing
        options.n_seq_max = width + 1 if self.sharing else width
        options.n_batch, options.n_ubatch = BATCH, MICRO_BATCH
        options.n_outputs_max = options.n_seq_max
        options.n_threads = options.n_threads_batch = job.threads
        context = api.llama_init_from_model(self.model, options)
        if not context:
            raise PeerError(f"no context of {options.n_ctx} tokens")
        return context

    def _waves(self, requests: list[Request]) -> list[list[Sample]]:
        samples = _samples(requests)
        if self.sharing:
            return waves(samples, WAVE, self.cells)
        samples.sort(key=lambda s: len(s.prompt))
        longest = max(len(s.prompt) + s.max_tokens for s in samples)
        most = max(1, min(WAVE, self.cells // (-(-longest // 256) * 256)))
        return [samples[at : at + most] for at in range(0, len(samples), most)]

    def clear(self) -> None:
        """Forget all sequences."""
        self.api.llama_memory_clear(self.memory, True)

    def run(self, requests: list[Request]) -> int:
        """Wave after wave."""
        self.clear()
        kept = np.empty(0, np.int32)
        produced = 0
        planned = self._waves(requests)
        for wave, following in zip(planned, [*planned[1:], None], strict=True):
            produced += self._run_wave(wave, kept)
            last = wave[-1].prompt
            size = 0
            if following is not None and self.sharing:
                size = min(common(last, following[0].prompt), len(last) - 1)
            kept = self._keep(len(wave) - 1, last[:size])
        self.clear()
        return produced

    def _keep(self, sequence: int, tokens: Tokens) -> Tokens:
        """Forget all but the first tokens of a sequence, which becomes the spare one."""
        if not len(tokens):
            self.clear()
            return tokens
        spare = self.api.llama_n_seq_max(self.context) - 1
        copy, remove = self.api.llama_memory_seq_cp, self.api.llama_memory_seq_rm
        if sequence != spare:
            remove(self.memory, spare, -1, -1)
            copy(self.memory, sequence, spare, -1, -1)
        for other in range(spare):
            remove(self.memory, other, -1, -1)
        remove(self.memory, spare, len(tokens), -1)
        return tokens

    def _run_wave(self, wave: list[Sample], kept: Tokens) -> int:
        """Prompts, then one token of each sequence at a time. ``kept``: in the spare sequence."""
        current = self._prompts(wave, kept)
        lengths = np.array([len(s.prompt) for s in wave], np.int32)
        wanted = np.array([s.max_tokens for s in wave])
        greedy = np.array([s.greedy for s in wave])
        active = np.arange(len(wave), dtype=np.int32)
        tokens = self._choose(current, greedy)
        produced = len(wave)
        for step in range(1, int(wanted.max())):
            still = wanted[active] > step
            active, tokens = active[still], tokens[still]
            logits = self._decode(tokens, lengths[active] + step - 1, active, np.ones(len(active)))
            tokens = self._choose(logits, greedy[active])
            produced += len(active)
        return produced

    def _prompts(self, wave: list[Sample], kept: Tokens) -> NDArray[np.float32]:
        """Compute what the prompts are made of, level by level; logits after each prompt."""
        logits = np.empty((len(wave), self.vocab), np.float32)
        offset = 1 if len(kept) else 0
        prompts = [*([kept] if offset else []), *(s.prompt for s in wave)]
        spare = self.api.llama_n_seq_max(self.context) - 1
        slots = [*([spare] if offset else []), *range(len(wave))]
        for level in segments(prompts):
            fresh = [s for s in level if not (offset and s.first == 0)]
            self._compute(fresh, slots, logits)
            for segment in level:
                for member in range(segment.first + 1, segment.last):
                    self.api.llama_memory_seq_cp(
                        self.memory,
                        slots[segment.first],
                        slots[member],
                        segment.start,
                        segment.start + len(segment.tokens),
                    )
        return logits

    def _compute(
        self, level: list[Segment], slots: Sequence[int], logits: NDArray[np.float32]
    ) -> None:
        """Compute the segments of a level, each in its first sequence."""
        if not level:
            return
        tokens = np.concatenate([s.tokens for s in level])
        positions = np.concatenate([s.start + np.arange(len(s.tokens)) for s in level])
        sequences = np.concatenate([np.full(len(s.tokens), slots[s.first]) for s in level])
        wanted = np.zeros(len(tokens), np.int8)
        ends = np.cumsum([len(s.tokens) for s in level]) - 1
        wanted[ends] = [s.ending > 0 for s in level]
        found = self._decode(tokens, positions, sequences, wanted)
        for row, segment in zip(found, [s for s in level if s.ending], strict=True):
            for member in range(segment.first, segment.first + segment.ending):
                logits[slots[member]] = row

    def _decode(
        self, tokens: Any, positions: Any, sequences: Any, wanted: Any
    ) -> NDArray[np.float32]:
        """Logits of the wanted tokens."""
        batch, found = self.batch, []
        for first in range(0, len(tokens), BATCH):
            part = slice(first, first + BATCH)
            size = len(tokens[part])
            batch.raw.n_tokens = size
            batch.tokens[:size] = tokens[part]
            batch.positions[:size] = positions[part]
            batch.sequences[:size] = sequences[part]
            batch.wanted[:size] = wanted[part]
            status = self.api.llama_decode(self.context, batch.raw)
            if status != 0:
                raise PeerError(f"llama_decode gave {status}")
            rows = int(batch.wanted[:size].sum())
            if rows:
                pointer = self.api.llama_get_logits(self.context)
                found.append(np.ctypeslib.as_array(pointer, (rows, self.vocab)).copy())
        return np.concatenate(found) if found else np.empty((0, self.vocab), np.float32)

    def _choose(self, logits: NDArray[np.float32], greedy: NDArray[np.bool_]) -> Tokens:
        """The likeliest tokens, or samples at temperature 1 (by the exponential race)."""
        if not greedy.all():
            noise = self.rng.standard_exponential(logits.shape, np.float32)
            logits = np.where(greedy[:, None], logits, logits - np.log(noise))
        return logits.argmax(1).astype(np.int32)


def _log(level: int, text: bytes, _: object) -> None:
    if level in LOGGED:
        print(text.decode(), end="", file=sys.stderr)


def _samples(requests: list[Request]) -> list[Sample]:
    """All samples of all requests, those with a common start side by side."""
    found = [
        Sample(np.array(r.prompt, np.int32), r.max_tokens, r.n == 1)
        for r in requests
        for _ in range(r.n)
    ]
    return sorted(found, key=lambda s: s.prompt.astype(">i4").tobytes())


if __name__ == "__main__":
    main("llamacpp", LlamaCpp, ("bf16", "int8", "int4"))
