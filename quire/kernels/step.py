"""All layers of a step in one call: the kernels of the other files, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.kernels.layers import ACTIVATIONS
from quire.kernels.native import address, extension, is_bf16
from quire.kernels.products import Weights


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights: a pre-normalised decoder layer with a dense MLP.

    ``rotation``, ``plan``: which of those that `run_layers` is given; -1: not rotated.
    ``products``: of q, k and v, of attention's result, into the MLP and out of it; with biases.
    """

    norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    rotation: int
    plan: int
    products: tuple[tuple[Weights, Tensor | None], ...]

    def numbers(self) -> list[int]:
        """As ``make_model`` in module.cpp reads them."""
        norms = map(address, (self.norm, self.mlp_norm, self.q_norm, self.k_norm))
        products = (n for weights, bias in self.products for n in weights.numbers(bias))
        return [*norms, self.rotation, self.plan, *products]


def make_model(
    layers: Sequence[LayerWeights],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    activation: str,
    gated: bool,
    eps: float,
    plus_one: bool,
    scale: float,
    softcap: float | None,
) -> object:
    """What `run_layers` runs. It points to the tensors of ``layers`` and does not keep them."""
    return extension().make_model(
        np.array([layer.numbers() for layer in layers], dtype=np.int64),
        heads,
        kv_heads,
        head_dim,
        ACTIVATIONS.index(activation),
        gated,
        eps,
        1.0 if plus_one else 0.0,
        scale,
        softcap or 0.0,
        is_bf16(layers[0].norm),
    )


def run_layers(
    model: object,
    x: Tensor,
    rotations: Sequence[tuple[Tensor, Tensor]],
    plans: Sequence[object],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    wanted: Tensor | None,
    ending: object | None,
) -> None:
    """Turn the first layer's input ``x`` ``[rows, hidden]`` into the last one's output, in place.

    The other arguments are those of `rotate_append` and `attend`; ``keys`` and ``values`` are of
    all layers. ``wanted`` int64, ascending: ``x`` begins with the output of these rows, and the
    rest of it is of no use; the last layer attends by the plan ``ending`` then.
    """
    assert x.is_contiguous()
    assert slots.shape == (len(x),)
    assert slots.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert x.dtype == keys.dtype == values.dtype
    assert wanted is None or wanted.is_contiguous()
    for pair in rotations:
        for part in pair:
            assert part.is_contiguous()
            assert part.dtype == torch.float32
            assert len(part) == len(x)
    table = [(cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1]) for cos, sin in rotations]
    extension().run_layers(
        model,
        x.data_ptr(),
        len(x),
        np.array(table, dtype=np.int64).reshape(-1, 3),
        list(plans),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys[0].nbytes,
        address(wanted),
        -1 if wanted is None else len(wanted),
        ending,
    )
