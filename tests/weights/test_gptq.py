"""GPTQ, against a writer that puts every bit of the format in place by itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from whole import Tensors, assert_planned, assert_same_logits, save

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.loader import load_model, load_spec, stored_dtype
from quire.weights.formats import Dense, Grouped
from quire.weights.gptq import matrix
from quire.weights.stored import reader

NAME = "model.layers.0.mlp.up_proj"


def config(**changes: object) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        **changes,
    }


def words(fields: list[list[int]], bits: int, less: int = 0) -> torch.Tensor:
    """int32 ``[len(fields), n]`` of rows of codes, from the lowest bits up; ``less``: subtracted
    from each field of the finished word."""
    each = 32 // bits
    ones = sum(less << (bits * at) for at in range(each))
    rows = []
    for row in fields:
        packed = []
        for start in range(0, len(row), each):
            word = 0
            for at in range(each):
                word |= int(row[start + at]) << (bits * at)
            packed.append((word - ones) % 2**32)
        rows.append(packed)
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def layer(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    index: list[int] | None = None,
    zeros: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a layer of random codes, and its weight ``[out, in]`` in float32."""
    out, inner = shape
    group = inner if group == -1 else group
    groups = -(-inner // group)
    codes = torch.randint(0, 2**bits, (out, inner), generator=generator)
    if zeros is None:
        zeros = torch.randint(0, 2**bits, (out, groups), generator=generator)
    scales = (torch.rand(out, groups, generator=generator) * 0.05 + 0.001).half()
    of = [i // group for i in range(inner)] if index is None else index
    tensors = {
        "qweight": words(codes.tolist(), bits).t().contiguous(),
        "qzeros": words(zeros.t().tolist(), bits, less=2 - version),
        "scales": scales.t().contiguous(),
        "g_idx": torch.tensor(of, dtype=torch.int32),
    }
    weight = torch.empty(out, inner)
    for o in range(out):
        for i in range(inner):
            weight[o, i] = scales[o, of[i]].float() * float(codes[o, i] - zeros[o, of[i]])
    return tensors, weight


def stored(tensors: dict[str, torch.Tensor]) -> Tensors:
    return Tensors({f"{NAME}.{end}": tensor for end, tensor in tensors.items()})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("inner", "group"), [(64, 32), (64, -1), (256, 128), (48, 64)])
def test_every_code_scale_and_zero(bits: int, version: int, inner: int, group: int) -> None:
    shape = (16, inner)
    written, weight = layer(shape, seeded(), bits=bits, group=group, version=version)
    name = "gptq" if version == 1 else "gptq_v2"
    tensors = stored(written)
    settings = config(bits=bits, group_size=group, checkpoint_format=name)
    found = matrix(tensors.read, tensors.has, NAME, shape, settings)
    assert isinstance(found, Grouped)
    assert (found.bits, found.shape) == (bits, shape)
    assert found.group == (group if inner % group == 0 and group > 0 else inner)
    assert torch.equal(found.dequantise(), weight)
    del tensors[f"{NAME}.g_idx"]
    same = matrix(tensors.read, tensors.has, NAME, shape, settings)
    assert torch.equal(same.dequantise(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_in_the_middle_need_no_offsets(bits: int) -> None:
    middle = torch.full((8, 2), 2 ** (bits - 1))
    written, weight = layer((8, 64), seeded(1), bits=bits, zeros=middle)
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config(bits=bits))
    assert isinstance(found, Grouped)
    assert found.offsets is None
    assert torch.equal(found.dequantise(), weight)


def test_a_zero_of_nought_borrows_from_its_neighbour() -> None:
    zeros = torch.tensor([[0], [8], [0], [0], [15], [1], [0], [0]])
    written, weight = layer((8, 32), seeded(2), zeros=zeros)
    assert int(written["qzeros"][0, 0]) & 0xFF == 0x6F  # 0x80 - 0x11
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 32), config())
    assert torch.equal(found.dequantise(), weight)


def test_groups_in_the_order_of_activations_give_the_plain_matrix() -> None:
    order = torch.randperm(64, generator=seeded(3)).tolist()
    index = [place // 32 for place in order]
    written, weight = layer((8, 64), seeded(4), index=index)
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config(desc_act=True))
    assert isinstance(found, Dense)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, weight, rtol=0, atol=0)
    # static groups: read in another order, stored with neighbours together
    written, weight = layer((8, 64), seeded(4))
    tensors = stored(written)
    assert isinstance(
        matrix(tensors.read, tensors.has, NAME, (8, 64), config(desc_act=True)), Grouped
    )


def test_a_short_last_group_gives_the_plain_matrix() -> None:
    written, weight = layer((8, 72), seeded(5))
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 72), config())
    assert isinstance(found, Dense)
    assert torch.equal(found.values, weight)


def test_an_index_that_was_never_filled_in() -> None:
    written, weight = layer((8, 64), seeded(6))
    written["g_idx"].zero_()
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config())
    assert isinstance(found, Grouped)
    assert torch.equal(found.dequantise(), weight)


def test_layers_with_settings_of_their_own() -> None:
    settings = config(dynamic={"-:.*down.*": {}, r"+:model\.layers\.0\.": {"bits": 8}})
    written, weight = layer((8, 64), seeded(7), bits=8)
    tensors = stored(written)
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), settings)
    assert torch.equal(found.dequantise(), weight)
    plain = Tensors({"model.layers.0.mlp.down_proj.weight": weight.half()})
    left = matrix(plain.read, plain.has, "model.layers.0.mlp.down_proj", (8, 64), settings)
    assert isinstance(left, Dense)
    assert left.values.dtype == torch.float16
    with pytest.raises(UnsupportedModelError, match=r"bits 3"):
        reader(config(dynamic={"+:.*": {"bits": 3}}))


@pytest.mark.parametrize("end", ["qweight", "qzeros", "scales", "g_idx"])
def test_misshapen_tensors_are_named(end: str) -> None:
    written, _ = layer((8, 64), seeded(8))
    tensors = stored({**written, end: written[end][:-1]})
    with pytest.raises(CheckpointError, match=rf"{NAME}\.{end} has shape .*download"):
        matrix(tensors.read, tensors.has, NAME, (8, 64), config())
    tensors = stored({**written, end: written[end].double()})
    with pytest.raises(CheckpointError, match=rf"{NAME}\.{end} has dtype float64"):
        matrix(tensors.read, tensors.has, NAME, (8, 64), config())


def test_groups_beyond_the_last_and_shapes_that_do_not_pack() -> None:
    written, _ = layer((8, 64), seeded(9))
    written["g_idx"][5] = 2
    tensors = stored(written)
    with pytest.raises(CheckpointError, match=rf"{NAME}\.g_idx puts inputs into group 2 of 2"):
        matrix(tensors.read, tensors.has, NAME, (8, 64), config())
    for shape in ((8, 60), (12, 64)):
        with pytest.raises(CheckpointError, match=r"packs 8 codes in a word"):
            matrix(tensors.read, tensors.has, NAME, shape, config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, "bits 3"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format True"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\).*awq, compressed-tensors, gptq"),
    ],
)
def test_what_is_not_supported(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        reader(config(**changes))


@pytest.mark.parametrize("changes", [{"bits": "4"}, {"group_size": 0}, {"dynamic": [1]}])
def test_damaged_config(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(changes))} of the quantization_config"):
        reader(config(**changes))


@pytest.mark.parametrize(("bits", "group"), [(4, 24), (8, -1)])
def test_whole_model(bits: int, group: int, tmp_path: Path) -> None:
    settings = config(bits=bits, group_size=group)
    oracle = save(tmp_path, settings, lambda s, g: layer(s, g, bits=bits, group=group))
    assert_same_logits(tmp_path, oracle)
    assert stored_dtype(tmp_path) == torch.float32
    assert_planned(tmp_path)


def test_the_dtype_is_that_of_the_embedding(tmp_path: Path) -> None:
    save(tmp_path, config(group_size=-1), lambda s, g: layer(s, g, group=-1))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    for dtype in (torch.bfloat16, torch.float16):
        changed = {n: t.to(dtype) if t.dtype == torch.float32 else t for n, t in tensors.items()}
        save_file(changed, file)
        assert stored_dtype(tmp_path) == dtype
        model = load_model(tmp_path)
        assert model.dtype == dtype


def test_biases_of_zeros_are_no_news(tmp_path: Path) -> None:
    def write(
        shape: tuple[int, int], generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, weight = layer(shape, generator, group=-1)
        return {**tensors, "bias": torch.zeros(shape[0])}, weight

    assert_same_logits(tmp_path, save(tmp_path, config(group_size=-1), write))

    def biased(
        shape: tuple[int, int], generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, weight = write(shape, generator)
        return {**tensors, "bias": torch.ones(shape[0])}, weight

    save(tmp_path, config(group_size=-1), biased)
    with pytest.warns(UserWarning, match="14 tensors are not part"):
        load_model(tmp_path)


def test_integers_without_a_quantization_config(tmp_path: Path) -> None:
    save(
        tmp_path,
        config(),
        lambda s, _: ({"weight": torch.ones(s, dtype=torch.int8)}, torch.ones(s)),
    )
    with pytest.raises(CheckpointError, match=r"_proj\.weight has dtype int8 where"):
        load_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    load_spec(tmp_path)
    with pytest.raises(CheckpointError, match=r"_proj\.weight has dtype int8\."):
        load_model(tmp_path)
