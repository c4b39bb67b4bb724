"""The tiled arena gives back what was written, wherever it lies."""

from __future__ import annotations

import pytest
import torch

from quire.kv.arena import TiledArena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "slots",
    [
        list(range(96)),
        list(range(5, 50)),
        [*range(64, 81), *range(16, 32)],
        [7, 3, 90, 3],
        [],
    ],
    ids=["whole pages", "from within a page", "two runs", "any order", "none"],
)
def test_read(dtype: torch.dtype, slots: list[int]) -> None:
    torch.manual_seed(0)
    arena = TiledArena.make(2, 3, 16, 96, dtype)
    keys, values = torch.randn(2, 96, 3, 16).to(dtype)
    arena.write(1, torch.arange(96), keys, values)
    found = arena.read(1, torch.tensor(slots, dtype=torch.int64))
    for mine, theirs in zip(found, (keys, values), strict=True):
        assert torch.equal(mine, theirs[slots].transpose(0, 1))
