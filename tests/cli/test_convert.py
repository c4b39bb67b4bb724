"""``quire convert`` and ``quire info``, and life without the native extension."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import quire
from quire import LLM, SamplingParams
from quire.cli.main import app
from quire.errors import InvalidRequestError, UnsupportedModelError
from quire.kernels import native
from quire.models.convert import convert
from quire.models.loader import load_model, weight_bytes
from quire.weights.int8 import Int8Product
from quire.weights.quantise import Asked, parse

PROMPT = "Once upon a time there was a king who"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def tokens(model: str | Path, **options: str) -> list[int]:
    with LLM(model, kv_memory="8MiB", **options) as llm:
        return llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4:32", "int4:64+zeros"])
def test_converted_is_what_is_quantised_on_load(weights: str, tmp_path: Path) -> None:
    target = tmp_path / "new"
    done = CliRunner().invoke(app, ["convert", "demo", str(target), "--weights", weights])
    assert done.exit_code == 0, done.output
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["weights"] == weights
    with LLM(target, kv_memory="8MiB") as stored, LLM(weights=weights, kv_memory="8MiB") as made:
        assert stored.engine.runner.model.nbytes == made.engine.runner.model.nbytes
    assert tokens(target) == tokens("demo", weights=weights)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_of_8_bits_and_of_older_files(tied: bool, tmp_path: Path) -> None:
    """Before, int4 left the head as it was; such files load as they are."""
    source, new, old = (tmp_path / name for name in ("source", "new", "old"))
    shutil.copytree(Path(quire.__file__).parent / "demo_model", source)
    if not tied:
        rewrite(source, tied, {"lm_head.weight": load_model(source).embedding.unpacked().clone()})
    convert(source, new, parse("int4:32"), torch.bfloat16)
    exact, rounded = load_model(source), load_model(new)
    assert isinstance(rounded.head.product, Int8Product)
    assert not isinstance(rounded.embedding, Int8Product)
    x = torch.randn(64, exact.spec.hidden_size).bfloat16()
    expected = exact.head(x).float()
    error = (rounded.head(x).float() - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    assert rounded.nbytes <= weight_bytes(source, torch.bfloat16, parse("int4:32"))
    assert weight_bytes(new, torch.bfloat16) <= 1.01 * rounded.nbytes

    shutil.copytree(new, old)
    dense = {} if tied else {"lm_head.weight": exact.head.product.unpacked().clone()}  # type: ignore[attr-defined]
    rewrite(old, tied, dense)
    former = load_model(old)
    assert torch.equal(former.head(x).float(), expected)
    assert torch.equal(former.layers[0].out(x), rounded.layers[0].out(x))


def rewrite(folder: Path, tied: bool, head: dict[str, torch.Tensor]) -> None:
    """Give a checkpoint another head."""
    file = folder / "model.safetensors"
    kept = {n: t.clone() for n, t in load_file(file).items() if not n.startswith("lm_head.")}
    save_file(kept | head, str(file))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["convert", "demo", str(tmp_path / "a")]).exit_code == 0
    again = runner.invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "b")])
    assert again.exit_code == 2
    assert "already" in again.output
    full = runner.invoke(app, ["convert", "demo", str(tmp_path / "a")])
    assert full.exit_code == 2
    assert "not empty" in full.output
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        LLM(tmp_path / "a", weights="int8")


@pytest.mark.parametrize("text", ["int3", "int4:48", "int8:32", "int8+zeros", ""])
def test_weights_that_do_not_exist(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="weights is"):
        parse(text)


@pytest.mark.parametrize("asked", [Asked(8), Asked(4), Asked(4, 32), Asked(4, 64, True)])
def test_names_of_weights(asked: Asked) -> None:
    assert parse(str(asked)) == asked


def test_info_names_the_kernels() -> None:
    done = CliRunner().invoke(app, ["info", "--model", "demo"])
    assert done.exit_code == 0
    assert native.best in done.output
    assert "LlamaForCausalLM" in done.output


@pytest.mark.slow
def test_without_the_extension() -> None:
    """One warning, the reason in quire info, and the same tokens from PyTorch alone."""
    code = f"""
import sys, warnings
sys.modules["quire.kernels._native"] = None
from typer.testing import CliRunner
import quire
from quire import LLM, SamplingParams
from quire.cli.main import app
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with LLM(kv_memory="8MiB", dtype="float32") as llm:
        print(llm.generate({PROMPT!r}, SamplingParams(temperature=0.0, max_tokens=12))[0]
              .outputs[0].token_ids)
assert sum("native kernels" in str(w.message) for w in caught) == 1
print(CliRunner().invoke(app, ["info"]).output)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, rest = done.stdout.split("\n", 1)
    assert json.loads(first) == tokens("demo", dtype="float32")
    assert "not installed" in rest
