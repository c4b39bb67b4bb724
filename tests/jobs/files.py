"""The same columns in every format that can be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Columns = Sequence[dict[str, Any]]


def jsonl(rows: Columns) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def comma_separated(rows: Columns) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: Columns, rows_a_group: int = 3) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream, row_group_size=rows_a_group)
    return stream.getvalue()


def arrow(rows: Columns, make: Any = pa.ipc.new_file, rows_a_batch: int = 3) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    stream = io.BytesIO()
    with make(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return stream.getvalue()


def arrow_stream(rows: Columns) -> bytes:
    return arrow(rows, pa.ipc.new_stream)


def zst(data: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[Columns], bytes]] = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "a.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "a.jsonl.zst": lambda rows: zst(jsonl(rows)),
    "a.csv": comma_separated,
    "a.csv.gz": lambda rows: gzip.compress(comma_separated(rows)),
    "a.csv.zst": lambda rows: zst(comma_separated(rows)),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a.feather": arrow,
    "a.ipc": arrow_stream,
    "a.arrow.gz": lambda rows: gzip.compress(arrow(rows)),
}


def write(folder: Path, name: str, rows: Columns) -> str:
    path = folder / name
    path.write_bytes(FORMATS[name](rows))
    return str(path)
