"""Checkpoint files without an engine: safetensors in and out, and int8 weights by channel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "<i1"}  # bfloat16 as its bits
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def read_tensors(file: Path) -> dict[str, tuple[str, Array]]:
    """Type and values of each tensor of a safetensors file; bfloat16 as its bits."""
    raw = np.memmap(file, np.uint8, "r")
    size = int(raw[:8].view("<u8")[0])
    header = json.loads(raw[8 : 8 + size].tobytes())
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + size + at for at in entry["data_offsets"])
        values = raw[first:last].view(TYPES[entry["dtype"]]).reshape(entry["shape"])
        found[name] = (entry["dtype"], values)
    return found


def write_tensors(file: Path, tensors: dict[str, tuple[str, Array]]) -> None:
    """Write a safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, values) in tensors.items():
        offsets = [at, at + values.nbytes]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            stream.write(np.ascontiguousarray(values).tobytes())


def as_float(kind: str, values: Array) -> NDArray[np.float32]:
    """Values in float32."""
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def write_int8(checkpoint: Path, target: Path) -> None:
    """A copy of a Llama checkpoint with int8 weights, in the ``compressed-tensors`` format.

    A scale for each output feature; activations are quantised at run time, by token.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, tuple[str, Array]] = {}
    for name, (kind, values) in read_tensors(checkpoint / "model.safetensors").items():
        if name.removesuffix(".weight").rpartition(".")[2] not in PROJECTIONS:
            tensors[name] = (kind, values)
            continue
        full = as_float(kind, values)
        scales = np.maximum(np.abs(full).max(1, keepdims=True) / 127, 1e-12)
        codes = np.clip(np.rint(full / scales), -127, 127).astype(np.int8)
        tensors[name] = ("I8", codes)
        tensors[f"{name}_scale"] = ("F32", scales.astype(np.float32))
    write_tensors(target / "model.safetensors", tensors)
    config = json.loads((checkpoint / "config.json").read_text())
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in checkpoint.glob("tokenizer*.json"):
        shutil.copy(file, target)
