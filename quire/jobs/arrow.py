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

    The schema is one whose values Python has: times of at most microseconds, and no dictionaries.
    Opening and reading raise OSError when the file is damaged.
    """
    with _damage_is_os_error():
        file = pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        row_bytes = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
        rows = max(1, min(_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
        return _readable(file.schema_arrow, file.iter_batches(rows, use_threads=False))


def open_arrow(stream: io.BufferedReader) -> tuple[Any, Iterator[Any]]:
    """The same for an Arrow stream or file.

    A file is read as the stream that it holds, so that its beginning can be read when its end is
    missing.
    """
    with _damage_is_os_error():
        if stream.peek(6).startswith(b"ARROW1"):
            stream.read(8)
        batches = pyarrow.ipc.open_stream(stream)
        return _readable(batches.schema, _validated(batches))


def _validated(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # offsets that point outside would crash the process
        yield batch


@contextmanager
def _damage_is_os_error() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from error
    except MemoryError as error:  # a damaged length can ask for any memory
        raise OSError("it asks for more memory than there is") from error


def _readable(schema: Any, batches: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    fields = [pa.field(f.name, _readable_type(f.type), f.nullable) for f in schema]
    wanted = pa.schema(fields)
    return wanted, _cast(wanted, batches)


def _readable_type(kind: Any) -> Any:
    return _in_microseconds(kind.value_type if pa.types.is_dictionary(kind) else kind)


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


def _cast(wanted: Any, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with _damage_is_os_error():
            batch = next(batches, None)
            if batch is None:
                return
            arrays = [
                array if array.type == kind else array.cast(kind, safe=False)
                for array, kind in zip(batch.columns, wanted.types, strict=True)
            ]
            batch = pa.record_batch(arrays, schema=wanted)
        yield batch


def read_rows(batches: Iterator[Any]) -> Iterator[dict[str, Any] | InvalidRequestError]:
    """The rows of the batches as columns of Python values, or why one cannot be had."""
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            try:
                found = part.to_pylist()
            except Exception:  # one bad value stops a whole batch: look for its row
                found = [_row(part, i) for i in range(part.num_rows)]
            yield from found


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
