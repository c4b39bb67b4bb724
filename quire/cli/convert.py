"""``quire convert``: quantise a checkpoint once, so that it starts fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quire.api.setup import DTYPES, model_folder
from quire.engine.budget import format_bytes
from quire.errors import InvalidRequestError, QuireError
from quire.models import convert as checkpoints
from quire.models.loader import stored_dtype
from quire.weights.quantise import parse


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='Checkpoint folder, or "demo".')],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder to write.")],
    weights: Annotated[
        str, typer.Option(help="int8, int4, or int4:GROUP with or without +zeros.")
    ] = "int8",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of what is not quantised. Default: the checkpoint's.")
    ] = None,
) -> None:
    """Write MODEL with quantised weights to FOLDER, a checkpoint that quire loads."""
    try:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidRequestError(
                f"dtype is {dtype!r}.", field="dtype", action=f"Choose of {', '.join(DTYPES)}."
            )
        folder = model_folder(model)
        held = DTYPES[dtype] if dtype is not None else stored_dtype(folder)
        size = checkpoints.convert(folder, output, parse(weights), held)
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    print(f"{output}: {format_bytes(size)} of tensors, {weights}")
