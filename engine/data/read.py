"""Files to rows. Every row knows its place, so that whatever is wrong with it later can be named by file:line.

Readers never guess: a file that is not what it claims to be is an error that says where and how to mend it.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError, listing
from engine.find import locate

Row = dict[str, Any]
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
csv.field_size_limit(1 << 27)  # a document may be one field


@dataclass
class Table:
    """The rows of one split: `rows[i]` came from `places[i]` ("file:line")."""

    rows: list[Row]
    places: list[str]
    sources: dict[str, str]  # file -> sha256 of its bytes

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: list[int]) -> "Table":
        return Table([self.rows[i] for i in index], [self.places[i] for i in index], self.sources)


def read(
    sources: list[str],
    where: str,
    *,
    folders: tuple[Path, ...] = (),
    format: str | None = None,
    names: list[str] | None = None,
    quoting: str = "auto",
) -> Table:
    """All rows of `sources`, files or hub:OWNER/NAME[/CONFIG]#SPLIT, in order. `where` is the recipe's key in errors."""
    table = Table([], [], {})
    for source in sources:
        if source.startswith("hub:"):
            _read_hub(source, where, table)
            continue
        path = locate(source, folders)
        if path is None:
            raise InputError(f"{where}: no file {source} (looked in {Path.cwd()} and beside the recipe)")
        if not path.is_file():
            raise InputError(f"{where}: {source} is not a file")
        kind = format or FORMATS.get(path.suffix.lower())
        if kind is None:
            known = ", ".join(sorted(FORMATS))
            raise InputError(
                f"{where}: {source}: the ending '{path.suffix}' names no format; set data.format, or rename it to one of {known}"
            )
        before = len(table)
        if kind == "parquet":
            _read_parquet(path, source, table)
        else:
            raw = path.read_bytes()
            table.sources[source] = hashlib.sha256(raw).hexdigest()
            text = _decode(raw, source)
            quotes = quoting == "csv" or (quoting == "auto" and kind == "csv")
            for line, row in _READERS[kind](text, source, names, quotes):
                table.rows.append(row)
                table.places.append(f"{source}:{line}")
        if len(table) == before:
            raise InputError(f"{source}: the file has no rows")
    return table


def _decode(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "it looks like UTF-16" if utf16 else f"byte 0x{raw[error.start]:02x}"
        raise InputError(f"{name}:{line}:{column}: this is not UTF-8 ({hint}); save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{name}:{line}: a NUL byte stands here; this is no text file")
    return text


def _jsonl(text: str, name: str, names: Any, quotes: bool) -> Iterator[tuple[int, Row]]:
    problems = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            column = getattr(error, "colno", 1)
            problems.append(f"{name}:{number}:{column}: this line is not JSON: {getattr(error, 'msg', 'nested too deep')}")
            continue
        if not isinstance(row, dict):
            problems.append(f"{name}:{number}: a {type(row).__name__} stands here; each line must be an object {{...}}")
            continue
        yield number, row
    if problems:
        raise InputError(listing(problems))


def _json(text: str, name: str, names: Any, quotes: bool) -> Iterator[tuple[int, Row]]:
    decoder, at, line, counted = json.JSONDecoder(), 0, 1, 0

    def skip(position: int, also: str = "") -> int:
        while position < len(text) and text[position] in " \t\r\n" + also:
            position += 1
        return position

    at = skip(at)
    if not text[at : at + 1] == "[":
        raise InputError(f"{name}:1: a .json file must hold a list of objects [{{...}}, ...]; one object a line is .jsonl")
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            place = f"{getattr(error, 'lineno', line)}:{getattr(error, 'colno', 1)}"
            raise InputError(f"{name}:{place}: this is not JSON: {getattr(error, 'msg', 'nested too deep')}") from error
        if not isinstance(row, dict):
            raise InputError(f"{name}:{line}: a {type(row).__name__} stands here; the list must hold objects {{...}}")
        yield line, row
        at = skip(end)
        if text[at : at + 1] not in (",", "]"):
            raise InputError(f"{name}:{line}: after this object a comma or ] is missing")
        at = skip(at + 1) if text[at] == "," else at


def _separated(separator: str) -> Any:
    def rows(text: str, name: str, names: list[str] | None, quotes: bool) -> Iterator[tuple[int, Row]]:
        style: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=style, strict=quotes)
        header = names
        problems: list[str] = []
        line = 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise InputError(f"{name}:{line}: {error}; check the quotes from this line on, or set data.quoting") from error
            start, line = line, reader.line_num + 1
            if not fields or fields == [""]:
                continue
            if header is None:
                header = [f.strip() for f in fields]
                twice = sorted({h for h in header if header.count(h) > 1})
                if twice:
                    raise InputError(f"{name}:{start}: the column '{twice[0]}' stands twice in the header")
                continue
            if len(fields) != len(header):
                problems.append(
                    f"{name}:{start}: {len(fields)} fields where the header has {len(header)}; a separator or a quote is missing or too many"
                )
                continue
            yield start, dict(zip(header, fields, strict=True))
        if problems:
            raise InputError(listing(problems))

    return rows


def _txt(text: str, name: str, names: Any, quotes: bool) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"text": line.rstrip("\r")}


_READERS = {"jsonl": _jsonl, "json": _json, "csv": _separated(","), "tsv": _separated("\t"), "txt": _txt}


def _read_parquet(path: Path, name: str, table: Table) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{name}: this is no readable parquet file: {str(error).splitlines()[0]}") from error
    table.sources[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    table.rows += rows
    table.places += [f"{name}:row {i}" for i in range(1, len(rows) + 1)]


def _read_hub(source: str, where: str, table: Table) -> None:
    """hub:OWNER/NAME[/CONFIG]#SPLIT through the datasets library (its cache first)."""
    from engine.hub import reachable

    name, _, split = source.removeprefix("hub:").partition("#")
    parts = name.split("/")
    if not split or len(parts) not in (1, 2, 3):
        raise InputError(f"{where}: '{source}' should be hub:OWNER/NAME[/CONFIG]#SPLIT, such as hub:stanfordnlp/imdb#train")
    import datasets

    online = reachable()
    datasets.config.HF_HUB_OFFLINE = not online
    try:
        loaded = datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split)
    except Exception as error:  # datasets raises many kinds; what a reader needs is the same for all of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        net = "" if online else " The hub cannot be reached and the data set is not in its cache."
        raise InputError(f"{where}: {source} cannot be loaded: {reason}.{net} Or name a local file.") from error
    features = loaded.features
    rows = loaded.to_list()
    for column, feature in features.items():  # labels by name, as a file would have them
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                if row[column] is not None and row[column] >= 0:
                    row[column] = feature.int2str(row[column])
    table.sources[source] = str(loaded._fingerprint)
    table.rows += rows
    table.places += [f"{source}:row {i}" for i in range(1, len(rows) + 1)]
