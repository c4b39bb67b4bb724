"""Results as Parquet: the columns of the input, and beside them those of the results.

Imports the optional pyarrow, which has no types for the type checker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quire.errors import InputFileError, InvalidRequestError
from quire.jobs.arrow import open_arrow, open_parquet
from quire.jobs.files import find_files
from quire.jobs.records import Record
from quire.jobs.streams import open_input, recognise

_ROWS = 16384  # most rows of a row group
_BYTES = 32 << 20  # and about the most bytes of it that are in memory
_MOST_COLUMNS = 1000
_EXACT = 2**53  # integers up to here are floats without loss

_RESULTS = pa.schema(
    [
        ("custom_id", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("samples", pa.list_(pa.struct([("text", pa.string()), ("finish_reason", pa.string())]))),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Kind:
    """What an input column holds, and its type in the file."""

    name: str
    type: Any


_NULL = _Kind("nothing", pa.string())
_BOOL = _Kind("bool", pa.bool_())
_INT = _Kind("integers that are exact as floats", pa.int64())
_LONG = _Kind("integers", pa.int64())
_FLOAT = _Kind("float", pa.float64())
_TEXT = _Kind("text", pa.string())
_JSON = _Kind("anything, as JSON", pa.string())
_WIDER = {frozenset((_INT, _LONG)): _LONG, frozenset((_INT, _FLOAT)): _FLOAT}
_Kinds = dict[str, _Kind]
_Rows = Sequence[dict[str, Any]]


def write_parquet(
    path: Path, pairs: Iterable[tuple[Record, str]], schema: pa.Schema | None = None
) -> None:
    """Write records and their output lines (JSON, as `quire.jobs.results` makes them).

    The columns are those of the records, then ``custom_id``, ``text`` and ``finish_reason`` (of the
    first sample), ``samples`` (all of them where there are several, else null), ``prompt_tokens``,
    ``completion_tokens`` and ``error`` (null where all is well). An input column with the name of
    a result's gets ``input_`` before its name; ``custom_id`` is only there once.

    ``schema``: types of input columns where they are known, see `input_schema`. The others are
    decided by the values of all rows: booleans, integers, floats (also for integers and floats
    mixed) or text; a column of lists, objects or several types is kept as JSON texts. Memory is
    bounded; rows that widen the schema start another temporary file, and at the end those are
    merged. ``path`` appears when all is written. Raises OSError or InputFileError.
    """
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        parts: list[tuple[Path, _Kinds]] = []
        known = kinds = _known(schema) if schema is not None else {}
        for kinds, tables in groupby(_tables(pairs, known), key=itemgetter(0)):
            part = Path(folder) / f"{len(parts)}.parquet"
            with pq.ParquetWriter(part, _schema(kinds), compression="zstd") as writer:
                for _, inputs, results in tables:
                    writer.write_batch(_batch(kinds, inputs, results))
            parts.append((part, kinds))
        whole = parts[0][0] if len(parts) == 1 else _merge(parts, kinds, Path(folder) / "whole")
        os.replace(whole, path)


def input_schema(source: str | Sequence[str]) -> pa.Schema | None:
    """The types of the input's columns, if all its files are Parquet or Arrow and agree."""
    schemas = []
    for file in find_files(source):
        if file == "-":
            return None
        try:
            with open_input(file) as raw:
                kind, stream = recognise(file, raw)
                if kind not in ("parquet", "arrow"):
                    return None
                schema, _ = open_parquet(file) if kind == "parquet" else open_arrow(stream)
        except (OSError, InputFileError):
            continue  # it has no rows to write either
        schemas.append(schema)
    try:
        return pa.unify_schemas(schemas)
    except pa.ArrowException:
        return None


def _tables(
    pairs: Iterable[tuple[Record, str]], kinds: _Kinds
) -> Iterator[tuple[_Kinds, _Rows, _Rows]]:
    """Input and result columns of some rows at a time, with the kinds of all columns so far."""
    for inputs, results in _batches(pairs):
        kinds = _widened(kinds, inputs)
        yield kinds, inputs, results


def _batches(pairs: Iterable[tuple[Record, str]]) -> Iterator[tuple[_Rows, _Rows]]:
    inputs: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    size = 0
    for record, line in pairs:
        inputs.append(_input(record))
        results.append(_result(json.loads(line)))
        size += len(line) + _size(record)
        if len(inputs) >= _ROWS or size >= _BYTES:
            yield inputs, results
            inputs, results, size = [], [], 0
    if inputs:
        yield inputs, results


def _size(record: Record) -> int:
    if isinstance(record.raw, dict):
        return sum(len(v) for v in record.raw.values() if isinstance(v, (str, bytes, list)))
    return len(record.raw) if isinstance(record.raw, bytes) else 0


def _input(record: Record) -> dict[str, Any]:
    try:
        fields = record.fields()
    except InvalidRequestError:
        return {}
    return {
        _utf8(name): _utf8(value) if isinstance(value, str) else value
        for name, value in fields.items()
        if name != "custom_id"
    }


def _result(line: dict[str, Any]) -> dict[str, Any]:
    custom_id = _utf8(line["custom_id"]) if line["custom_id"] is not None else None
    if line["error"] is not None:
        return {"custom_id": custom_id, "error": _utf8(line["error"]["message"])}
    body = line["response"]["body"]
    samples = [
        {
            "text": c["message"]["content"] if "message" in c else c["text"],
            "finish_reason": c["finish_reason"],
        }
        for c in body["choices"]
    ]
    return {
        "custom_id": custom_id,
        **samples[0],
        "samples": samples if len(samples) > 1 else None,
        "prompt_tokens": body["usage"]["prompt_tokens"],
        "completion_tokens": body["usage"]["completion_tokens"],
    }


def _utf8(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _known(schema: pa.Schema) -> _Kinds:
    """Kinds of columns with known types; JSON where Parquet has no such type."""
    kinds = {}
    for field in schema:
        try:
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
            kinds[field.name] = _Kind("as in the input", field.type)
        except pa.ArrowException:
            kinds[field.name] = _JSON
    kinds.pop("custom_id", None)
    return kinds


def _widened(kinds: _Kinds, inputs: _Rows) -> _Kinds:
    """The kinds that hold what they held before and these rows too."""
    names = dict.fromkeys(chain(kinds, *inputs))
    if len(names) > _MOST_COLUMNS:
        raise InputFileError(
            f"The rows have more than {_MOST_COLUMNS} different fields.",
            limit=_MOST_COLUMNS,
            action="Write JSONL instead of Parquet.",
        )
    return {
        name: _join(kinds.get(name, _NULL), [row.get(name) for row in inputs]) for name in names
    }


def _join(known: _Kind, values: Sequence[Any]) -> _Kind:
    if known.name == "as in the input":
        try:
            pa.array(values, known.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return _JSON
        return known
    found = _kind(values)
    if found in (known, _NULL):
        return known
    if known == _NULL:
        return found
    return _WIDER.get(frozenset((known, found)), _JSON)


def _kind(values: Sequence[Any]) -> _Kind:
    types = {type(value) for value in values} - {type(None)}
    if not types:
        return _NULL
    if types == {bool}:
        return _BOOL
    if types == {str}:
        return _TEXT
    if types == {float}:
        return _FLOAT
    integers = [value for value in values if type(value) is int]
    exact = all(-_EXACT <= value <= _EXACT for value in integers)
    if types == {int}:
        fits = exact or all(-(2**63) <= value < 2**63 for value in integers)
        return _INT if exact else _LONG if fits else _JSON
    return _FLOAT if types == {int, float} and exact else _JSON


def _names(kinds: _Kinds) -> dict[str, str]:
    """The name of each input column in the file."""
    taken = {*kinds, *_RESULTS.names}
    names = {}
    for name in kinds:
        new = name
        while new in taken and (new != name or name in _RESULTS.names):
            new = f"input_{new}"
        taken.add(new)
        names[name] = new
    return names


def _schema(kinds: _Kinds) -> pa.Schema:
    names = _names(kinds)
    inputs = [pa.field(names[name], kind.type) for name, kind in kinds.items()]
    return pa.schema([*inputs, *_RESULTS])


def _batch(kinds: _Kinds, inputs: _Rows, results: _Rows) -> pa.RecordBatch:
    arrays = [_array([row.get(name) for row in inputs], kind) for name, kind in kinds.items()]
    arrays += [pa.array([row.get(f.name) for row in results], f.type) for f in _RESULTS]
    return pa.record_batch(arrays, schema=_schema(kinds))


def _array(values: Sequence[Any], kind: _Kind) -> pa.Array:
    if kind == _JSON:
        values = [None if v is None else _utf8(_json(v)) for v in values]
    return pa.array(values, kind.type)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _merge(parts: Sequence[tuple[Path, _Kinds]], kinds: _Kinds, whole: Path) -> Path:
    """One file of all parts, with columns as the last of them has them."""
    schema = _schema(kinds)
    with pq.ParquetWriter(whole, schema, compression="zstd") as writer:
        for part, before in parts:
            names = _names(before)
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(_ROWS):
                    arrays = [
                        _recast(batch.column(names[name]), before[name], kind)
                        if name in before
                        else pa.nulls(batch.num_rows, kind.type)
                        for name, kind in kinds.items()
                    ]
                    arrays += [batch.column(name) for name in _RESULTS.names]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
    return whole


def _recast(array: pa.Array, before: _Kind, now: _Kind) -> pa.Array:
    if before == _NULL:
        return pa.nulls(len(array), now.type)
    if now == _JSON and before != _JSON:
        return _array(array.to_pylist(), _JSON)
    return array.cast(now.type)
