"""A small Llama whose linear layers a test writes in another format, and its logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.models.loader import load_model, weight_bytes
from quire.models.rope import rotate

CONFIG = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
Write = Callable[[tuple[int, int], torch.Generator], tuple[dict[str, Tensor], Tensor]]


class Tensors(dict[str, Tensor]):
    """Named tensors as a reader takes them."""

    def read(self, name: str) -> Tensor:
        return self[name]

    def has(self, name: str) -> bool:
        return name in self


def tiny() -> torch.nn.Module:
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 * (parameter.dim() == 1), 0.2)
    return model


def save(folder: Path, settings: dict[str, object], write: Write) -> torch.nn.Module:
    """A checkpoint with the layers of ``write``, and transformers' model of the same weights.

    ``write`` gives a layer's tensors by the end of their name, and the weight they stand for.
    """
    model = tiny()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    dense = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        shape = tensors.pop(name).shape
        packed, dense[name] = write((shape[0], shape[1]), generator)
        tensors.update({f"{name.removesuffix('weight')}{end}": t for end, t in packed.items()})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    model.load_state_dict(dense, strict=False)
    return model


@torch.no_grad()
def assert_same_logits(folder: Path, oracle: torch.nn.Module, tolerance: float = 2e-4) -> None:
    """Quire's model of ``folder`` computes what ``oracle`` does."""
    model = load_model(folder)
    tokens = torch.randint(0, 67, (21,), generator=torch.Generator().manual_seed(2))
    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(
        _: int, q: Tensor, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        assert turn is not None
        q, k = rotate(q, *turn), rotate(k, *turn)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = attention(q, k, v, is_causal=True, scale=model.spec.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    ours = model.logits(model.forward(tokens, torch.arange(len(tokens)), attend))
    theirs = oracle(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def assert_planned(folder: Path) -> None:
    """The bytes planned for the weights are those held, but for the padding of a tiny model."""
    held, planned = load_model(folder).nbytes, weight_bytes(folder, torch.float32)
    assert 0.8 * held <= planned <= 1.2 * held, (held, planned)
