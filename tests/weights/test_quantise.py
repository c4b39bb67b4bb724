from __future__ import annotations

import pytest
import torch

from quire.errors import InvalidRequestError, ModelError
from quire.weights.formats import Grouped
from quire.weights.quantise import by_channel, grouped


def gaussian(out: int, inner: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out + inner)
    return torch.randn(out, inner, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_by_channel_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = gaussian(7, 50, dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    found = by_channel(weight)
    assert (found.values.dtype, found.scales.dtype) == (torch.int8, torch.float32)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert torch.allclose(found.scales, step[:, 0])
    assert ((found.dequantise() - weight.float()).abs() <= 0.5001 * step).all()
    assert (found.values.abs().amax(1) == 127).all()


def test_zeros_stay_zeros() -> None:
    weight = gaussian(4, 64)
    weight[1] = 0.0
    weight[2, :32] = 0.0
    found = [by_channel(weight), grouped(weight, group=32, symmetric=True)]
    found.append(grouped(weight, group=32, symmetric=False))
    for matrix in found:
        values = matrix.dequantise()
        assert torch.isfinite(values).all()
        assert (values[1] == 0).all()
    assert all((m.dequantise()[2, :32] == 0).all() for m in found[1:])
    assert by_channel(torch.zeros(0, 8)).shape == (0, 8)


def steps(weight: torch.Tensor, found: Grouped) -> torch.Tensor:
    """Errors in steps of the groups."""
    error = (found.dequantise() - weight).view(len(weight), -1, found.group)
    return (error / found.scales[..., None]).abs()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_asymmetric_groups_are_within_half_a_step(bits: int, group: int) -> None:
    weight = gaussian(5, 256) + torch.tensor([0.0, 3.0, -3.0, 50.0, 0.1])[:, None]
    found = grouped(weight, bits=bits, group=group, symmetric=False)
    assert found.offsets is not None
    assert found.codes.dtype == torch.uint8
    assert found.scales.shape == found.offsets.shape == (5, 256 // group)
    assert (steps(weight, found) < 0.502).all()
    codes = found.codes.view(5, -1, group)
    assert (codes.amin(2) == 0).all()
    assert (codes.amax(2) == 2**bits - 1).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_groups(bits: int) -> None:
    weight = gaussian(5, 256)
    found = grouped(weight, bits=bits, group=64, symmetric=True)
    assert found.offsets is None
    parts, values = weight.view(5, -1, 64), found.dequantise().view(5, -1, 64)
    at = parts.abs().argmax(2, keepdim=True)
    assert torch.allclose(values.gather(2, at), parts.gather(2, at))
    assert (found.codes.view(5, -1, 64).gather(2, at) == 0).all()
    error = steps(weight, found)
    assert (error < 1.001).all()  # one step where the far end of the other side is clipped
    assert (error < 0.501).float().mean() > 0.99


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_scales_beat_those_of_the_middle(group: int) -> None:
    weight = gaussian(256, 512)
    found = grouped(weight, group=group, symmetric=True)
    parts = weight.view(256, -1, group)
    plain = parts.abs().amax(2, keepdim=True) / 7.5
    other = (parts / plain).round().clamp(-8, 7) * plain
    error = (found.dequantise() - weight).square().mean()
    assert error < 0.9 * (other - parts).square().mean()


def test_refusals_say_what_fits() -> None:
    weight = gaussian(2, 96)
    with pytest.raises(ModelError, match=r"96 inputs .* groups of 64.*groups of 32"):
        grouped(weight, group=64, symmetric=True)
    with pytest.raises(ModelError, match=r"Ask for int8"):
        grouped(gaussian(2, 50), group=64, symmetric=True)
    with pytest.raises(InvalidRequestError, match=r"group 48.*32, 64, 128") as caught:
        grouped(weight, group=48, symmetric=True)
    assert caught.value.field == "group"
    with pytest.raises(InvalidRequestError, match=r"bits 3.*4, 8"):
        grouped(weight, bits=3, group=32, symmetric=True)
    weight[1, 1] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        by_channel(weight)
    weight[1, 1] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        grouped(weight, group=32, symmetric=False)
