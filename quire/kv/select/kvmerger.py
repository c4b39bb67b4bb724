"""KVMerger: runs of neighbours with similar keys become one entry each (arXiv 2407.08454)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from quire.kv.method import Entries, Seen
from quire.kv.options import check_counts, entries_of, require
from quire.kv.select.budget import best
from quire.kv.select.merging import merged


@dataclass(frozen=True)
class SimilarRuns:
    """Merge the neighbouring entries that are most alike until ``budget`` a head are left.

    Done once, at the end of prefill. Neighbours are joined whose rotated keys have a cosine of at
    least ``eps``, the most alike first: with ``eps=-1.0`` the budget is met whatever they are, with
    ``budget=1`` all that ``eps`` allows are joined, as in the paper. The ``recent`` newest entries
    and the ``heavy`` others with most attention stay alone; a float is a share of the budget.

    Of a run, the pivot is the member with most attention, whose position the new entry takes. Key
    and value are means with the weights ``exp(-|k - pivot|^2 / (2 sigma^2))``; members less like
    the pivot than ``eps`` are left out. ``sigma``: 0 takes the root mean square of the run's
    distances (the paper defines it by the weights themselves, which it defines; about 5 on its
    models). ``unrotate``: see `merging.merged`.

    An entry of n tokens counts as one in attention, unless ``value_mass``, as in the paper, makes
    its value n times as large, or ``mass_bias`` adds log n to its scores, which scales the
    softmax's denominator as well.

    The paper leaves the first two layers and the last one as they are: ``keep_first``,
    ``keep_last``. Pages hold all layers, so that would free nothing here; none is left by default.
    """

    budget: int | float = 0.5
    eps: float = 0.75
    recent: int | float = 0.34
    heavy: int | float = 0.24
    sigma: float = 0.0
    value_mass: bool = True
    mass_bias: bool = False
    unrotate: bool = False
    keep_first: int = 0
    keep_last: int = 0
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = True
    every: ClassVar[int | None] = None
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, recent=self.recent, heavy=self.heavy)
        require(-1 <= self.eps <= 1, f"eps={self.eps} is no cosine.", "Give -1.0 to 1.0.")
        require(self.sigma >= 0, f"sigma={self.sigma} is negative.")
        require(
            not (self.value_mass and self.mass_bias),
            "value_mass and mass_bias both count a merged entry's tokens.",
            "With mass_bias=True give value_mass=False.",
        )

    def select(self, seen: Seen) -> list[Entries] | None:
        """See `Select.select`."""
        layers = seen.facts.layers
        budget = entries_of(self.budget, seen.prompt)
        if seen.prompt <= budget:
            return None
        left = range(self.keep_first, layers - self.keep_last)
        return [
            self._merge(seen, layer, budget) if layer in left else seen.entries(layer)
            for layer in range(layers)
        ]

    def _merge(self, seen: Seen, layer: int, budget: int) -> Entries:
        entries, mass = seen.entries(layer), seen.mass(layer)
        keys = entries.keys.float()
        size = len(entries)
        recent = min(entries_of(self.recent, budget) if self.recent else 0, size)
        heavy = min(entries_of(self.heavy, budget) if self.heavy else 0, size - recent)
        alone = torch.zeros(mass.shape, dtype=torch.bool)
        alone.scatter_(1, best(mass[:, : size - recent], heavy), True)
        alone[:, size - recent :] = True

        alike = cosine_similarity(keys[:, 1:], keys[:, :-1], dim=-1)  # [kv_heads, n - 1]
        free = ~alone[:, 1:] & ~alone[:, :-1] & (alike >= self.eps)
        label = runs(alike.masked_fill(~free, -torch.inf), size - budget)
        groups = int(label.max()) + 1
        pivot = first_best(mass, label, groups)  # [kv_heads, groups]

        centre = keys.gather(1, pivot.gather(1, label)[..., None].expand_as(keys))
        apart = (keys - centre).square().sum(-1)
        sums = torch.zeros(pivot.shape)
        members = sums.scatter_add(1, label, torch.ones(label.shape))
        square = sums.scatter_add(1, label, apart) / members.clamp(min=1)
        if self.sigma:
            square = torch.full_like(square, self.sigma**2)
        weight = torch.exp(-apart / (2 * square.gather(1, label)).clamp(min=1e-30))
        weight[(cosine_similarity(keys, centre, dim=-1) < self.eps) & (apart > 0)] = 0

        found = merged(seen.facts, layer, entries, label, weight, pivot, unrotate=self.unrotate)
        tokens = sums.scatter_add(1, label, (weight > 0).float()).clamp(min=1)
        count = label[:, -1] + 1
        if bool((count < groups).any()):
            found = replace(found, count=count)
        if self.value_mass:
            values = found.values.float() * tokens[..., None]
            return replace(found, values=values.to(found.values.dtype))
        return replace(found, bias=tokens.log()) if self.mass_bias else found


def runs(alike: Tensor, over: int) -> Tensor:
    """Number the runs that are left when the ``over`` most alike neighbours of a head are joined.

    ``alike`` ``[kv_heads, n - 1]``: of entry i and the next one; -inf: not to be joined. Returns
    int64 ``[kv_heads, n]``.
    """
    joined = torch.zeros(alike.shape, dtype=torch.bool)
    joined.scatter_(1, best(alike, over), True)
    joined &= alike > -torch.inf
    starts = torch.cat([torch.zeros(len(alike), 1, dtype=torch.bool), ~joined], dim=1)
    return starts.cumsum(1)


def first_best(scores: Tensor, label: Tensor, groups: int) -> Tensor:
    """The first member with the highest score of each group: int64 ``[kv_heads, groups]``.

    Heads with fewer groups repeat their last entry.
    """
    heads, size = scores.shape
    top = torch.full((heads, groups), -torch.inf).scatter_reduce(1, label, scores, "amax")
    place = torch.arange(size).expand(heads, -1)
    place = place.masked_fill(scores < top.gather(1, label), size - 1)
    return torch.full((heads, groups), size - 1).scatter_reduce(1, label, place, "amin")
