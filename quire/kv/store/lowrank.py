"""Numbers of tokens as features times a basis: what stores of low rank have in common.

Keys lie near a space of few dimensions before they are rotated, all heads of a layer taken
together, so `Facts.unrotate` comes before and `Facts.rotate`, at the true positions, after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.errors import InvalidRequestError

WIDE = 1536  # from here on an eigenvector for every column takes too long
_SPARE = 16  # more directions than asked for, so that the last ones are found as well
_ROUNDS = 6
_ROWS = 4096  # that are float64 at once


@dataclass(frozen=True)
class Factors:
    """Keys or values of some layers: ``features`` times each layer's and head's ``basis``.

    ``features`` ``[n, rank]``, ``basis`` ``[layers, kv_heads, rank, head_dim]``.
    """

    features: Tensor
    basis: Tensor

    @classmethod
    def make(cls, layers: Sequence[Tensor], rank: int, dtype: torch.dtype) -> Factors:
        """The nearest of ``rank`` to what all ``layers`` ``[kv_heads, n, head_dim]`` hold."""
        heads, _, dim = layers[0].shape
        features, basis = factor(torch.cat([flat(x) for x in layers], dim=1), rank)
        parts = basis.view(-1, len(layers), heads, dim).permute(1, 2, 0, 3)
        return cls(features.to(dtype), parts.to(dtype).contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.features.nbytes + self.basis.nbytes

    def read(self, layer: int, index: Tensor | None = None) -> Tensor:
        """The numbers of a layer, float32: all, or those of ``index``; see `Stored.read`."""
        return expand(rows_of(self.features, index), self.basis[layer])


def rows_of(features: Tensor, index: Tensor | None) -> Tensor:
    """All features ``[n, rank]``, or those of ``index`` ``[rows, kv_heads, k]``."""
    if index is None:
        return features
    return features.index_select(0, index.flatten()).view(*index.shape, features.shape[1])


def expand(features: Tensor, basis: Tensor) -> Tensor:
    """``[n, rank]`` or ``[rows, kv_heads, k, rank]`` by ``[kv_heads, rank, head_dim]``: float32."""
    return features.float() @ basis.float()


def flat(x: Tensor) -> Tensor:
    """``[kv_heads, n, head_dim]`` as rows float32 ``[n, kv_heads * head_dim]``."""
    return x.float().transpose(0, 1).flatten(1)


def factor(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[n, rank]`` and ``[rank, width]`` whose product is nearest to ``x`` ``[n, width]``.

    The rank is at most n and the width. Always the same for the same ``x``.
    """
    rank = min(rank, *x.shape)
    if len(x) < x.shape[1]:
        tokens = directions(x.T, rank)
        return tokens, tokens.T @ x
    columns = directions(x, rank)
    return x @ columns, columns.T


def directions(x: Tensor, rank: int) -> Tensor:
    """The ``rank`` orthonormal columns ``[width, rank]`` that keep most of ``x`` ``[n, width]``.

    Eigenvectors of ``x.T @ x``, with the largest number of each positive.
    """
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(_ROWS):
        gram += part.double().T @ part.double()
    found: Tensor
    if len(gram) < WIDE or 3 * rank > len(gram):
        found = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    else:
        found = iterate(gram, rank)
    signs = found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    return (found * signs).float()


def iterate(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the ``rank`` largest values, nearly; by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), rank + _SPARE, dtype=gram.dtype, generator=generator)
    space: Tensor = torch.linalg.qr(start.to(gram.device)).Q
    for _ in range(_ROUNDS):
        space = torch.linalg.qr(gram @ space).Q
    turn: Tensor = torch.linalg.eigh(space.T @ gram @ space).eigenvectors
    return space @ turn[:, -rank:].flip(1)


def check_rank(name: str, rank: int | float) -> None:
    """Raise InvalidRequestError unless ``rank`` is an int from 1 on or a share of the width."""
    share = isinstance(rank, float) and 0 < rank <= 1
    if not share and not (isinstance(rank, int) and rank >= 1):
        raise InvalidRequestError(
            f"{name}={rank} is neither a rank nor a share of the full one.",
            field="kv",
            value=rank,
            action="Give an integer from 1 on, or a fraction up to 1.0.",
        )


def rank_of(rank: int | float, width: int) -> int:
    """The rank that ``rank`` stands for: itself, or a share of ``width``; at most that."""
    return min(rank if isinstance(rank, int) else max(1, round(rank * width)), width)


def worth(plain: int, growing: int, fixed: int) -> bool:
    """Whether ``growing + fixed`` numbers save much beside ``plain`` ones.

    What is ``fixed`` (a basis) weighs nothing in a long text; in a short one it must leave at least
    half of what could be saved.
    """
    return 2 * (plain - growing - fixed) >= plain - growing > 0
