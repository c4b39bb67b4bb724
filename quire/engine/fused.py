"""All layers of a step in one native call, for models whose layers fit.

The kernels and their order are those of `Decoder.forward`, so the results are the same bits; what
is saved is the Python between them, which counts where a step has few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from quire.attention.native import Plan
from quire.kernels.products import Weights
from quire.kernels.step import LayerWeights, make_model, run_layers
from quire.kv.arena import TiledArena
from quire.models.blocks import MLP, kernel_name
from quire.models.decoder import Angles, Decoder, Layer
from quire.models.spec import Rope


@dataclass(frozen=True)
class Fused:
    """A model's layers as the kernels take them. ``layers`` own the memory of ``weights``."""

    arena: TiledArena
    weights: object
    layers: tuple[LayerWeights, ...]
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]

    def over(
        self,
        slots: Tensor,
        plans: Mapping[int | None, Plan],
        rows: Tensor | None,
        ending: Plan | None,
    ) -> Callable[[Tensor, Angles], Tensor]:
        """What takes a step's embeddings through all layers, for `Decoder.around`.

        ``slots`` int64 ``[tokens]``; a plan for each window that the model has. ``rows``: those of
        which the result is wanted, as in `Decoder.forward`; ``ending`` is their plan.
        """

        def run(x: Tensor, angles: Angles) -> Tensor:
            run_layers(
                self.weights,
                x,
                [angles[rope] for rope in self.ropes],
                [plans[window].tasks for window in self.windows],
                slots,
                self.arena.keys,
                self.arena.values,
                rows,
                None if ending is None else ending.tasks,
            )
            return x if rows is None else x[: len(rows)]

        return run


def fuse(model: Decoder, arena: TiledArena) -> Fused | None:
    """The layers in one, or None if one of them has something that ``step.cpp`` does not know."""
    spec = model.spec
    activation = kernel_name(spec.activation)
    if spec.placement != "pre" or spec.norm == "layer" or spec.qk_norm == "full":
        return None
    if activation is None:
        return None
    ropes = tuple({layer.rope: None for layer in spec.layers if layer.rope is not None})
    windows = tuple({layer.window: None for layer in spec.layers})
    layers = []
    for layer in model.layers:
        products = _products(layer)
        if products is None:
            return None
        layers.append(
            LayerWeights(
                layer.norms[0].weight,
                layer.norms[1].weight,
                None if layer.q_norm is None else layer.q_norm.weight,
                None if layer.k_norm is None else layer.k_norm.weight,
                -1 if layer.spec.rope is None else ropes.index(layer.spec.rope),
                windows.index(layer.spec.window),
                products,
            )
        )
    weights = make_model(
        layers,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        activation=activation,
        gated=spec.gated,
        eps=spec.norm_eps,
        plus_one=spec.norm == "rms+1",
        scale=spec.scale,
        softcap=spec.softcap,
    )
    return Fused(arena, weights, tuple(layers), ropes, windows)


def _products(layer: Layer) -> tuple[tuple[Weights, Tensor | None], ...] | None:
    """The layer's matrices in order, with their biases; None if one is not the kernels' own."""
    if not isinstance(layer.mlp, MLP):
        return None
    found = []
    for linear in (layer.qkv, layer.out, layer.mlp.up, layer.mlp.down):
        weights = linear.product.packed()
        if weights is None:
            return None
        found.append((weights, linear.bias))
    return tuple(found)
