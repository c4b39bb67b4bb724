"""Loading a model from a checkpoint folder (safetensors, single or sharded) or a GGUF file.

Both are memory-mapped. A ``folder`` below is the path of either.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.errors import CheckpointError
from quire.models.blocks import ACTIVATIONS, MLP, MixtureOfExperts, Normalise
from quire.models.config import Config
from quire.models.decoder import Decoder, Layer
from quire.models.gguf import GGUFFile, is_gguf
from quire.models.gguf_config import gguf_config
from quire.models.registry import spec_from_config
from quire.models.spec import LayerSpec, ModelSpec
from quire.models.tokenizer import read_json
from quire.weights.linear import Linear

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def read_config(folder: Path) -> Config:
    """``config.json`` of a checkpoint folder, or what stands for it. Raises ModelError."""
    if is_gguf(folder):
        return gguf_config(GGUFFile(folder))
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint folder {folder}.",
            value=str(folder),
            action='Give a folder with config.json and *.safetensors, a .gguf file, or "demo".',
        )
    config = read_json(folder / "config.json")
    if not config:
        single = next(folder.glob("*.gguf"), None)
        raise CheckpointError(
            f"{folder} has no config.json.",
            value=str(folder),
            action="" if single is None else f"Give the path of the file itself: {single}",
        )
    return config


def load_spec(folder: Path, context: int | None = None) -> ModelSpec:
    """The model that the folder describes; reads no weights."""
    return spec_from_config(read_config(folder), context)


class Checkpoint:
    """The tensors of a folder by name, read on demand from memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[str] = set()
        self._where = _index(folder)
        self._open: dict[Path, safe_open] = {}

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor. Raises CheckpointError."""
        try:
            part = self._file(name).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._where[name]} lacks {name}, which the index lists there.",
                value=name,
                action="Download the folder again.",
            ) from error
        kind = part.get_dtype()
        if kind not in _DTYPES:
            raise CheckpointError(
                f"{self._where[name]}: {name} has dtype {kind}.",
                value=kind,
                limit=sorted(_DTYPES),
                action="Only float32, float16 and bfloat16 weights are supported.",
            )
        return tuple(part.get_shape()), _DTYPES[kind]

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that must have ``shape``. Raises CheckpointError."""
        found, _ = self.header(name)
        if found != shape:
            raise CheckpointError(
                f"{self._where[name]}: {name} has shape {list(found)} and config.json asks for "
                f"{list(shape)}.",
                value=found,
                limit=shape,
                action="The weights and config.json are of different models.",
            )
        self.used.add(name)
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def _file(self, name: str) -> safe_open:
        if name not in self._where:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}.",
                value=name,
                action="The checkpoint is incomplete or not of the architecture that it names.",
            )
        path = self._where[name]
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}.", value=str(path), action="Download it again."
        ) from error


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, without the buffers that old checkpoints hold."""
    listed = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    if listed:
        return {n: folder / file for n, file in listed.items() if not n.endswith(_BUFFERS)}
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        old = any(folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} has no *.safetensors files.",
            value=str(folder),
            action="Convert the .bin files to safetensors first." if old else "Download them.",
        )
    return {
        name: path
        for path in files
        for name in _open(path).keys()  # noqa: SIM118
        if not name.endswith(_BUFFERS)
    }


def open_checkpoint(path: Path) -> Checkpoint | GGUFFile:
    """The tensors of a folder or a GGUF file. Raises CheckpointError."""
    return GGUFFile(path) if is_gguf(path) else Checkpoint(path)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the checkpoint's first matrix; bfloat16 if it is quantised."""
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        shape, dtype = checkpoint.header(name)
        if len(shape) == 2:
            return dtype
    raise CheckpointError(f"{folder} holds no matrix.", value=str(folder))


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of all weights when held in ``dtype``; reads only the files' headers."""
    checkpoint = open_checkpoint(folder)
    config = read_config(folder)
    head = spec_from_config(config).names.head
    tied = spec_from_config(config).tied
    names = [n for n in checkpoint.names() if not (tied and n == f"{head}.weight")]
    return sum(math.prod(checkpoint.header(name)[0]) for name in names) * dtype.itemsize


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    context: int | None = None,
) -> Decoder:
    """Load a checkpoint. ``dtype`` None keeps the stored one. Raises ModelError."""
    spec = load_spec(folder, context)
    if dtype is None:
        dtype = stored_dtype(folder)
    return _Loader(spec, open_checkpoint(folder), dtype, device).decoder()


class _Loader:
    """Builds a `Decoder` from named tensors, one layer at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint | GGUFFile,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.spec = spec
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device

    def decoder(self) -> Decoder:
        spec, names = self.spec, self.spec.names
        table = (spec.vocab_size, spec.hidden_size)
        embedding = self.tensor(f"{names.embed}.weight", table)
        head = Linear(embedding)
        if spec.tied:
            self.checkpoint.used.add(f"{names.head}.weight")
        else:
            head = self.linear((names.head,), table[0], table[1], bias=False)
        decoder = Decoder(
            spec,
            embedding,
            tuple(self.layer(i, layer) for i, layer in enumerate(spec.layers)),
            self.norm(names.final_norm, spec.hidden_size),
            head,
        )
        unused = set(self.checkpoint.names()) - self.checkpoint.used
        if unused:
            warnings.warn(
                f"{self.checkpoint.folder}: {len(unused)} tensors are not part of "
                f"{spec.architecture} and are ignored, such as {min(unused)}.",
                stacklevel=3,
            )
        return decoder

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.checkpoint.get(name, shape).to(self.device, self.dtype)

    def norm(self, name: str, width: int) -> Normalise:
        bias = f"{name}.bias"
        return Normalise(
            self.tensor(f"{name}.weight", (width,)),
            self.tensor(bias, (width,)) if self.spec.norm == "layer" else None,
            self.spec.norm_eps,
            self.spec.norm,
        )

    def linear(
        self, names: tuple[str, ...], out: int | tuple[int, ...], inner: int, *, bias: bool
    ) -> Linear:
        """One matrix of one or more tensors; ``out``: output width of all, or of each."""
        widths = (out,) if isinstance(out, int) else out
        if len(names) < len(widths):
            widths = (sum(widths),)
        weights = [
            self.tensor(f"{name}.weight", (width, inner))
            for name, width in zip(names, widths, strict=True)
        ]
        biases = [
            self.tensor(f"{name}.bias", (width,))
            for name, width in zip(names, widths, strict=True)
            if bias
        ]
        return Linear(_one(weights), _one(biases) if bias else None)

    def layer(self, index: int, layer: LayerSpec) -> Layer:
        spec = self.spec
        names, hidden = spec.names, spec.hidden_size
        q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def at(name: str) -> str:
            return name.replace("{i}", str(index))

        qkv = self.linear(
            tuple(map(at, names.qkv)), (q_width, kv_width, kv_width), hidden, bias=spec.qkv_bias
        )
        if spec.interleaved_qkv:
            qkv = _separate_heads(qkv, spec.heads)
        q_norm = k_norm = None
        if spec.qk_norm is not None:
            full = spec.qk_norm == "full"
            q_norm = self.norm(at(names.q_norm), q_width if full else spec.head_dim)
            k_norm = self.norm(at(names.k_norm), kv_width if full else spec.head_dim)
        return Layer(
            layer,
            qkv,
            self.linear((at(names.out),), hidden, q_width, bias=spec.out_bias),
            q_norm,
            k_norm,
            tuple(self.norm(at(name), hidden) for name in names.norms),
            self.mlp(tuple(map(at, names.up)), at(names.down), spec.intermediate_size)
            if layer.experts is None
            else self.mixture(index, layer),
        )

    def mlp(self, up: tuple[str, ...], down: str, width: int) -> MLP:
        spec = self.spec
        widths = (width, width) if spec.gated else (width,)
        return MLP(
            self.linear(up, widths, spec.hidden_size, bias=spec.mlp_bias),
            self.linear((down,), spec.hidden_size, width, bias=spec.mlp_bias),
            ACTIVATIONS[spec.activation],
            spec.gated,
        )

    def mixture(self, index: int, layer: LayerSpec) -> MixtureOfExperts:
        spec, names = self.spec, self.spec.names
        experts = layer.experts
        assert experts is not None

        def at(name: str, expert: int = 0) -> str:
            return name.replace("{i}", str(index)).replace("{e}", str(expert))

        return MixtureOfExperts(
            self.linear((at(names.router),), experts.count, spec.hidden_size, bias=False),
            tuple(
                self.mlp(
                    tuple(at(name, e) for name in names.expert_up),
                    at(names.expert_down, e),
                    experts.intermediate,
                )
                for e in range(experts.count)
            ),
            experts,
        )


def _one(parts: list[Tensor]) -> Tensor:
    """The parts one below the other; a single part stays where it is in the mapped file."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _separate_heads(qkv: Linear, heads: int) -> Linear:
    """Reorder rows from (head, [q k v], dim) to ([q k v], head, dim)."""

    def reorder(tensor: Tensor) -> Tensor:
        parts = tensor.view(heads, 3, -1, *tensor.shape[1:])  # [heads, 3, head_dim, ...]
        return parts.transpose(0, 1).reshape(tensor.shape)

    return Linear(reorder(qkv.weight), None if qkv.bias is None else reorder(qkv.bias))
