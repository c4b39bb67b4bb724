"""GGUF files hold the same models and tokenizers as the folders that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import tokenizers
import torch
from families import MODELS, make
from gguf_files import Q
from plain_attend import logits_in_steps

from quire.api.setup import Setup, model_folder
from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.decoder import Decoder
from quire.models.gguf import GGUFFile
from quire.models.gguf_config import gguf_config
from quire.models.gguf_tokenizer import WORDS
from quire.models.loader import load_model, load_spec, read_config, stored_dtype, weight_bytes
from quire.models.tokenizer import Tokenizer
from quire.weights.formats import Dense, Grouped

FORMATS = {  # bits, group, whether there are offsets
    "Q4_0": (4, 32, False),
    "Q4_1": (4, 32, True),
    "Q5_0": (8, 32, False),
    "Q5_1": (8, 32, True),
    "Q8_0": (8, 32, False),
    "Q4_K": (4, 32, True),
    "Q5_K": (8, 32, True),
    "Q6_K": (8, 16, False),
}
TEXTS = [
    "Once upon a time",
    " two  spaces\n\n\ttab",
    "naïve café 🎉 日本語 e\u0301",
    "it's 1234 o'clock, WE'LL see!",
    "a<|end|>b</s> c",
    "",
]


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (n,), generator=generator) for n in (30, 13, 1)]


def file_of(path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], Q | None]]) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    return GGUFFile(gguf_files.finish(writer, path))


@pytest.mark.parametrize("name", list(FORMATS))
def test_quantised_tensors_mean_what_the_format_says(name: str, tmp_path: Path) -> None:
    raw = gguf_files.random_blocks(Q[name], 5, 3)
    file = file_of(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (raw, Q[name])})
    width = 3 * gguf.GGML_QUANT_SIZES[Q[name]][0]
    expected = torch.from_numpy(gguf.quants.dequantize(raw, Q[name]))
    found = file.matrix("model.layers.0.mlp.up_proj", (5, width))
    assert isinstance(found, Grouped)
    assert (found.bits, found.group, found.offsets is not None) == FORMATS[name]
    assert int(found.codes.max()) < 2**found.bits
    assert found.shape == (5, width)
    assert found.scales.shape == (5, width // found.group)
    torch.testing.assert_close(found.dequantise(), expected, rtol=0, atol=1e-6)
    whole = file.get("model.layers.0.mlp.up_proj.weight", (5, width))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    assert file.header("model.layers.0.mlp.up_proj.weight") == ((5, width), torch.bfloat16)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16])
def test_plain_tensors_keep_their_dtype(kind: Q, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    raw = gguf.quants.quantize(values, kind)
    file = file_of(tmp_path / "x.gguf", {"output.weight": (raw, kind)})
    found = file.matrix("lm_head", (3, 32))
    assert isinstance(found, Dense)
    dtype = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}[kind]
    assert file.header("lm_head.weight") == ((3, 32), dtype)
    assert torch.equal(found.values, torch.from_numpy(values).to(dtype))
    assert file.used == {"lm_head.weight"}


def test_large_tensors_are_dequantised_in_parts(tmp_path: Path) -> None:
    raw = gguf_files.random_blocks(Q.Q8_0, 2500, 1)
    file = file_of(tmp_path / "x.gguf", {"token_embd.weight": (raw, Q.Q8_0)})
    found = file.get("model.embed_tokens.weight", (2500, 32))
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(raw, Q.Q8_0))


SAME = [
    "llama",
    "llama-tied-biased",
    "llama-linear",
    "llama-yarn",
    "llama3",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-moe-mixed",
    "gemma2",
    "gemma3",
    "gemma3-linear",
    "phi3-longrope",
    "phi3-window",
    "olmo2",
    "smollm3",
]


@pytest.mark.parametrize("name", SAME)
def test_same_model_as_the_folder(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    path = gguf_files.write(tmp_path / "model.gguf", tmp_path)
    theirs, ours = load_model(tmp_path), load_model(path)
    silent = {"layers", "architecture"}  # rotary options are equal in effect
    spec = {k: v for k, v in vars(theirs.spec).items() if k not in silent}
    assert {k: v for k, v in vars(ours.spec).items() if k not in silent} == pytest.approx(spec)
    assert [x.window for x in ours.spec.layers] == [x.window for x in theirs.spec.layers]
    assert ours.spec.architecture == theirs.spec.architecture
    expected = logits_in_steps(theirs, prompts(), [16, 16])
    for found, wanted in zip(logits_in_steps(ours, prompts(), [16, 16]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert weight_bytes(path, torch.float32) == weight_bytes(tmp_path, torch.float32)
    assert stored_dtype(path) == torch.float32


def greedy(model: Decoder, steps: int) -> list[int]:
    ids = prompts()[0]
    for _ in range(steps):
        (logits,) = logits_in_steps(model, [ids], [len(ids)])
        ids = torch.cat((ids, logits[-1:].argmax(-1)))
    return ids[-steps:].tolist()


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}  # whole blocks


def test_greedy_tokens_and_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file quantised after the reordering of rows: codes and scales move together."""
    folder = tmp_path / "folder"
    make("llama", folder)
    exact = gguf_files.write(tmp_path / "exact.gguf", folder)
    assert greedy(load_model(exact), 12) == greedy(load_model(folder), 12)
    monkeypatch.setitem(MODELS, "llama-wide", ("Llama", WIDE))
    make("llama-wide", folder)
    kinds = {"attn_k.": Q.Q8_0, "attn_q.": Q.Q8_0, "ffn_up": Q.Q4_0, "output": Q.Q8_0}
    path = gguf_files.write(tmp_path / "model.gguf", folder, kinds)
    file, model = GGUFFile(path), load_model(path, dtype=torch.float32)
    assert stored_dtype(path) == torch.bfloat16
    assert load_model(path).dtype == torch.bfloat16
    name = "model.layers.1.self_attn.k_proj"
    matrix = file.matrix(name, (16, 64))
    assert isinstance(matrix, Grouped)
    theirs = load_model(folder).layers[1].qkv.product.unpacked()[64:80]
    torch.testing.assert_close(matrix.dequantise(), theirs, rtol=0, atol=0.003)
    # q, k and v come in different formats, so their matrix is held dense
    assert torch.equal(matrix.dequantise(), model.layers[1].qkv.product.unpacked()[64:80])
    assert torch.equal(file.get(f"{name}.weight", (16, 64)), matrix.dequantise())


def test_config_is_that_of_the_folder(tmp_path: Path) -> None:
    make("gemma2", tmp_path)
    theirs = read_config(tmp_path)
    ours = gguf_config(GGUFFile(gguf_files.write(tmp_path / "model.gguf", tmp_path)))
    renamed = {"architectures", "rope_theta", "hidden_act", "mlp_bias", "query_pre_attn_scalar"}
    for key in ours.keys() - renamed:
        assert ours[key] == theirs[key], key
    assert ours["query_pre_attn_scalar"] == pytest.approx(24)


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"),
    [("gemma2", 46, 32), ("gemma2", 26, 16), ("gemma3", 62, 32)],
)
def test_gemma_scales_that_the_file_leaves_out(
    architecture: str, layers: int, scalar: float, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    config = {
        "max_position_embeddings": 64,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "model_type": architecture,
    }
    gguf_files.add_config(writer, config)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    spec = load_spec(gguf_files.finish(writer, tmp_path / "x.gguf"))
    assert spec.scale == pytest.approx(scalar**-0.5)
    windows = [layer.window for layer in spec.layers[:6]]
    assert windows == ([4096, None] * 3 if architecture == "gemma2" else [None] * 6)


@pytest.mark.parametrize(("name", "pre"), [("demo", "smollm"), ("stories", None)])
def test_same_tokenizer_as_the_folder(
    name: str, pre: str | None, tmp_path: Path, tinystories: Path
) -> None:
    folder = model_folder("demo") if name == "demo" else tinystories
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    gguf_files.add_tokenizer(writer, folder, pre)
    ours = Tokenizer.load(gguf_files.finish(writer, tmp_path / "x.gguf"))
    theirs = Tokenizer.load(folder)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs.encode(text, special=False)
        assert ours.decode(ids) == theirs.decode(ids)
        assert [ours.token_text(i) for i in ids] == [theirs.token_text(i) for i in ids]
    for field in ("eos_ids", "bos_token", "eos_token", "bos_id", "vocab_size", "chat_template"):
        assert getattr(ours, field) == getattr(theirs, field), field


PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab", "  ", "<0x0A>", "<0xC3>"]


def sentence_piece(path: Path, **options: object) -> Tokenizer:
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*PIECES, "<0xA9>"])
    writer.add_token_scores([0, 0, 0, -9, -8, -7, -2, -1, -3, -1000, 0, 0, 0])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1, 1, 4, 6, 6, 6])
    for key, value in options.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.BOOL)
    return Tokenizer.load(gguf_files.finish(writer, path))


def test_sentence_piece(tmp_path: Path) -> None:
    found = sentence_piece(tmp_path / "x.gguf")
    names = [*PIECES, "<0xA9>"]

    def pieces(text: str) -> list[str]:
        return [names[i] for i in found.encode(text)]

    assert pieces("ab ab") == ["<s>", "▁ab", "▁ab"]  # "ab" scores best, "▁" joins it then
    assert pieces("aab") == ["<s>", "▁a", "ab"]
    assert pieces("a\né") == ["<s>", "▁a", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert pieces("</s>") == ["<s>", "</s>"]
    assert found.decode(found.encode("ab  é\n")) == "ab   é\n"  # a second prefix after "  "
    assert (found.eos_ids, found.bos_token, found.eos_token) == ((2,), "<s>", "</s>")
    found = sentence_piece(tmp_path / "y.gguf", add_space_prefix=False, add_bos_token=False)
    assert pieces("ab  b") == ["ab", "  ", "b"]
    assert found.decode(found.encode(" ab  é\n")) == " ab  é\n"


@pytest.mark.parametrize("pre", sorted(WORDS))
def test_every_rule_for_words_loses_nothing(pre: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    gguf_files.add_tokenizer(writer, model_folder("demo"), pre)
    found = Tokenizer.load(gguf_files.finish(writer, tmp_path / "x.gguf"))
    for text in TEXTS[:4]:
        plain = text if pre != "qwen2" else text.replace("e\u0301", "é")
        assert found.decode(found.encode(text)) == plain


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("llama-bpe", ["It's", " ", " ", "123", "4", " ok", "\n\n", "x"]),
        ("qwen2", ["It's", " ", " ", "1", "2", "3", "4", " ok", "\n\n", "x"]),
    ],
)
def test_rules_for_words(pre: str, words: list[str]) -> None:
    splitter = WORDS[pre].pre_tokenizer()
    decoder = tokenizers.decoders.ByteLevel()
    found = [decoder.decode([w]) for w, _ in splitter.pre_tokenize_str("It's   1234 ok\n\nx")]
    assert found == ["It", "'s", "  ", " ", *words[3:]]


def test_setup_takes_a_file(tmp_path: Path, tinystories: Path) -> None:
    """Model and tokenizer of one file, through the public entry."""
    path = tmp_path / "stories.gguf"
    config = read_config(tinystories)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    _, tensors = gguf_files.converted(tinystories)
    writer = gguf.GGUFWriter(path, "llama")
    gguf_files.add_config(writer, config)
    gguf_files.add_tokenizer(writer, tinystories, None)
    for name, weight in tensors.items():
        writer.add_tensor(name, weight.float().numpy())
    gguf_files.finish(writer, path)
    mine, theirs = Setup.make(path, memory="4GiB"), Setup.make(tinystories, memory="4GiB")
    assert mine.spec == theirs.spec
    assert mine.dtype == theirs.dtype == torch.float32
    assert mine.encode("Once upon a time") == theirs.encode("Once upon a time")


def test_damaged_files(tmp_path: Path) -> None:
    make("qwen2", tmp_path)
    path = gguf_files.write(tmp_path / "model.gguf", tmp_path)
    whole = path.read_bytes()
    for size in (0, 3, 20, 200, 1500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cannot be read.*Download it again"):
            load_model(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError, match="the letters GGUF"):
        read_config(path)
    with pytest.raises(CheckpointError, match="There is no file"):
        read_config(tmp_path / "nowhere.gguf")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"path of the file itself.*model\.gguf"):
        read_config(tmp_path)


def test_missing_and_misshapen_parts(tmp_path: Path) -> None:
    weight = np.zeros((4, 32), np.float32)
    file = file_of(
        tmp_path / "x.gguf", {"token_embd.weight": (weight, None), "odd.weight": (weight, None)}
    )
    assert file.names() == ["model.embed_tokens.weight", "odd.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
        file.get("lm_head.weight", (4, 32))
    with pytest.raises(CheckpointError, match=r"shape \[4, 32\].*\[5, 32\]"):
        file.matrix("model.embed_tokens", (5, 32))
    with pytest.raises(CheckpointError, match=r"lacks qwen2\.attention\.head_count"):
        gguf_config(file)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.ggml\.tokens"):
        Tokenizer.load(tmp_path / "x.gguf")


def test_unsupported_types_are_refused_by_name(tmp_path: Path) -> None:
    raw = np.zeros((2, gguf.GGML_QUANT_SIZES[Q.Q2_K][1]), np.uint8)
    stack = np.zeros((3, *raw.shape), np.uint8)
    tensors = {"output.weight": (raw, Q.Q2_K), "blk.0.ffn_up_exps.weight": (stack, Q.Q2_K)}
    file = file_of(tmp_path / "x.gguf", tensors)
    for name in ("lm_head.weight", "model.layers.0.mlp.experts.0.up_proj.weight"):
        with pytest.raises(CheckpointError, match=r"type Q2_K.*Use a Q4_K_M"):
            file.header(name)


def written(path: Path, architecture: str, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key.replace("__", "."), value, kind)
    return gguf_files.finish(writer, path)


@pytest.mark.parametrize(
    ("architecture", "metadata", "words"),
    [
        ("mamba", {}, "architecture mamba"),
        ("llama", {"split__count": 3}, "one of 3 parts.*gguf-split --merge"),
    ],
)
def test_unsupported_files(
    architecture: str, metadata: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "x.gguf", architecture, **metadata)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        read_config(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_mul"),
        ({"attention.value_length": 16}, "different widths"),
        ({"feed_forward_length": [64, 72]}, "feed_forward_length differs from layer to layer"),
        ({"embedding_length": "wide"}, "has 'wide' as"),
    ],
)
def test_unsupported_features(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    make("llama", tmp_path)
    file = GGUFFile(gguf_files.write(tmp_path / "model.gguf", tmp_path))
    new = {f"llama.{key}": value for key, value in changes.items()}
    if "yarn" in new.get("llama.rope.scaling.type", ""):
        new["llama.rope.scaling.factor"] = 2.0
    file.metadata = {**file.metadata, **new}
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        gguf_config(file)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"tokenizer__ggml__model": "bert"}, "kind 'bert'"),
        ({"tokenizer__ggml__model": "gpt2"}, "does not name its pre-tokenizer"),
        (
            {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "poro-chat"},
            "pre-tokenizer 'poro-chat'",
        ),
        (
            {
                "tokenizer__ggml__model": "gpt2",
                "tokenizer__ggml__pre": "gpt-2",
                "tokenizer__ggml__merges": ["a z"],
            },
            "cannot be built",
        ),
        ({"tokenizer__ggml__model": "llama"}, r"no tokenizer\.ggml\.scores"),
    ],
)
def test_unsupported_tokenizers(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", "llama", tokenizer__ggml__tokens=["a", "b"], **metadata)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        Tokenizer.load(path)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    make("qwen2", tmp_path)
    path = gguf_files.write(tmp_path / "model.gguf", tmp_path)
    first = load_spec(path)
    make("qwen3", tmp_path)
    path.unlink()
    second = load_spec(gguf_files.write(path, tmp_path))
    assert first.architecture != second.architecture
