"""The model runner: turns the work of a step into one flat, unpadded token batch and runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.attention import merged, reference
from quire.attention.segments import lay_out
from quire.engine.world import Work
from quire.kv.arena import Arena
from quire.models.decoder import Decoder

LOGIT_BYTES = 64 << 20  # workspace for one tile of float32 logits


@dataclass
class Runner:
    """Runs a model over the KV arena. ``plain`` uses the reference attention throughout."""

    model: Decoder
    arena: Arena
    plain: bool = False

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Compute all tokens of ``works`` (in order): final hidden states [tokens, hidden]."""
        device = self.arena.keys.device
        ids = torch.from_numpy(np.concatenate([w.tokens for w in works]).astype(np.int64))
        slots = torch.from_numpy(np.concatenate([w.slots for w in works])).to(device)
        items = [work.item for work in works]
        spec = self.model.spec
        windows = [layer.window for layer in spec.layers]
        layouts = {window: lay_out(items, window) for window in set(windows)}
        positions = torch.from_numpy(next(iter(layouts.values())).positions)
        scale, softcap = spec.scale, spec.softcap
        if self.plain:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.arena.write(layer, slots, k, v)
                return reference.attend(
                    self.arena,
                    layer,
                    q,
                    items,
                    scale=scale,
                    softcap=softcap,
                    window=windows[layer],
                )
        else:
            tables = {
                window: merged.Tables.make(layout, device, self.arena.keys.dtype)
                for window, layout in layouts.items()
            }

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.arena.write(layer, slots, k, v)
                return merged.attend(
                    self.arena, layer, q, tables[windows[layer]], scale=scale, softcap=softcap
                )

        with torch.inference_mode():
            return self.model.forward(ids.to(device), positions.to(device), attend)

    def each_logits(self, hidden: Tensor, use: Callable[[Tensor, int], None]) -> None:
        """Call ``use(logits, first_row)`` on tiles of the logits of ``hidden`` [rows, hidden]."""
        tile = max(1, LOGIT_BYTES // (4 * self.model.spec.vocab_size))
        with torch.inference_mode():
            for first in range(0, len(hidden), tile):
                use(self.model.logits(hidden[first : first + tile]), first)
