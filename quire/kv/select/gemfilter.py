"""GemFilter: an early layer chooses the prompt's tokens (arXiv 2409.17422)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool1d

from quire.kv.options import check_counts, entries_of, require
from quire.kv.select.budget import best


@dataclass(frozen=True)
class GemFilter:
    """Run the model on the ``budget`` tokens of the prompt that its last token asks for.

    Scores are the dot products of the last token's query with all keys in the layer ``layer``,
    rotated, without scale and softmax, summed over all query heads, and averaged over ``kernel``
    neighbours. The first ``first`` and the last ``last`` tokens are always taken, so that what
    begins a text and the turn of a chat template stay (the authors' code forces none). The tokens
    taken keep their order and get positions without gaps.

    A float ``layer`` is a share of the model's depth: the authors use layer 13 of 32 in Llama 3.1
    8B and 19 of 40 in Mistral NeMo.
    """

    budget: int | float = 1024
    layer: int | float = 0.4
    kernel: int = 5
    first: int = 1
    last: int = 32
    axis: ClassVar[str] = "shorten"

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, layer=self.layer, first=self.first, last=self.last)
        require(self.kernel % 2 == 1 and self.kernel > 0, f"kernel={self.kernel} is not odd.")

    def layers(self, depth: int) -> int:
        """See `Shorten.layers`."""
        if isinstance(self.layer, float):
            return min(round(self.layer * depth), depth - 1) + 1
        require(
            self.layer < depth,
            f"layer={self.layer}: the model has {depth} layers, counted from 0.",
            "Give one of them, or a share of the depth such as 0.4.",
        )
        return self.layer + 1

    def shorten(self, q: Tensor, keys: Tensor) -> NDArray[np.int64] | None:
        """See `Shorten.shorten`."""
        size = keys.shape[1]
        budget = entries_of(self.budget, size)
        if size <= budget:
            return None
        asked = q.float().unflatten(0, (len(keys), -1)).sum(1)  # summed over each group
        scores = (keys.float() @ asked[..., None]).sum((0, 2))  # [tokens]
        scores = avg_pool1d(scores[None], self.kernel, stride=1, padding=self.kernel // 2)[0]
        return best(scores, budget, self.first, self.last).numpy()
