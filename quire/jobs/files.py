"""Which files an input means."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from quire.errors import InputFileError
from quire.jobs.streams import kind_by_name


def find_files(source: str | Sequence[str]) -> list[str]:
    """The files that ``source`` means, in order. Raises InputFileError.

    Of a folder these are the files with a known suffix, by name; a glob's are in the order of
    their paths.
    """
    found: list[str] = []
    for given in [source] if isinstance(source, str) else source:
        if os.path.isdir(given):
            names = sorted(os.listdir(given))
            inside = [os.path.join(given, name) for name in names if _is_input(name)]
            inside = [file for file in inside if os.path.isfile(file)]
            if not inside:
                raise InputFileError(
                    f"The folder {given} has no JSONL, CSV, Parquet or Arrow files.", value=given
                )
            found += inside
        elif given == "-" or os.path.exists(given):
            found.append(given)
        else:
            matches = [m for m in sorted(glob.glob(given, recursive=True)) if os.path.isfile(m)]
            if not matches:
                raise InputFileError(
                    f"{given} cannot be read: there is no such file.",
                    value=given,
                    action="Give files, folders, globs, or - for standard input.",
                )
            found += matches
    if not found:
        raise InputFileError("There is no input.", action="Give a file.")
    return found


def _is_input(name: str) -> bool:
    return not name.startswith((".", "_")) and kind_by_name(name)[0] is not None


def name_prefixes(files: Sequence[str]) -> list[str]:
    """What stands before the line in a record's name, for each file."""
    if len(files) == 1:
        return ["line-"]
    paths = [os.path.abspath(file) for file in files if file != "-"]
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [
        f"{file}:" if file == "-" else f"{os.path.relpath(os.path.abspath(file), common)}:"
        for file in files
    ]
