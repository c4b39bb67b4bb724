"""Writing a checkpoint with quantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.gguf import GGUFFile
from quire.models.loader import Checkpoint, is_layer_matrix, load_spec, open_checkpoint, read_config
from quire.weights import saved
from quire.weights.formats import Dense
from quire.weights.quantise import Asked, quantise

BESIDE = ("tokenizer", "special_tokens", "chat_template", "generation_config", "vocab", "merges")


def convert(source: Path, target: Path, weights: Asked, dtype: torch.dtype) -> int:
    """Write ``source`` to the folder ``target`` with ``weights``; returns the bytes of its tensors.

    What stays dense is written in ``dtype``. Raises ModelError.
    """
    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint, GGUFFile) or checkpoint.method is not None:
        raise UnsupportedModelError(
            f"{source} is {checkpoint.method or 'a GGUF file'} already.",
            value=str(source),
            action="Convert a folder with float16, bfloat16 or float32 weights.",
        )
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(
            f"{target} is not empty.", value=str(target), action="Give a new folder."
        )
    target.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(checkpoint, source, weights, dtype)
    partial = target / "partial.tmp"
    save_file(tensors, str(partial), metadata={"format": "pt"})
    config = read_config(source)
    config["quantization_config"] = {
        "quant_method": saved.METHOD,
        "version": 1,
        "weights": str(weights),
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in source.iterdir():
        if path.name.startswith(BESIDE) and path.is_file():
            shutil.copy(path, target / path.name)
    partial.rename(target / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(
    checkpoint: Checkpoint, source: Path, weights: Asked, dtype: torch.dtype
) -> dict[str, Tensor]:
    spec = load_spec(source)
    head, embed = (f"{n}.weight" for n in (spec.names.head, spec.names.embed))
    found: dict[str, Tensor] = {}
    for name in checkpoint.names():
        if name == head and spec.tied:
            continue
        shape = checkpoint.header(name)[0]
        values = checkpoint.get(name, shape)
        if is_layer_matrix(spec, name, shape):
            matrix = quantise(Dense(values), weights)
            found |= saved.tensors(name.removesuffix(".weight"), matrix)
            continue
        if name == (embed if spec.tied else head):
            matrix = quantise(Dense(values), weights.head)
            found |= saved.tensors(head.removesuffix(".weight"), matrix)
        if name != head:
            found[name] = values.to(dtype)
    return {name: tensor.contiguous() for name, tensor in found.items()}
