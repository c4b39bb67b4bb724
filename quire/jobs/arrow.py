"""Parquet and Arrow files, read batch by batch. Imports the optional pyarrow.

Schemas and batches are pyarrow's, which has no types for the type checker.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from quire.errors import InvalidRequestError, shown

_ROWS = 1024  # most rows that are Python objects at a time
_BATCH_BYTES = 8 << 20


def open_parquet(path: str) -> tuple[Any, Iterator[Any]]:
    """Schema and batches of a Parquet file, a page of each column in memory at a time.

    Opening and reading raise OSError when the file is damaged.
    """
    with _damage_is_os_error():
        file = pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        row_bytes = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
        rows = max(1, min(_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
        return file.schema_arrow, _guarded(file.iter_batches(rows, use_threads=False))


def open_arrow(stream: io.BufferedReader) -> tuple[Any, Iterator[Any]]:
    """Schema and batches of an Arrow stream or file.

    A file is read as the stream that it holds, so that its beginning can be read when its end is
    missing. Opening and reading raise OSError when the data is damaged.
    """
    if stream.peek(6).startswith(b"ARROW1"):
        stream.read(8)
    with _damage_is_os_error():
        batches = pyarrow.ipc.open_stream(stream)
    return batches.schema, _guarded(_validated(batches))


def _validated(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # offsets that point outside would crash the process
        yield batch


@contextmanager
def _damage_is_os_error() -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _guarded(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with _damage_is_os_error():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def rows(schema: Any, batches: Iterator[Any]) -> Iterator[dict[str, Any] | InvalidRequestError]:
    """The rows of the batches as columns of Python values, or why one cannot be had."""
    wanted = readable(schema)
    for batch in batches:
        with _damage_is_os_error():
            batch = pa.record_batch(list(map(_cast, batch.columns, wanted.types)), schema=wanted)
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            try:
                found = part.to_pylist()
            except Exception:  # one bad value stops a whole batch: look for its row
                found = [_row(part, i) for i in range(part.num_rows)]
            yield from found


def _cast(array: Any, kind: Any) -> Any:
    return array if array.type == kind else array.cast(kind, safe=False)


def _row(batch: Any, index: int) -> dict[str, Any] | InvalidRequestError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except Exception as error:  # not UTF-8, a time beyond Python's, an unknown time zone, ...
            return InvalidRequestError(
                f"The value of column {shown(name)} cannot be read: {error}.", field=name
            )
    return row


def readable(schema: Any) -> Any:
    """The schema whose values Python has: times of at most microseconds, no dictionaries."""
    fields = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(field.with_type(_in_microseconds(kind)))
    return pa.schema(fields)


def _in_microseconds(kind: Any) -> Any:
    types = pa.types
    if types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([field.with_type(_in_microseconds(field.type)) for field in fields])
    return kind
