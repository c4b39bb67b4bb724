"""AWQ, against a writer that puts every bit of the format in place by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from whole import Tensors, assert_planned, assert_same_logits, save

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.loader import stored_dtype
from quire.weights.awq import matrix
from quire.weights.formats import Dense, Grouped
from quire.weights.stored import reader

NAME = "model.layers.0.self_attn.q_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs a word holds, from the lowest bits up


def config(**changes: object) -> dict[str, object]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        **changes,
    }


def words(rows: list[list[int]]) -> torch.Tensor:
    packed = []
    for row in rows:
        packed.append([])
        for start in range(0, len(row), 8):
            word = 0
            for at, output in enumerate(ORDER):
                word |= int(row[start + output]) << (4 * at)
            packed[-1].append(word)
    return torch.from_numpy(np.array(packed, dtype=np.uint32).view(np.int32))


def layer(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    group: int = 32,
    zeros: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a layer of random codes, and its weight ``[out, in]`` in float32."""
    out, inner = shape
    group = inner if group == -1 else group
    groups = inner // group
    codes = torch.randint(0, 16, (out, inner), generator=generator)
    if zeros is None:
        zeros = torch.randint(0, 16, (out, groups), generator=generator)
    scales = (torch.rand(out, groups, generator=generator) * 0.05 + 0.001).half()
    tensors = {
        "qweight": words(codes.t().tolist()),
        "qzeros": words(zeros.t().tolist()),
        "scales": scales.t().contiguous(),
    }
    weight = torch.empty(out, inner)
    for o in range(out):
        for i in range(inner):
            at = i // group
            weight[o, i] = scales[o, at].float() * float(codes[o, i] - zeros[o, at])
    return tensors, weight


def stored(tensors: dict[str, torch.Tensor]) -> Tensors:
    return Tensors({f"{NAME}.{end}": tensor for end, tensor in tensors.items()})


@pytest.mark.parametrize(("inner", "group"), [(64, 32), (48, -1), (256, 128), (32, 32)])
def test_every_code_scale_and_zero(inner: int, group: int) -> None:
    written, weight = layer((16, inner), torch.Generator().manual_seed(0), group=group)
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (16, inner), config(group_size=group))
    assert isinstance(found, Grouped)
    assert (found.bits, found.group) == (4, inner if group == -1 else group)
    assert torch.equal(found.dequantise(), weight)


def test_zeros_in_the_middle_need_no_offsets() -> None:
    zeros = torch.full((8, 2), 8)
    written, weight = layer((8, 64), torch.Generator().manual_seed(1), zeros=zeros)
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config(version="GEMM"))
    assert isinstance(found, Grouped)
    assert found.offsets is None
    assert torch.equal(found.dequantise(), weight)


def test_layers_left_alone() -> None:
    weight = torch.randn(8, 64).bfloat16()
    tensors = stored({"weight": weight})
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config())
    assert isinstance(found, Dense)
    assert torch.equal(found.values, weight)
    with pytest.raises(CheckpointError, match=rf"{NAME}\.weight has shape \[8, 64\]"):
        matrix(tensors.read, tensors.has, NAME, (8, 32), config())


@pytest.mark.parametrize("end", ["qweight", "qzeros", "scales"])
def test_misshapen_tensors_are_named(end: str) -> None:
    written, _ = layer((8, 64), torch.Generator().manual_seed(2))
    tensors = stored({**written, end: written[end][:-1]})
    with pytest.raises(CheckpointError, match=rf"{NAME}\.{end} has shape .*download"):
        matrix(tensors.read, tensors.has, NAME, (8, 64), config())
    tensors = stored({**written, end: written[end].double()})
    with pytest.raises(CheckpointError, match=rf"{NAME}\.{end} has dtype float64"):
        matrix(tensors.read, tensors.has, NAME, (8, 64), config())


def test_group_of_another_size_than_the_config_says() -> None:
    written, _ = layer((8, 64), torch.Generator().manual_seed(3), group=64)
    tensors = stored(written)
    with pytest.raises(CheckpointError, match=r"qzeros has shape \[1, 1\].*\[2, 1\]"):
        matrix(tensors.read, tensors.has, NAME, (8, 64), config())
    with pytest.raises(CheckpointError, match="packs 8 codes in a word"):
        matrix(tensors.read, tensors.has, NAME, (12, 64), config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"version": "gemv_fast"}, "version 'gemv_fast'.*'gemm'"), ({"bits": 3}, "bits 3")],
)
def test_what_is_not_supported(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        reader(config(**changes))


@pytest.mark.parametrize("group", [24, -1])
def test_whole_model(group: int, tmp_path: Path) -> None:
    settings = config(group_size=group)
    oracle = save(tmp_path, settings, lambda s, g: layer(s, g, group=group))
    assert_same_logits(tmp_path, oracle)
    assert stored_dtype(tmp_path) == torch.float32
    assert_planned(tmp_path)
