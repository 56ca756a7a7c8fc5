"""Tables that users write, CSV or JSON lines: read and refused in the same words wherever one is named.

A fault of the file stops everything, with a ValueError. A fault of one row is a `BadRow` in its place, for the caller
to list or to raise. Column names are taken in any case, and with blanks around them.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes import nearest

SEPARATORS = {";": "semicolons", "\t": "tabs"}  # what spreadsheets write instead of commas
ALIASES = {  # column -> what other tools call it
    "clip": ("video", "videos", "video_path", "file_name", "filename", "file", "path", "media_path"),
    "prompt": ("caption", "captions", "text", "description"),
    "image": ("image_path", "input_image", "first_frame"),
}
FORMATS = {  # suffix -> what to do with such a file
    ".gz": "unpack it",
    ".tgz": "unpack it",
    ".zip": "unpack it",
    ".json": "write one JSON object a line and name it .jsonl",
    ".tsv": "save it with commas as .csv",
    ".xls": "save it as CSV UTF-8",
    ".xlsx": "save it as CSV UTF-8",
    ".ods": "save it as CSV UTF-8",
}
NOT_LOCAL = {  # the form of a name that is no path of this machine
    r"[A-Za-z][A-Za-z0-9+.-]+://": "is an address: only local files are read, so download it and name the file",
    r"[A-Za-z]:[\\/]|\\\\": "is a Windows path: name the file as this machine does, with /",
    r"\$\{?\w+\}?/": "begins with a variable: write the path out (~ is expanded)",
}


class BadRow(Exception):
    """A row that cannot be used: a reason of a few fixed words, for counting, what is wrong, and the clip's name."""

    def __init__(self, reason: str, detail: str, clip: str = ""):
        super().__init__(detail)
        self.reason, self.detail, self.clip = reason, detail, clip


Record = dict[str, Any] | BadRow


def csv_records(path: Path, known: Sequence[str], columns: dict[str, None]) -> Iterator[Record]:
    """The rows of a CSV file by column; rows of blanks are none. columns: gets the names; those of `known` as there.

    Raises ValueError for UTF-16, broken quotes, a doubled column, and semicolons or tabs between the fields.
    """
    csv.field_size_limit(sys.maxsize)  # a field beyond the limit would spoil the file, not its row
    check_encoding(path)
    # Bytes that are not UTF-8 become surrogates, so that they spoil their own row only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        for separator, name in SEPARATORS.items():
            if separator in header and "," not in header:
                raise ValueError(f"{path}: the fields are separated by {name}: save it with commas between them")
        file.seek(0)
        reader = csv.reader(file, strict=True)
        try:
            names = [fold(name, known) for name in next(reader, [])]
            width = len(names)
            while names and not names[-1]:  # spreadsheets write empty columns behind the last one
                names.pop()
            add_columns(path, names, columns)
            for line in reader:
                if not any(field.strip() for field in line):
                    continue
                if not len(names) <= len(line) <= width or any(field.strip() for field in line[len(names) :]):
                    yield _miscounted(line, names)
                else:
                    yield dict(zip(names, line, strict=False))
        except csv.Error as error:
            raise ValueError(
                f"{path} is not valid CSV near line {reader.line_num}: {error}; check the quotes"
            ) from error


def _miscounted(line: list[str], names: list[str]) -> BadRow:
    more = len(line) > len(names)
    remedy = "quote fields that hold a comma" if more else "write every column's comma, also before an empty field"
    fields = "1 field" if len(line) == 1 else f"{len(line)} fields"
    clip = dict(zip(names, line, strict=False)).get("clip", "")
    return BadRow("malformed row", f"{fields} for {len(names)} columns: {remedy}", clip)


def jsonl_records(path: Path, known: Sequence[str], columns: dict[str, None]) -> Iterator[Record]:
    """The objects of a JSON-lines file; `columns` grows with the names seen. Raises ValueError for UTF-16, and for an
    array or an object that goes over several lines."""
    check_encoding(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        lines = filter(str.strip, file)
        for number, line in enumerate(lines):
            if number == 0 and (line.lstrip().startswith("[") or line.strip() == "{"):
                raise ValueError(f"{path} holds JSON over several lines: write one JSON object a line, without a list")
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
                names = [fold(name, known) for name in record]
                if doubled := {name for name in names if names.count(name) > 1}:
                    raise ValueError(f"{' and '.join(sorted(doubled))} twice")
            except (ValueError, RecursionError) as error:
                yield BadRow("malformed row", f"not a JSON object: {error}")
            else:
                columns |= dict.fromkeys(names)
                yield dict(zip(names, record.values(), strict=True))


def check_encoding(path: Path) -> None:
    """ValueError for UTF-16 and for files that are no text."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        raise ValueError(f"{path} is UTF-16, or no text: save it as UTF-8 (in Excel as CSV UTF-8)")


def fold(name: str, known: Sequence[str]) -> str:
    """A column's name without blanks around it; one of `known` in its case."""
    name = printable(name).strip()
    return name.lower() if name.lower() in known else name


def add_columns(path: Path, names: Sequence[str], columns: dict[str, None]) -> None:
    """Put the columns of a file into `columns`. Raises ValueError for one that is there twice."""
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} has the column {' and '.join(map(repr, sorted(doubled)))} twice: remove one")
    columns |= dict.fromkeys(names)


def require(path: Path, required: Sequence[str], columns: Mapping[str, None]) -> None:
    """ValueError where a required column is not there, with the column that seems to be meant."""
    missing = [name for name in required if name not in columns]
    if not missing:
        return
    hints = []
    for name in missing:
        alias = next((found for found in columns if found.lower() in ALIASES.get(name, ())), None)
        if alias is not None:
            hints.append(f"rename the column {alias!r} to {name!r}")
        elif near := nearest(name, columns):
            hints.append(f"did you mean {name!r} by {near!r}?")
    raise ValueError(
        f"{path} has no column {' and no column '.join(map(repr, missing))}; found: {', '.join(columns) or 'none'};"
        f" required: {', '.join(required)}{'; ' if hints else ''}{', '.join(hints)}"
    )


def unknown_format(path: Path, formats: str) -> str:
    """Why a file of this suffix is not read, and what to do. formats: those that are."""
    remedy = FORMATS.get(path.suffix.lower())
    return f"unknown format {path.suffix!r}: {remedy or f'use {formats}'}"


def read_text(record: Mapping[str, Any], name: str, *, number_too: bool = False) -> str:
    """The text in a column, without blanks around it; empty where there is none. number_too: a whole number counts.

    Raises BadRow for what is no text: true, NaN and other numbers, lists, objects, and what UTF-8 cannot hold.
    """
    value = record.get(name)
    if value is None:
        return ""
    if number_too and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow("malformed row", f"{name} must be text in quotes, not {printable(value)[:100]}")
    if re.search(r"[\0\ud800-\udfff]", value):
        raise BadRow("not UTF-8", f"{name} reads {printable(value)[:100]!r}: save it as UTF-8")
    return value.strip()


def not_local(name: str) -> str:
    """Why `name` is no path of this machine; empty where it may be one."""
    return next((why for form, why in NOT_LOCAL.items() if re.match(form, name)), "")


def printable(value: Any) -> str:
    """`value` as text that can be written anywhere; empty for None."""
    return "" if value is None else str(value).encode("utf-8", errors="backslashreplace").decode("utf-8")
