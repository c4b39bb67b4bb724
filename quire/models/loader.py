"""Loading a model from a checkpoint folder (safetensors, single or sharded) or a GGUF file.

Both are memory-mapped. A ``folder`` below is the path of either.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.blocks import MLP, MixtureOfExperts, Normalise
from quire.models.config import Config
from quire.models.decoder import Decoder, Layer
from quire.models.gguf import GGUFFile, is_gguf
from quire.models.gguf_config import gguf_config
from quire.models.registry import spec_from_config
from quire.models.spec import LayerSpec, ModelSpec
from quire.models.tokenizer import read_json
from quire.weights import stored
from quire.weights.dense import DenseProduct
from quire.weights.formats import Dense, Matrix, pick_rows, stack
from quire.weights.linear import Linear, Product, make_product
from quire.weights.quantise import Asked, quantise

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {  # the integers are codes of quantised weights
    **_FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
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
        self.quantisation = read_config(folder).get("quantization_config")
        self._where = _index(folder)
        self._open: dict[Path, safe_open] = {}
        self._matrix = stored.reader(self.quantisation)

    @property
    def method(self) -> str | None:
        """How the weights are quantised; None if they are not."""
        return None if self.quantisation is None else str(self.quantisation["quant_method"])

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

    def held_bytes(self, name: str, dtype: torch.dtype) -> int:
        """Bytes that a tensor takes once loaded, at most."""
        shape, stored_as = self.header(name)
        return stored.held_bytes(name, shape, stored_as, dtype)

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
            raise self._wrong_dtype(name, kind)
        return tuple(part.get_shape()), _DTYPES[kind]

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A floating-point tensor that must have ``shape``. Raises CheckpointError."""
        found, dtype = self.header(name)
        if found != shape:
            raise CheckpointError(
                f"{self._where[name]}: {name} has shape {list(found)} and config.json asks for "
                f"{list(shape)}.",
                value=found,
                limit=shape,
                action="The weights and config.json are of different models.",
            )
        if not dtype.is_floating_point:
            raise self._wrong_dtype(name, str(dtype).removeprefix("torch."))
        return self.read(name)

    def read(self, name: str) -> Tensor:
        """A tensor of whatever shape and supported dtype. Raises CheckpointError."""
        self.header(name)
        self.used.add(name)
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """The weights ``[out, in]`` of the layer ``name``, in the format that they are stored in.

        Raises CheckpointError for a missing or misshapen tensor, UnsupportedModelError.
        """
        if self.quantisation is None:
            return Dense(self.get(f"{name}.weight", shape))
        return self._matrix(self.read, self._where.__contains__, name, shape)

    def _wrong_dtype(self, name: str, kind: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where[name]}: {name} has dtype {kind}.",
            value=kind,
            limit=sorted(_FLOATS),
            action="Only float32, float16 and bfloat16 weights are supported, and integers where "
            "config.json has a quantization_config.",
        )

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
    """The dtype of the checkpoint's embedding, bfloat16 for a quantised GGUF file.

    The scales of quantised weights have no say: they are often float16 in bfloat16 models.
    """
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, GGUFFile) and checkpoint.method is not None:
        return torch.bfloat16
    return checkpoint.header(f"{load_spec(folder).names.embed}.weight")[1]


def weight_bytes(folder: Path, dtype: torch.dtype, weights: Asked | None = None) -> int:
    """Bytes of all weights when held, or a little more; reads only the files' headers."""
    checkpoint = open_checkpoint(folder)
    spec = load_spec(folder)
    head, embed = (f"{n}.weight" for n in (spec.names.head, spec.names.embed))
    total = 0
    for name in checkpoint.names():
        shape = checkpoint.header(name)[0]
        dense = math.prod(shape) * dtype.itemsize
        if name == embed:
            total += dense
        if weights is not None and is_layer_matrix(spec, name, shape):
            total += weights.nbytes(shape)
        elif weights is not None and name == (embed if spec.tied else head):
            total += weights.head.nbytes(shape)
        elif name != embed and not (name == head and spec.tied):
            total += checkpoint.held_bytes(name, dtype)
    return total


def is_layer_matrix(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of a layer that is quantised when that is asked for."""
    names = spec.names
    layers = [*names.qkv, names.out, *names.up, names.down, *names.expert_up, names.expert_down]
    generic = re.sub(r"\.\d+\.", ".#.", name.removesuffix(".weight"))
    patterns = {re.sub(r"\{[ie]\}", "#", layer) for layer in layers}
    return len(shape) == 2 and name.endswith(".weight") and generic in patterns


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    context: int | None = None,
    weights: Asked | None = None,
    deterministic: bool = False,
) -> Decoder:
    """Load a checkpoint. ``dtype`` None keeps the stored one. Raises ModelError.

    ``weights``: quantise the layers' matrices and the head on the way; None keeps what is stored.
    ``deterministic``: products whose rows do not depend on the batch.
    """
    spec = load_spec(folder, context)
    if dtype is None:
        dtype = stored_dtype(folder)
    checkpoint = open_checkpoint(folder)
    if weights is not None and checkpoint.method is not None:
        raise UnsupportedModelError(
            f"{folder} is quantised already ({checkpoint.method}).",
            value=str(weights),
            action="Leave --weights out, or give the model's float16 or bfloat16 version.",
        )
    return _Loader(spec, checkpoint, dtype, device, weights, deterministic).decoder()


class _Loader:
    """Builds a `Decoder` from named tensors, one layer at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint | GGUFFile,
        dtype: torch.dtype,
        device: str,
        asked: Asked | None,
        invariant: bool,
    ) -> None:
        self.spec = spec
        self.asked = asked
        self.invariant = invariant
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device

    def decoder(self) -> Decoder:
        spec, names = self.spec, self.spec.names
        table = (spec.vocab_size, spec.hidden_size)
        values = self.tensor(f"{names.embed}.weight", table)
        embedding = DenseProduct.make(values)
        if not spec.tied or f"{names.head}.values" in self.checkpoint.names():
            head = self.head(self.checkpoint.matrix(names.head, table))
        else:
            self.checkpoint.used.add(f"{names.head}.weight")
            head = Linear(embedding) if self.asked is None else self.head(Dense(values))
        decoder = Decoder(
            spec,
            embedding,
            tuple(self.layer(i, layer) for i, layer in enumerate(spec.layers)),
            self.norm(names.final_norm, spec.hidden_size),
            head,
        )
        unused = [n for n in self.checkpoint.names() if self.matters(n)]
        if unused:
            warnings.warn(
                f"{self.checkpoint.folder}: {len(unused)} tensors are not part of "
                f"{spec.architecture} and are ignored, such as {min(unused)}.",
                stacklevel=3,
            )
        return decoder

    def head(self, matrix: Matrix) -> Linear:
        return Linear(self.product(quantise(matrix, self.asked and self.asked.head)))

    def matters(self, name: str) -> bool:
        """Whether leaving out a tensor that was not used may change what the model computes."""
        if name in self.checkpoint.used:
            return False
        # Writers of GPTQ give a bias of zeros to layers that have none.
        if self.checkpoint.method is None or not name.endswith(".bias"):
            return True
        shape = self.checkpoint.header(name)[0]
        return bool(self.checkpoint.get(name, shape).any())

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
        self,
        names: tuple[str, ...],
        out: int | tuple[int, ...],
        inner: int,
        *,
        bias: bool,
        heads: int | None = None,
        quantised: bool = True,
    ) -> Linear:
        """One matrix of one or more tensors; ``out``: output width of all, or of each.

        ``heads``: the rows are q, k, v head by head and are put apart. ``quantised`` False keeps
        the matrix as it is stored, whatever weights are asked for.
        """
        widths = (out,) if isinstance(out, int) else out
        if len(names) < len(widths):
            widths = (sum(widths),)
        weights = [
            self.checkpoint.matrix(name, (width, inner))
            for name, width in zip(names, widths, strict=True)
        ]
        biases = [
            self.tensor(f"{name}.bias", (width,))
            for name, width in zip(names, widths, strict=True)
            if bias
        ]
        matrix = stack(weights)
        whole = _one(biases) if bias else None
        if heads is not None:
            order = _separated(heads, matrix.shape[0])
            matrix, whole = pick_rows(matrix, order), None if whole is None else whole[order]
        if quantised:
            matrix = quantise(matrix, self.asked)
        return Linear(self.product(matrix), whole)

    def product(self, matrix: Matrix) -> Product:
        return make_product(matrix.to(self.device), self.dtype, invariant=self.invariant)

    def layer(self, index: int, layer: LayerSpec) -> Layer:
        spec = self.spec
        names, hidden = spec.names, spec.hidden_size
        q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def at(name: str) -> str:
            return name.replace("{i}", str(index))

        qkv = self.linear(
            tuple(map(at, names.qkv)),
            (q_width, kv_width, kv_width),
            hidden,
            bias=spec.qkv_bias,
            heads=spec.heads if spec.interleaved_qkv else None,
        )
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
            spec.activation,
            spec.gated,
        )

    def mixture(self, index: int, layer: LayerSpec) -> MixtureOfExperts:
        spec, names = self.spec, self.spec.names
        experts = layer.experts
        assert experts is not None

        def at(name: str, expert: int = 0) -> str:
            return name.replace("{i}", str(index)).replace("{e}", str(expert))

        return MixtureOfExperts(
            self.linear(
                (at(names.router),), experts.count, spec.hidden_size, bias=False, quantised=False
            ),
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


def _separated(heads: int, rows: int) -> Tensor:
    """The order of rows that turns (head, [q k v], dim) into ([q k v], head, dim)."""
    return torch.arange(rows).view(heads, 3, -1).transpose(0, 1).flatten()
