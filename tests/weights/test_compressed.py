"""compressed-tensors, against the package that writes the format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from whole import Tensors, assert_planned, assert_same_logits, tiny

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.loader import load_model, stored_dtype
from quire.weights.compressed import matrix
from quire.weights.formats import ByChannel, Dense, Grouped
from quire.weights.stored import reader

NAME = "model.layers.0.mlp.up_proj"
TOKENS = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)


def parameters(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, as the package's observer of extremes finds them."""
    if args.strategy == "tensor":
        parts = weight.reshape(1, -1)
    else:
        size = args.group_size if args.strategy == "group" else weight.shape[1]
        parts = weight.unflatten(1, (-1, size))
    scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    return scales, zeros.to(torch.int8)


def settings(
    args: QuantizationArgs, form: str, inputs: QuantizationArgs | None = None
) -> dict[str, object]:
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    found = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head"])
    config: dict[str, object] = found.model_dump()
    return config


def written(
    shape: tuple[int, int], args: QuantizationArgs, form: str, dtype: torch.dtype
) -> tuple[Tensors, torch.Tensor]:
    """The package's tensors for a random layer, and its own decompressed weight in ``dtype``."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    weight = (torch.randn(shape, generator=generator) + 0.3).to(dtype)
    scales, zeros = parameters(weight, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    packed = compressor.compress(state, scheme)
    dense = compressor.decompress(packed, scheme)["weight"]
    return Tensors({f"{NAME}.{end}": tensor for end, tensor in packed.items()}), dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 64), {"group_size": 32}),
        ((12, 256), {"group_size": 128}),
        ((16, 64), {"strategy": "channel"}),
        ((9, 35), {"strategy": "channel"}),  # the last words are not full
        ((6, 20), {"strategy": "tensor"}),
    ],
)
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_the_weight_that_the_package_reads(
    form: str,
    shape: tuple[int, int],
    options: dict[str, object],
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> None:
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **options)
    tensors, weight = written(shape, args, form, dtype)
    found = matrix(tensors.read, tensors.has, NAME, shape, settings(args, form))
    if form == "int-quantized" and symmetric and "group_size" not in options:
        assert isinstance(found, ByChannel)
        assert found.scales.shape == (shape[0],)
    else:
        assert isinstance(found, Grouped)
        assert found.bits == (8 if form == "int-quantized" else bits)
        assert found.group == options.get("group_size", shape[1])
        assert (found.offsets is None) == symmetric
    assert torch.equal(found.dequantise().to(dtype), weight)


def test_zero_points_that_are_not_packed() -> None:
    """Of older versions of the package."""
    args = QuantizationArgs(num_bits=4, symmetric=False, group_size=32)
    tensors, weight = written((16, 64), args, "pack-quantized", torch.float16)
    _, zeros = parameters_of((16, 64), args)
    tensors[f"{NAME}.weight_zero_point"] = zeros
    config = settings(args, "pack-quantized")
    found = matrix(tensors.read, tensors.has, NAME, (16, 64), config)
    assert torch.equal(found.dequantise().half(), weight)


def parameters_of(
    shape: tuple[int, int], args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    return parameters((torch.randn(shape, generator=generator) + 0.3).half(), args)


def test_groups_in_the_order_of_activations() -> None:
    args = QuantizationArgs(num_bits=4, group_size=32)
    tensors, _ = written((8, 64), args, "pack-quantized", torch.float16)
    config = settings(args, "pack-quantized")
    codes = matrix(tensors.read, tensors.has, NAME, (8, 64), config)
    assert isinstance(codes, Grouped)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32
    tensors[f"{NAME}.weight_g_idx"] = index.int()
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config)
    assert isinstance(found, Dense)
    scales = tensors[f"{NAME}.weight_scale"].float()
    for i in range(64):
        expected = (codes.codes[:, i].float() - 8) * scales[:, int(index[i])]
        assert torch.equal(found.values[:, i], expected)
    tensors[f"{NAME}.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    assert isinstance(matrix(tensors.read, tensors.has, NAME, (8, 64), config), Grouped)


def test_which_scheme_a_layer_has() -> None:
    whole, parts = (
        QuantizationArgs(num_bits=4, group_size=32),
        QuantizationArgs(num_bits=8, strategy="channel"),
    )
    config = settings(whole, "mixed-precision")
    groups = config["config_groups"]
    assert isinstance(groups, dict)
    groups["group_0"]["format"] = "pack-quantized"
    eight = QuantizationScheme(targets=["re:.*up_proj$"], weights=parts, format="int-quantized")
    groups["group_1"] = eight.model_dump()
    tensors, weight = written((8, 64), parts, "int-quantized", torch.float16)
    found = matrix(tensors.read, tensors.has, NAME, (8, 64), config)
    assert isinstance(found, ByChannel)
    assert torch.equal(found.dequantise().half(), weight)
    tensors, weight = written((8, 64), whole, "pack-quantized", torch.float16)
    other = Tensors({k.replace("up_proj", "down_proj"): v for k, v in tensors.items()})
    name = NAME.replace("up_proj", "down_proj")
    assert isinstance(matrix(other.read, other.has, name, (8, 64), config), Grouped)


@pytest.mark.parametrize("ignored", [NAME, "re:.*mlp.*"])
def test_layers_left_alone(ignored: str) -> None:
    weight = torch.randn(8, 64).half()
    tensors = Tensors({f"{NAME}.weight": weight})
    config = settings(QuantizationArgs(num_bits=4, group_size=32), "pack-quantized")
    for ignore in ([ignored], []):  # named, or just not quantised
        config["ignore"] = ignore
        found = matrix(tensors.read, tensors.has, NAME, (8, 64), config)
        assert isinstance(found, Dense)
        assert torch.equal(found.values, weight)


@pytest.mark.parametrize("end", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_misshapen_tensors_are_named(end: str) -> None:
    args = QuantizationArgs(num_bits=4, symmetric=False, group_size=32)
    config = settings(args, "pack-quantized")
    tensors, _ = written((16, 64), args, "pack-quantized", torch.float16)
    whole = tensors[f"{NAME}.{end}"]
    for wrong, words in ((whole[:-1], "shape .*download"), (whole.double(), "dtype float64")):
        tensors[f"{NAME}.{end}"] = wrong
        with pytest.raises(CheckpointError, match=rf"{NAME}\.{end} has {words}"):
            matrix(tensors.read, tensors.has, NAME, (16, 64), config)


def test_missing_and_contradicting_tensors() -> None:
    args = QuantizationArgs(num_bits=4, symmetric=False, group_size=32)
    config = settings(args, "pack-quantized")
    tensors, _ = written((16, 64), args, "pack-quantized", torch.float16)
    changed = Tensors({**tensors, f"{NAME}.weight_shape": torch.tensor([16, 63])})
    with pytest.raises(CheckpointError, match=rf"{NAME}\.weight_shape is \[16, 63\]"):
        matrix(changed.read, changed.has, NAME, (16, 64), config)
    del tensors[f"{NAME}.weight_zero_point"]
    with pytest.raises(CheckpointError, match=rf"no {NAME}\.weight_zero_point"):
        matrix(tensors.read, tensors.has, NAME, (16, 64), config)
    args = QuantizationArgs(num_bits=8, strategy="channel")
    tensors, _ = written((16, 64), args, "int-quantized", torch.float16)
    tensors[f"{NAME}.weight_scale"] = torch.ones(15, 1)
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[15, 1\].*\[16, 1\]"):
        matrix(tensors.read, tensors.has, NAME, (16, 64), settings(args, "int-quantized"))


STATIC = QuantizationArgs(num_bits=8, strategy="tensor")
CROOKED = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=False)
FLOAT = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (STATIC, r"input_activations\.strategy 'tensor'"),
        (CROOKED, r"input_activations\.symmetric False"),
        (FLOAT, r"input_activations\.type 'float'"),
    ],
)
def test_activations_that_are_not_supported(inputs: QuantizationArgs, words: str) -> None:
    args = QuantizationArgs(num_bits=8, strategy="channel")
    reader(settings(args, "int-quantized", TOKENS))
    with pytest.raises(UnsupportedModelError, match=words):
        reader(settings(args, "int-quantized", inputs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "float-quantized"}, "format 'float-quantized'"),
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\.W4A16"),
    ],
)
def test_what_is_not_supported(changes: dict[str, object], words: str) -> None:
    args = QuantizationArgs(num_bits=4, group_size=32)
    with pytest.raises(UnsupportedModelError, match=words):
        reader({**settings(args, "pack-quantized"), **changes})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (QuantizationArgs(num_bits=8, type="float", strategy="channel"), "weights.type 'float'"),
        (QuantizationArgs(num_bits=3, strategy="channel"), "weights.num_bits 3"),
        (
            QuantizationArgs(num_bits=8, strategy="block", block_structure=[8, 8]),
            "weights.strategy 'block'",
        ),
    ],
)
def test_weights_that_are_not_supported(args: QuantizationArgs, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        reader(settings(args, "pack-quantized"))


def test_damaged_config() -> None:
    for config in ({"quant_method": "compressed-tensors"}, ["compressed-tensors"]):
        with pytest.raises(CheckpointError, match="quantization_config"):
            reader(config)
    args = QuantizationArgs(num_bits=4, group_size=32)
    config = {**settings(args, "pack-quantized"), "ignore": ["re:(", "lm_head"]}
    with pytest.raises(CheckpointError, match=r"'\(' .* is not a regular expression"):
        matrix(Tensors().read, Tensors().has, NAME, (8, 64), config)


@pytest.mark.parametrize(
    ("args", "inputs"),
    [
        (QuantizationArgs(num_bits=4, group_size=24), None),
        (QuantizationArgs(num_bits=4, group_size=24, symmetric=False), None),
        (QuantizationArgs(num_bits=4, strategy="channel"), None),
        (QuantizationArgs(num_bits=8, strategy="channel"), TOKENS),
    ],
    ids=["w4a16", "w4a16-asymmetric", "w4a16-channel", "w8a8"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_whole_model(
    args: QuantizationArgs, inputs: QuantizationArgs | None, tmp_path: Path
) -> None:
    model = tiny()
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            scales, zeros = parameters(module.weight.data, args)
            module.weight_scale.data = scales
            if not args.symmetric:
                module.weight_zero_point.data = zeros
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    compressor.decompress_model(model)

    oracle = transformers.LlamaForCausalLM(model.config).eval()  # in float activations
    oracle.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "weight_" not in name}
    )
    # With int8 activations the logits, some 3 apart, move by the rounding of each product.
    assert_same_logits(tmp_path, oracle, 2e-4 if inputs is None else 0.15)
    assert stored_dtype(tmp_path) == torch.float32
    assert_planned(tmp_path)
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
