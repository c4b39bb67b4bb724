"""The blocks of which every architecture is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quire.kernels import layers, native
from quire.models.spec import Experts, Norm
from quire.weights.linear import Linear

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class Normalise:
    """RMS or layer normalisation over the last dimension, computed in float32."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: Norm

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[..., width]`` -> the same shape and dtype."""
        if self.kind == "layer":
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if native.fits(x):
            return layers.rms_norm(x, self.weight, self.eps, plus_one=self.kind == "rms+1")
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms+1":  # the product in float32 too (Gemma)
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return wide.to(x.dtype) * self.weight


@dataclass(frozen=True)
class MLP:
    """``down(act(gate x) * up x)`` with gate and up in one matrix, or ``down(act(up x))``."""

    up: Linear
    down: Linear
    activation: str
    gated: bool

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x`` ``[tokens, hidden]`` -> the same shape, plus ``add``."""
        wide = self.up(x)
        return self.down((gate if self.gated else activate)(wide, self.activation), add)


def gate(wide: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of ``wide`` ``[tokens, 2 * width]``, gate first."""
    kernel = _kernel(wide, activation)
    if kernel is not None:
        return layers.gate(wide, kernel)
    half, up = wide.chunk(2, dim=-1)
    return ACTIVATIONS[activation](half) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """``act(x)``."""
    kernel = _kernel(x, activation)
    return ACTIVATIONS[activation](x) if kernel is None else layers.activate(x, kernel)


def _kernel(x: Tensor, activation: str) -> str | None:
    """The native kernel's name for an activation, if it can be used."""
    return kernel_name(activation) if native.fits(x) else None


def kernel_name(activation: str) -> str | None:
    """The native kernel's name for an activation, if there is one."""
    same = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
    name = same.get(activation, activation)
    return name if name in layers.ACTIVATIONS else None


@dataclass(frozen=True)
class MixtureOfExperts:
    """Each token goes through the ``top`` experts of its router, weighted by their softmax."""

    router: Linear
    experts: tuple[MLP, ...]
    spec: Experts

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x`` ``[tokens, hidden]`` -> the same shape, plus ``add``; tokens go by expert."""
        weights, chosen = self.router(x).float().softmax(-1).topk(self.spec.top, dim=-1)
        if self.spec.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        order = chosen.flatten().argsort(stable=True)  # [tokens * top], grouped by expert
        token = order // self.spec.top
        scaled = weights.to(x.dtype).flatten()[order]
        sizes = chosen.flatten().bincount(minlength=self.spec.count).tolist()
        start = 0
        for expert, size in zip(self.experts, sizes, strict=True):
            if size:
                part = slice(start, start + size)
                result = expert(x[token[part]]) * scaled[part, None]
                out.index_add_(0, token[part], result)
                start += size
        return out if add is None else add + out
