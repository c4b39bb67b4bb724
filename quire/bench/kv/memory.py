"""How many bytes an engine's KV takes just now: what is really held, whatever methods claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.engine.engine import Engine
from quire.kv.method import Facts
from quire.kv.tiers.mapped import is_on_disk


@dataclass(frozen=True)
class Held:
    """Bytes. ``kv``: pages of the arena in use and packed entries; ``index``: what fetches keep;
    ``notes``: entries' positions, and what selections keep of queries and attention; all of these
    in RAM. ``disk``: what lies in files.
    """

    kv: int
    index: int
    notes: int
    disk: int = 0

    @property
    def total(self) -> int:
        """All that is in RAM."""
        return self.kv + self.index + self.notes


def measure_held(engine: Engine) -> Held:
    """Count what nodes and running sequences of ``engine`` hold."""
    world = engine.world
    nodes = [node.segment for node in world.tree.resident.values() if node.segment is not None]
    segments = [*nodes, *(seq.tail for seq in world.state.running)]
    spans = [span for segment in segments for span in segment.stored]
    paid: set[int] = set().union(*(span.pages for span in spans))
    arena = (world.pool.used_pages - len(paid)) * engine.limits.page_bytes
    seen: set[int] = set()
    kv = arena + tensor_bytes([span.data for span in spans], seen)
    notes = [engine.keeper.notes(s) for s in segments] if engine.keeper is not None else []
    index = tensor_bytes([note.index for note in notes], seen)
    rest = [(note.queries, note.mass, note.state) for note in notes]
    disk = tensor_bytes([[span.data for span in spans], notes], set(), disk=True)
    return Held(kv, index, tensor_bytes([rest, [(s.places, s.kept) for s in segments]], seen), disk)


def tensor_bytes(thing: Any, seen: set[int], *, disk: bool = False) -> int:
    """Bytes of all tensors and arrays within ``thing``, the memory of each once.

    Those in RAM, or with ``disk`` those in files. ``seen``: where memory begins that has been
    counted. The model's facts are left out.
    """
    if isinstance(thing, torch.Tensor):
        if is_on_disk(thing) != disk:
            return 0
        storage = thing.untyped_storage()
        return _once(storage.data_ptr(), storage.nbytes(), seen)
    if isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        return 0 if disk else _once(thing.ctypes.data, thing.nbytes, seen)
    if isinstance(thing, Facts | str | bytes | type):
        return 0
    if isinstance(thing, Mapping):
        return sum(tensor_bytes(value, seen, disk=disk) for value in thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return sum(tensor_bytes(value, seen, disk=disk) for value in thing)
    if hasattr(thing, "__dict__") and not callable(thing):
        return _object_bytes(thing, seen, disk)
    return 0


def _object_bytes(thing: Any, seen: set[int], disk: bool) -> int:
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    return tensor_bytes(vars(thing), seen, disk=disk)


def _once(start: int, size: int, seen: set[int]) -> int:
    if start in seen:
        return 0
    seen.add(start)
    return size
