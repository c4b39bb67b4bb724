"""compressed-tensors checkpoints: integer weights, as llm-compressor writes them.

The format is that of the compressed-tensors package. A layer ``[out, in]`` is

- "pack-quantized", 4 or 8 bits: ``weight_packed`` int32 ``[out, in * bits / 32]``, rounded up:
  codes of neighbouring inputs, lowest bits first, plus ``2**(bits - 1)``; ``weight_shape``
  int64 ``[2]``
- "int-quantized": ``weight`` int8 ``[out, in]``

with ``weight_scale`` floating point ``[out, groups]`` (``[1]`` for one scale in all); where the
weights are asymmetric, ``weight_zero_point`` int8 ``[out, groups]``, or packed along the outputs
as int32 ``[out * bits / 32, groups]``; and in older files ``weight_g_idx`` ``[in]``, the group of
each input. weight = scale * (code - zero).

Scales of activations are found from the activations themselves ("dynamic"), so none are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError, UnsupportedModelError
from quire.weights import packed
from quire.weights.formats import ByChannel, Matrix
from quire.weights.packed import CODES, FLOATS, Has, Read, Settings, checked, one_of, setting

_FORMATS = ("pack-quantized", "int-quantized")
_NOTHING: tuple[object, ...] = (None, {}, [], False)
_DYNAMIC = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def check(config: Settings) -> None:
    """Raises UnsupportedModelError or CheckpointError for a config that cannot be read."""
    for field in ("kv_cache_scheme", "moe_sparsity_config"):
        one_of(config, field, config.get(field), _NOTHING)
    sparsity: Settings = config.get("sparsity_config") or {"format": "dense"}
    one_of(config, "sparsity_config.format", sparsity.get("format"), ("dense",))
    rotations = (config.get("transform_config") or {}).get("config_groups")
    one_of(config, "transform_config.config_groups", rotations, _NOTHING)
    for name, scheme in setting(config, "config_groups", dict).items():
        _check_scheme(config, f"config_groups.{name}", scheme)


def _check_scheme(config: Settings, at: str, scheme: object) -> None:
    if not isinstance(scheme, dict) or not isinstance(scheme.get("weights"), dict):
        raise UnsupportedModelError(
            f"{at} of quantization_config in config.json says nothing of weights: {scheme!r}.",
            value=scheme,
            action="Use the float16 or bfloat16 version.",
        )
    setting(scheme, "targets", list)
    one_of(config, "format", _format(config, scheme), _FORMATS)
    weights = scheme["weights"]
    one_of(config, f"{at}.weights.type", weights.get("type", "int"), ("int",))
    one_of(config, f"{at}.weights.num_bits", weights.get("num_bits", 8), (4, 8))
    one_of(config, f"{at}.weights.strategy", _strategy(weights), ("group", "channel", "tensor"))
    one_of(config, f"{at}.weights.dynamic", weights.get("dynamic", False), (False,))
    if _strategy(weights) == "group":
        packed.group_size(weights)
    inputs: Settings = scheme.get("input_activations") or {}
    for field, allowed in _DYNAMIC.items() if inputs else ():
        one_of(config, f"{at}.input_activations.{field}", inputs.get(field), (allowed,))
    outputs = scheme.get("output_activations")
    one_of(config, f"{at}.output_activations", outputs, _NOTHING)


def matrix(read: Read, has: Has, name: str, shape: tuple[int, int], config: Settings) -> Matrix:
    """The matrix ``[out, in]`` of the layer ``name``.

    `ByChannel` for symmetric int8 with a scale for each row or for all; `Grouped` for the rest,
    with one group where rows have one scale; `Dense` for a layer that is ignored or not
    quantised, or whose groups are not neighbours. Raises CheckpointError for tensors that do not
    fit ``shape`` and UnsupportedModelError for what the config asks and Quire lacks.
    """
    check(config)
    scheme = _scheme(config, name)
    if scheme is None or not has(f"{name}.weight_scale"):
        return packed.dense(read, name, shape)
    weights = scheme["weights"]
    if _format(config, scheme) == "int-quantized":
        return _plain(read, has, name, shape, weights)
    return _packed(read, has, name, shape, weights)


def _plain(read: Read, has: Has, name: str, shape: tuple[int, int], weights: Settings) -> Matrix:
    values = checked(read, f"{name}.weight", shape, (torch.int8,))
    group, scales = _scales(read, name, shape, weights)
    zeros = _zeros(read, has, name, scales, weights)
    index = _index(read, has, name, shape[1], scales.shape[1])
    if scales.shape[1] == 1 and (zeros is None or not bool(zeros.any())):
        return ByChannel(values, scales[:, 0].float())
    if zeros is not None:
        zeros = _unsigned(zeros, 8)
    return packed.in_groups(_unsigned(values, 8), scales, zeros, 8, group, index)


def _packed(read: Read, has: Has, name: str, shape: tuple[int, int], weights: Settings) -> Matrix:
    out, inner = shape
    bits = weights.get("num_bits", 8)
    _check_shape(read, has, name, shape)
    words = checked(read, f"{name}.weight_packed", (out, -(-inner * bits // 32)), CODES)
    group, scales = _scales(read, name, shape, weights)
    zeros = _zeros(read, has, name, scales, weights)
    if zeros is not None:
        zeros = _unsigned(zeros, bits)
    index = _index(read, has, name, inner, scales.shape[1])
    codes = packed.unpack(words, bits)[:, :inner]
    return packed.in_groups(codes, scales, zeros, bits, group, index)


def _scales(read: Read, name: str, shape: tuple[int, int], weights: Settings) -> tuple[int, Tensor]:
    """Inputs in a group, and scales ``[out, groups]``."""
    out, inner = shape
    name = f"{name}.weight_scale"
    if _strategy(weights) == "group":
        group = packed.group_size(weights)
        return group, checked(read, name, (out, -(-inner // group)), FLOATS)
    return inner, _by_row(packed.of_dtype(read(name), name, FLOATS), name, out)


def _zeros(read: Read, has: Has, name: str, scales: Tensor, weights: Settings) -> Tensor | None:
    """int8 ``[out, groups]``, or None for symmetric weights."""
    name = f"{name}.weight_zero_point"
    if not has(name):
        if weights.get("symmetric", True):
            return None
        raise CheckpointError(
            f"There is no {name}, and the weights are asymmetric.",
            value=name,
            action="The checkpoint is incomplete: download it again.",
        )
    zeros = packed.of_dtype(read(name), name, (torch.int8, torch.int32))
    out, groups = scales.shape
    if zeros.dtype == torch.int8:
        if groups == 1:
            return _by_row(zeros, name, out)
        return checked(read, name, (out, groups), (torch.int8,))
    bits = weights.get("num_bits", 8)
    words = checked(read, name, (-(-out * bits // 32), groups), CODES)
    codes = packed.unpack(words.t(), bits)[:, :out].t().to(torch.int16)
    return codes.sub(2 ** (bits - 1)).to(torch.int8)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes for int8 ones."""
    return codes.to(torch.int16).add(2 ** (bits - 1)).to(torch.uint8)


def _by_row(tensor: Tensor, name: str, out: int) -> Tensor:
    """``[out, 1]``, of one value for each row or for all. Raises CheckpointError."""
    if tensor.numel() == 1:
        return tensor.reshape(1, 1).expand(out, 1)
    if tuple(tensor.shape) in ((out,), (out, 1)):
        return tensor.reshape(out, 1)
    raise CheckpointError(
        f"{name} has shape {list(tensor.shape)} and config.json asks for {[out, 1]}.",
        value=tuple(tensor.shape),
        limit=(out, 1),
        action="The weights and config.json, or its quantization_config, do not belong together: "
        "download the checkpoint again.",
    )


def _index(read: Read, has: Has, name: str, inner: int, groups: int) -> Tensor | None:
    name = f"{name}.weight_g_idx"
    if not has(name):
        return None
    index = checked(read, name, (inner,), (torch.int32, torch.int64))
    return packed.group_of_inputs(index, name, groups)


def _check_shape(read: Read, has: Has, name: str, shape: tuple[int, int]) -> None:
    """Raises CheckpointError if the shape before packing was another one."""
    name = f"{name}.weight_shape"
    if has(name):
        stored = checked(read, name, (2,), (torch.int32, torch.int64)).tolist()
        if tuple(stored) != shape:
            raise CheckpointError(
                f"{name} is {stored} and config.json asks for {list(shape)}.",
                value=tuple(stored),
                limit=shape,
                action="The weights and config.json are of different models.",
            )


def _format(config: Settings, scheme: Settings) -> object:
    """How the layers of ``scheme`` are stored: theirs, or that of the whole checkpoint."""
    return scheme.get("format") or config.get("format")


def _strategy(weights: Settings) -> object:
    """Which weights share a scale, from the group's size where it is not said."""
    if weights.get("strategy") is not None:
        return weights["strategy"]
    size = weights.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _scheme(config: Settings, name: str) -> Settings | None:
    """The scheme of ``config`` for the layer ``name``; None if it is left alone."""
    if any(_names(target, name) for target in config.get("ignore") or ()):
        return None
    fitting = [
        (rank, scheme)
        for scheme in config["config_groups"].values()
        for target in scheme["targets"]
        if (rank := _names(target, name))
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def _names(target: str, name: str) -> int:
    """0 if ``target`` does not mean the layer; the more, the closer it describes it."""
    if target == name:
        return 3
    if target.startswith("re:"):
        return 2 if packed.matches(target.removeprefix("re:"), name) else 0
    return int(target == "Linear")
