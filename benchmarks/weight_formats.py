"""What each weight format costs in quality on the demonstration model.

``python benchmarks/weight_formats.py [--trials N]`` prints a Markdown table. The layer error is
that of each matrix's product with standard normal inputs, activation rounding included, relative
to the float32 product, averaged over all matrices.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from quire import LLM
from quire.models.decoder import Decoder
from training.evaluate import perplexity, recall_rate
from training.train import read_text

FORMATS: tuple[tuple[str, str | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "int8"),
    ("bfloat16", "int4:32"),
    ("bfloat16", "int4:32+zeros"),
    ("bfloat16", "int4:64"),
    ("bfloat16", "int4:64+zeros"),
)


def layer_error(exact: Decoder, model: Decoder) -> float:
    """Mean over matrices of the relative error of their products."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for before, after in zip(exact.layers, model.layers, strict=True):
        for right, held in zip(before.products(), after.products(), strict=True):
            width = right.unpacked().shape[1]
            x = torch.randn(64, width, generator=generator)
            expected = right(x, None, None)
            found = held(x.to(model.dtype), None, None).float()
            errors.append(((found - expected).norm() / expected.norm()).item())
    return sum(errors) / len(errors)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="facts for each recall figure")
    parser.add_argument("--windows", type=int, default=40, help="windows of 1,024 tokens")
    args = parser.parse_args()
    books, wiki = read_text("books", held_out=True), read_text("wikitext-2-test")
    sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"[ \n]+", " ", books))
    print(
        "| weights | MB | layer error | perplexity, books | perplexity, WikiText-2 "
        "| one fact in 1,024 tokens | four facts |"
    )
    print("|---" * 7 + "|")
    exact = None
    for dtype, weights in FORMATS:
        with LLM(dtype=dtype, weights=weights, kv_memory="512MiB") as llm:
            model = llm.engine.runner.model
            exact = exact or model
            row = [
                weights or dtype,
                f"{model.nbytes / 1e6:.1f}",
                f"{100 * layer_error(exact, model):.2f}%",
                f"{perplexity(llm, books, args.windows)[0]:.2f}",
                f"{perplexity(llm, wiki, args.windows)[0]:.2f}",
                *(
                    f"{100 * recall_rate(llm, sentences, n, 1024, args.trials // n):.0f}%"
                    for n in (1, 4)
                ),
            ]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
