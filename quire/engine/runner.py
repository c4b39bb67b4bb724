"""The model runner: turns the work of a step into one flat, unpadded token batch and runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.attention import merged, native, reference
from quire.attention.segments import Item, lay_out
from quire.engine.world import Work
from quire.kernels.native import rotate_append
from quire.kv.arena import Arena, TiledArena
from quire.models import rope
from quire.models.decoder import Attend, Decoder

LOGIT_BYTES = 64 << 20  # workspace for one tile of float32 logits

Rotation = tuple[Tensor, Tensor] | None


@dataclass
class Runner:
    """Runs a model over the KV arena, whose layout says which attention runs.

    ``plain`` uses the reference attention throughout. ``deterministic``: a token's result does not
    depend on what else is in the batch (a `TiledArena` only).
    """

    model: Decoder
    arena: Arena | TiledArena
    plain: bool = False
    deterministic: bool = False
    head_seconds: float = 0.0  # spent on logits

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Compute all tokens of ``works`` (in order): final hidden states [tokens, hidden]."""
        device = self.arena.keys.device
        ids = torch.from_numpy(np.concatenate([w.tokens for w in works]).astype(np.int64))
        slots = torch.from_numpy(np.concatenate([w.slots for w in works])).to(device)
        items = [work.item for work in works]
        positions = np.concatenate([np.arange(i.start, i.start + i.count) for i in items])
        attend = self._attend(items, slots)
        with torch.inference_mode():
            return self.model.forward(
                ids.to(device), torch.from_numpy(positions).to(device), attend
            )

    def _attend(self, items: list[Item], slots: Tensor) -> Attend:
        """The attention of a step, laid out for each window that the model has."""
        arena, spec = self.arena, self.model.spec
        scale, softcap = spec.scale, spec.softcap
        windows = [layer.window for layer in spec.layers]
        if isinstance(arena, TiledArena) and not self.plain:
            shape = native.Shape(len(spec.layers), spec.heads, spec.kv_heads, spec.head_dim)
            plans = {
                window: native.Plan.make(items, shape, window, in_order=self.deterministic)
                for window in set(windows)
            }

            def attend_tiles(
                layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation
            ) -> Tensor:
                rotate_append(q, k, v, rotation, slots, arena.keys[layer], arena.values[layer])
                return native.attend(
                    arena, layer, q, plans[windows[layer]], scale=scale, softcap=softcap
                )

            return attend_tiles

        if isinstance(arena, Arena) and not self.plain:
            like = arena.keys
            tables = {
                window: merged.Tables.make(lay_out(items, window), like.device, like.dtype)
                for window in set(windows)
            }

            def attend_merged(
                layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation
            ) -> Tensor:
                q = _rotate_and_store(arena, layer, slots, q, k, v, rotation)
                return merged.attend(
                    arena, layer, q, tables[windows[layer]], scale=scale, softcap=softcap
                )

            return attend_merged

        def attend_plainly(
            layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation
        ) -> Tensor:
            q = _rotate_and_store(arena, layer, slots, q, k, v, rotation)
            window = windows[layer]
            return reference.attend(
                arena, layer, q, items, scale=scale, softcap=softcap, window=window
            )

        return attend_plainly

    def each_logits(self, hidden: Tensor, use: Callable[[Tensor, int], None]) -> None:
        """Call ``use(logits, first_row)`` on tiles of the logits of ``hidden`` [rows, hidden]."""
        tile = max(1, LOGIT_BYTES // (4 * self.model.spec.vocab_size))
        with torch.inference_mode():
            for first in range(0, len(hidden), tile):
                started = time.perf_counter()
                logits = self.model.logits(hidden[first : first + tile])
                self.head_seconds += time.perf_counter() - started
                use(logits, first)


def _rotate_and_store(
    arena: Arena | TiledArena,
    layer: int,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation,
) -> Tensor:
    """Append rotated keys and values to the arena; returns the rotated queries."""
    if rotation is not None:
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
    arena.write(layer, slots, k, v)
    return q.contiguous()
