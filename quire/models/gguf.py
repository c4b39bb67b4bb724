"""Reading a GGUF file: the tensors under Hugging Face names, memory-mapped.

llama.cpp stores the same weights as a checkpoint folder, with four differences that are undone
here: its own names, experts stacked into one tensor, rows of q and k reordered in the Llama
family, and Gemma's norm weights with 1 added.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import (
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from torch import Tensor

from quire.errors import CheckpointError
from quire.weights import ggml
from quire.weights.formats import Dense, Matrix

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADVICE = "Download it again, or convert the model again with llama.cpp."

_VERSIONS = (2, 3)  # 1 had shorter lengths
_CODES = {  # for both struct and numpy
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_DIFFERENT = {  # by general.architecture
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "llama": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    },
}
_REORDERED = ("llama", "smollm3")  # architectures whose rotary pairs are neighbours
_RAISED = ("gemma2", "gemma3")  # architectures whose norm weights have 1 added
_ROPE = re.compile(r"(rope_freqs|rope_factors_\w+|blk\.\d+\.attn_rot_embd)\.weight")


def is_gguf(path: Path) -> bool:
    """Whether ``path`` names a GGUF file rather than a checkpoint folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


@dataclass(frozen=True)
class Stored:
    """A tensor as the file holds it: bytes of blocks, or numbers; ``shape`` is what they mean."""

    kind: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class _Contents:
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class GGUFFile:
    """The tensors of a file by Hugging Face name, read on demand; as `loader.Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.used: set[str] = set()
        contents = _read(path)
        self.metadata = contents.metadata
        self.architecture = str(contents.metadata.get("general.architecture"))
        self.rope = {  # made from the config, and no weights
            name.removesuffix(".weight"): stored.data
            for name, stored in contents.tensors.items()
            if _ROPE.fullmatch(name)
        }
        self._tensors: dict[str, Stored] = {}
        for name, stored in contents.tensors.items():
            if not _ROPE.fullmatch(name):
                self._tensors |= _named(self.architecture, name, stored)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._tensors)

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of a tensor, and its dtype: bfloat16 if quantised. Raises CheckpointError."""
        stored = self._find(name)
        return stored.shape, FLOATS.get(stored.kind, torch.bfloat16)

    @property
    def method(self) -> str | None:
        """How the weights are quantised; None if they are not."""
        kinds = {stored.kind for stored in self._tensors.values()} - FLOATS.keys()
        return f"GGUF {', '.join(sorted(kinds))}" if kinds else None

    def held_bytes(self, name: str, dtype: torch.dtype) -> int:
        """Bytes that a tensor takes once loaded."""
        stored = self._find(name)
        weights = math.prod(stored.shape)
        if stored.kind in FLOATS:
            return weights * dtype.itemsize
        return ggml.held_bytes(stored.kind, weights)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that must have ``shape``, float32 if quantised. Raises CheckpointError."""
        stored = self._take(name, shape)
        if stored.kind in FLOATS:
            return stored.data
        rows = stored.data.reshape(-1, stored.data.shape[-1])
        return ggml.dequantise(stored.kind, rows).reshape(shape)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """The weights ``[out, in]`` of the layer ``name``, in the format that they are stored in.

        Raises CheckpointError.
        """
        stored = self._take(f"{name}.weight", shape)
        if stored.kind in FLOATS:
            return Dense(stored.data)
        return ggml.grouped(stored.kind, stored.data)

    def _find(self, name: str) -> Stored:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}.",
                value=name,
                action="The file is incomplete or not of the architecture that it names.",
            )
        stored = self._tensors[name]
        if stored.kind not in FLOATS and stored.kind not in ggml.FORMATS:
            raise CheckpointError(
                f"{self.folder}: {name} has the type {stored.kind}, which is not supported.",
                value=stored.kind,
                limit=sorted([*FLOATS, *ggml.FORMATS]),
                action="Use a Q4_K_M, Q6_K, Q8_0 or F16 file of the model.",
            )
        return stored

    def _take(self, name: str, shape: tuple[int, ...]) -> Stored:
        stored = self._find(name)
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(stored.shape)} and the file's own metadata "
                f"asks for {list(shape)}.",
                value=stored.shape,
                limit=shape,
                action=ADVICE,
            )
        self.used.add(name)
        data = stored.data
        if self.architecture in _REORDERED and (heads := self._heads(name)):
            # rows are independent, so bytes of blocks move as numbers do
            data = data[_halves_from_neighbours(shape[0], heads)]
        if self.architecture in _RAISED and name.endswith("norm.weight"):
            data = data - 1
        return Stored(stored.kind, stored.shape, data)

    def _heads(self, name: str) -> int:
        """Heads of the rows that ``name`` yields, if they are rotated; else 0."""
        key = f"{self.architecture}.attention.head_count"
        if ".k_proj." in name and f"{key}_kv" in self.metadata:
            key += "_kv"
        elif ".k_proj." not in name and ".q_proj." not in name:
            return 0
        found = self.metadata.get(key, 0)
        return int(found[0] if isinstance(found, list) else found)


def _halves_from_neighbours(rows: int, heads: int) -> Tensor:
    """Where each row of a head is stored when rotary pairs are neighbours, not halves apart."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _named(architecture: str, name: str, stored: Stored) -> dict[str, Stored]:
    """The tensor under its Hugging Face name; a stack of experts as one tensor each."""
    stem, dot, suffix = name.rpartition(".")
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    table = _LAYER | _DIFFERENT.get(architecture, {})
    if parts is None or parts[2] not in table:
        return {_WHOLE.get(stem, stem) + dot + suffix: stored}
    full = f"model.layers.{parts[1]}.{table[parts[2]]}{dot}{suffix}"
    if "{e}" not in full:
        return {full: stored}
    return {
        full.replace("{e}", str(e)): Stored(stored.kind, stored.shape[1:], expert)
        for e, expert in enumerate(stored.data)
    }


def _read(path: Path) -> _Contents:
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"There is no file {path}.",
            value=str(path),
            action='Give a .gguf file, a checkpoint folder, or "demo".',
        ) from error
    return _parse(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a file is opened for its config, tokenizer, sizes and weights
def _parse(path: Path, size: int, changed: int) -> _Contents:  # noqa: ARG001
    try:
        contents = _contents(path)
    except (OSError, ValueError, OverflowError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}.", value=str(path), action="Download it again."
        ) from error
    parts = contents.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a model.",
            value=parts,
            limit=1,
            action="Join the parts with llama-gguf-split --merge.",
        )
    return contents


class _Header:
    """Reads a file's header from front to back.

    `gguf.GGUFReader` keeps an array for every single token of the vocabulary: seconds and half a
    gigabyte where this takes a fraction of a second.
    """

    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self.data = data.data
        self.at = 0

    def number(self, kind: GGUFValueType) -> Any:
        (found,) = struct.unpack_from(_CODES[kind], self.data, self.at)
        self.at += struct.calcsize(_CODES[kind])
        return found

    def text(self) -> str:
        size = self.number(GGUFValueType.UINT64)
        if size > len(self.data) - self.at:
            raise ValueError("it ends within a text")
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8", "replace")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self._list()
        found = self.number(kind)
        # the shortest decimal of a float32 is what the config had: 1e-05, not 9.99999974e-06
        return float(str(np.float32(found))) if kind == GGUFValueType.FLOAT32 else found

    def _list(self) -> list[Any]:
        kind = GGUFValueType(self.number(GGUFValueType.UINT32))
        count = self.number(GGUFValueType.UINT64)
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise ValueError("its metadata has a list of lists")
        numbers = np.frombuffer(self.data, _CODES[kind], count, self.at)
        self.at += numbers.nbytes
        found: list[Any] = numbers.tolist()
        return found


def _contents(path: Path) -> _Contents:
    # copy-on-write, as torch wants writable memory; nothing is ever written
    data = np.memmap(path, np.uint8, "c")
    header = _Header(data)
    if header.number(GGUFValueType.UINT32) != GGUF_MAGIC:
        raise ValueError("it does not start with the letters GGUF")
    version = header.number(GGUFValueType.UINT32)
    if version not in _VERSIONS:
        raise ValueError(f"version {version} of the format is not among {_VERSIONS}")
    tensor_count = header.number(GGUFValueType.UINT64)
    metadata: dict[str, Any] = {}
    for _ in range(header.number(GGUFValueType.UINT64)):
        name = header.text()
        metadata[name] = header.value(GGUFValueType(header.number(GGUFValueType.UINT32)))
    infos = [_info(header) for _ in range(tensor_count)]
    unit = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(unit, int) or unit < 1 or unit % 8:
        raise ValueError(f"its alignment is {unit!r}")
    start = -(-header.at // unit) * unit
    tensors: dict[str, Stored] = {}
    for name, kind, shape, offset in infos:
        if offset % unit:
            raise ValueError(f"{name} is not aligned")
        tensors[name] = _stored(name, kind, shape, data[start + offset :])
    return _Contents(metadata, tensors)


def _info(header: _Header) -> tuple[str, str, tuple[int, ...], int]:
    """Name, type, shape and place of a tensor."""
    name = header.text()
    count = header.number(GGUFValueType.UINT32)
    if not 1 <= count <= 8:
        raise ValueError(f"{name} has {count} dimensions")
    shape = [header.number(GGUFValueType.UINT64) for _ in range(count)]
    number = header.number(GGUFValueType.UINT32)
    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    offset = header.number(GGUFValueType.UINT64)
    return name, known.get(number, f"number {number}"), tuple(reversed(shape)), offset


def _stored(name: str, kind: str, shape: tuple[int, ...], data: np.ndarray[Any, Any]) -> Stored:
    """A tensor whose bytes are the first of ``data``."""
    if kind in FLOATS:
        row = shape[-1] * FLOATS[kind].itemsize
    elif kind in ggml.FORMATS:
        block = ggml.FORMATS[kind]
        row = shape[-1] // block.weights * block.size
        if shape[-1] % block.weights:
            raise ValueError(f"rows of {name} are no whole blocks of {kind}")
    else:  # refused when it is asked for
        return Stored(kind, shape, torch.empty(1, 0))
    size = math.prod(shape[:-1]) * row
    if size > len(data):
        raise ValueError(f"it ends {size - len(data)} bytes before the end of {name}")
    found = torch.from_numpy(data[:size]).view(*shape[:-1], row)
    return Stored(kind, shape, found.view(FLOATS[kind]) if kind in FLOATS else found)
