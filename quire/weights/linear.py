"""The dense format: a weight matrix in one floating-point dtype."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b`` with ``weight`` ``[out, in]`` and optional ``bias`` ``[out]``."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` -> ``[..., out]``, same dtype."""
        return functional.linear(x, self.weight, self.bias)
