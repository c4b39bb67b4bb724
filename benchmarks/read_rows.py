"""Records a second of each input format, and the memory that reading takes.

``python benchmarks/read_rows.py [rows]`` makes a file of each format in a temporary folder (a
prompt of 400 characters and two sampling fields a row), reads it in a process of its own, then
reads it again with every record parsed to a request, and once more to write results as Parquet.
Seconds are those of the processor. Memory is what the process grew by at most while it read. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from quire.decode.params import SamplingParams
from quire.jobs.parquet import input_schema, write_parquet
from quire.jobs.records import read_records
from quire.jobs.rows import Row, RowParser

BATCH = 10_000
CHOICE = {"index": 0, "text": "An answer of some words. " * 8, "finish_reason": "stop"}
BODY = {"choices": [CHOICE], "usage": {"prompt_tokens": 90, "completion_tokens": 48}}
RESULT = json.dumps({"custom_id": "row-1", "response": {"body": BODY}, "error": None})
SCHEMA = pa.schema(
    [("custom_id", pa.string()), ("prompt", pa.string()), ("max_tokens", pa.int64())]
)


def batches(rows: int) -> Iterator[pa.RecordBatch]:
    """The rows, some at a time."""
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 7
    for start in range(0, rows, BATCH):
        numbers = range(start, min(rows, start + BATCH))
        columns = [
            [f"row-{i}" for i in numbers],
            [f"{i * 7919 % 1_000_003} {text[: 390 + i % 20]}" for i in numbers],
            [i % 100 + 1 for i in numbers],
        ]
        yield pa.record_batch([*map(pa.array, columns)], schema=SCHEMA)


def write_jsonl(file: Path, rows: int) -> None:
    """As JSON lines."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt") as stream:
        for batch in batches(rows):
            stream.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


def write_arrow(make: Callable[..., object]) -> Callable[[Path, int], None]:
    """By one of pyarrow's writers."""

    def write(file: Path, rows: int) -> None:
        with make(str(file), SCHEMA) as writer:  # type: ignore[attr-defined]
            for batch in batches(rows):
                writer.write_batch(batch)

    return write


FORMATS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_jsonl,
    "rows.csv": write_arrow(pa.csv.CSVWriter),
    "rows.parquet": write_arrow(pa.parquet.ParquetWriter),
    "rows.arrow": write_arrow(pa.ipc.new_file),
}


def measure(file: str) -> dict[str, float]:
    """Records a second without and with parsing, and by how much the process grew."""
    parser = RowParser(SamplingParams(), frozenset({"demo"}), print)
    process = psutil.Process()
    before = most = process.memory_info().rss
    started = time.process_time()
    count = 0
    for count, _ in enumerate(read_records(file), start=1):
        if count % 1000 == 0:
            most = max(most, process.memory_info().rss)
    middle = time.process_time()
    grown = most - before
    good = sum(isinstance(parser.read(record), Row) for record in read_records(file))
    assert good == count
    end = time.process_time()
    pairs = ((record, RESULT) for record in read_records(file))
    write_parquet(Path(file).with_name("results"), pairs, input_schema(file))
    return {
        "rows": count,
        "read": count / (middle - started),
        "parsed": count / (end - middle),
        "written": count / (time.process_time() - end),
        "memory_mb": grown / 1e6,
    }


def main() -> None:
    """Measure all formats."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("rows", nargs="?", type=int, default=1_000_000)
    options.add_argument("--measure", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure)))
        return
    found = {}
    for name, write in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            write(file, asked.rows)
            command = [sys.executable, __file__, "--measure", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = one = json.loads(done.stdout)
        print(
            f"{name:<14} {one['read']:>10,.0f} records/s, {one['parsed']:>8,.0f} parsed, "
            f"{one['written']:>8,.0f} written as Parquet; {one['memory_mb']:.0f} MB",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
