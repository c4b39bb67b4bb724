"""Entries in files: exactly what went in, and no RAM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError
from quire.kv.method import Entries, gather
from quire.kv.recipes import parse
from quire.kv.store.disk import OnDisk
from toy import make_facts


def entries(heads: int, n: int, dim: int, dtype: torch.dtype) -> Entries:
    keys, values = torch.randn(2, n, heads, dim).to(dtype).transpose(1, 2)  # not contiguous
    return Entries(keys, values, torch.arange(7, 7 + n).expand(heads, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 128, 301])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(n)
    layers = [entries(3, n, 24, dtype) for _ in range(2)]
    stored = OnDisk(str(tmp_path)).pack(make_facts(), layers)
    assert stored.nbytes == 0
    assert stored.disk_bytes == 2 * 2 * 3 * n * 24 * dtype.itemsize
    index = torch.randint(n, (4, 3, 5))
    for layer, e in enumerate(layers):
        for found, wanted in (
            (stored.read(layer), e),
            (stored.read(layer, index), gather(e, index)),
        ):
            assert torch.equal(found.keys, wanted.keys)
            assert torch.equal(found.values, wanted.values)
            assert torch.equal(found.positions, wanted.positions)
    assert not list(tmp_path.iterdir())  # the files have no names


def test_instinfer_is_sparf_over_files(tmp_path: Path) -> None:
    recipe = parse(f"instinfer(budget=0.1,folder={tmp_path})")
    assert recipe.store == OnDisk(str(tmp_path))
    assert recipe.fetch == parse(f"sparf(budget=0.1,tier=disk,folder={tmp_path})").fetch


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(InvalidRequestError, match="no such folder"):
        parse("disk(folder=/no/such/folder)")


def test_the_demonstration_model_says_the_same() -> None:
    prompt = "It was a dark and stormy night; " * 20
    params = SamplingParams(max_tokens=12, temperature=0)
    texts = []
    for kv in ("none", "disk", "instinfer(budget=1.0)"):
        with LLM("demo", kv=kv, kv_memory="32MiB") as llm:
            found = llm.generate([prompt + "The", prompt + "A"], params)
            texts.append([o.outputs[0].text for o in found])
    assert texts[0] == texts[1] == texts[2]
