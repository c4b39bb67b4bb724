from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models import loader
from quire.models.loader import load_model, load_spec, stored_dtype, weight_bytes
from quire.models.registry import SUPPORTED

ROOM = Path(loader.__file__).parent


@pytest.fixture
def folder(tmp_path: Path, tinystories: Path) -> Path:
    return Path(shutil.copytree(tinystories, tmp_path / "model"))


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_sharded_equals_single(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in set(where.values()):
        save_file({n: weights[n] for n in names if where[n] == file}, str(sharded / file))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    one, many = load_model(folder), load_model(sharded)
    assert torch.equal(one.embedding.values, many.embedding.values)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert torch.equal(a.qkv.product.unpacked(), b.qkv.product.unpacked())
        assert torch.equal(a.out.product.unpacked(), b.out.product.unpacked())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_sizes(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    assert model.dtype == dtype
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
    count = sum(p.numel() for p in oracle.parameters())
    assert weight_bytes(folder, dtype) == count * dtype.itemsize
    assert stored_dtype(folder) == torch.float32


def test_tied_head_shares_memory(folder: Path) -> None:
    model = load_model(folder)
    assert model.head.product is model.embedding


def test_unsupported_architecture_lists_the_supported(folder: Path) -> None:
    edit(folder, architectures=["BertModel"])
    with pytest.raises(UnsupportedModelError, match="BertModel is not supported") as caught:
        load_spec(folder)
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_quantised_checkpoints_are_refused_by_method(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(bitsandbytes\).*awq"):
        load_spec(folder)
    edit(folder, quantization_config={"quant_method": "awq", "version": "gemv"})
    with pytest.raises(UnsupportedModelError, match=r"version 'gemv'"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su'"),
        ({"hidden_act": "swish9"}, "activation 'swish9'"),
        (
            {"layer_types": ["linear_attention"] * 5, "architectures": ["Qwen3ForCausalLM"]},
            "linear",
        ),
    ],
)
def test_unknown_features_are_refused_by_name(
    folder: Path, changes: dict[str, object], words: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        load_spec(folder)


def test_incomplete_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        load_spec(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_spec(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_spec(folder)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_spec(folder / "nowhere")


def test_damaged_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Convert the \.bin"):
        load_model(folder)


def test_missing_and_misshapen_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.3.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, str(file))
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)
    save_file({**weights, name: weights[name][:-1].clone()}, str(file))
    with pytest.raises(CheckpointError, match=r"has shape \[171, 64\].*\[172, 64\]"):
        load_model(folder)
    save_file({**weights, "extra.weight": torch.zeros(2)}, str(file))
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        load_model(folder)


def test_context_within_the_model(folder: Path) -> None:
    assert load_spec(folder).context == 512
    assert load_spec(folder, 100).context == 100
    with pytest.raises(UnsupportedModelError, match="513 tokens is more than the model's 512"):
        load_spec(folder, 513)


def test_architectures_are_small() -> None:
    shared = {"blocks", "chat", "config", "decoder", "loader", "registry", "rope", "spec"}
    shared |= {
        "tokenizer",
        "gguf",
        "gguf_config",
        "gguf_tokenizer",
        "convert",
        "digest",
        "__init__",
    }
    files = [f for f in ROOM.glob("*.py") if f.stem not in shared]
    assert len(files) == len(SUPPORTED)
    assert all(len(file.read_text().splitlines()) < 100 for file in files)


def test_trained_model_goes_on_as_it_should(folder: Path) -> None:
    """The continuation that the checkpoint's authors give."""
    from quire import LLM, SamplingParams

    start = "Once upon a time, there was a little girl named Lily."
    with LLM(folder, kv_memory="4MiB") as llm:
        (found,) = llm.generate(start, SamplingParams(temperature=0.0, max_tokens=64))
    assert found.outputs[0].text.startswith(
        " She loved to play outside in the park. One day, she saw a big, red ball."
    )
