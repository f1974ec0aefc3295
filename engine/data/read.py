"""Files to rows. Every row knows its place, so that whatever is wrong with it later can be named by file:line.

Readers never guess: a file that is not what it claims to be is an error that says where and how to mend it. And they
never lose a row silently. A line that is no row (broken JSON, a field too many) is an error, or counted by reason:

    rows read = rows in the table + rows dropped        blank lines are no rows

Files are written by anyone, so what a parser lets pass is checked: a key that stands twice in an object (Python keeps
the last), a list after the list, a half of a surrogate pair (no tokenizer takes it), nesting that only this parser bears.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data import conll
from engine.errors import InputError, listing, plain, quoted
from engine.find import locate

Row = dict[str, Any]
Bad = Callable[
    [str, str, str], None
]  # (place, reason, detail) of a line that is no row; no detail where nothing is wrong with it
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
    ".conll": "conll",
}
MAGIC = {
    b"\xff\xfe": "it looks like UTF-16", b"\xfe\xff": "it looks like UTF-16", b"\x1f\x8b": "it is gzip; unpack it first",
    b"PK\x03\x04": "it is a zip or Excel file; unpack or export it first", b"PAR1": "it is parquet; set data.format=parquet",
}  # fmt: skip
DIGITS = "a number of thousands of digits stands here"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # an owner, a name or a configuration
DEEPEST = 64  # levels of nesting in one row
csv.field_size_limit(1 << 27)  # a document may be one field


@dataclass
class Table:
    """The rows of one split: `rows[i]` came from `places[i]` ("file:line"); lines that were no rows are in `dropped`."""

    rows: list[Row]
    places: list[str]
    sources: dict[str, str]  # file -> sha256 of its bytes
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: list[int]) -> "Table":
        return Table([self.rows[i] for i in index], [self.places[i] for i in index], self.sources, self.dropped)


def read(
    sources: list[str],
    where: str,
    *,
    folders: tuple[Path, ...] = (),
    format: str | None = None,
    names: list[str] | None = None,
    quoting: str = "auto",
    bad_rows: str = "error",
    way_out: str = "",
) -> Table:
    """All rows of `sources`, files or hub:OWNER/NAME[/CONFIG]#SPLIT, in order. `where` is the recipe's key in errors.

    `way_out` is what the recipe offers where the hub cannot be reached.

    Lines that are no rows stop with a list of the first 20, or with `bad_rows="drop"` are counted in the table.
    """
    table = Table([], [], {})
    if names and (twice := _twice(names)):
        raise InputError(f"data.names: the column {quoted(twice)} stands there twice")
    for source in sources:
        if source.startswith("hub:"):
            _read_hub(source, where, table, way_out)
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
        problems: list[str] = []

        def bad(place: str, reason: str, detail: str, problems: list[str] = problems) -> None:
            table.dropped[reason] += 1
            if detail:
                problems.append(f"{place}: {detail}")

        try:
            raw = path.read_bytes()
        except OSError as error:  # no permission, a broken disk, a file that went away
            raise InputError(f"{where}: {source} cannot be read: {error.strerror}") from error
        table.sources[source] = hashlib.sha256(raw).hexdigest()
        if kind == "parquet":
            _read_parquet(raw, source, table)
        else:
            text = _decode(raw, source)
            quotes = quoting == "csv" or (quoting == "auto" and kind == "csv")
            for line, row in _READERS[kind](text, source, names, quotes, bad):
                table.rows.append(row)
                table.places.append(f"{source}:{line}")
        if problems and bad_rows == "error":
            hint = f"\nlines that are no rows: {len(problems):,}; mend them, or drop them with data.bad_rows=drop"
            raise InputError(listing(problems) + hint)
        if len(table) == before:
            raise InputError(f"{source}: the file has no rows" + (f" but broken ones\n{listing(problems)}" if problems else ""))
    return table


def _twice(names: list[str]) -> str | None:
    """The first name that stands twice, or None."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


def _decode(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        hint = next((said for magic, said in MAGIC.items() if raw.startswith(magic)), f"byte 0x{raw[error.start]:02x}")
        raise InputError(f"{name}:{line}:{column}: this is not UTF-8 ({hint}); save the file as UTF-8") from error
    if "\0" in text:
        at = text.index("\0")
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        raise InputError(f"{name}:{line}:{column}: a NUL byte stands here; this is no text file (UTF-16 without a mark?)")
    return text


class _NotARowError(ValueError):
    """Well-formed JSON that cannot be a row."""


def _lines(text: str) -> list[str]:
    """Lines, ended by LF, CR LF or CR; not splitlines, since U+2028 may stand inside a text."""
    return re.split(r"\r\n|\n|\r", text) if "\r" in text else text.split("\n")


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _NotARowError(f"the key {quoted(_twice([k for k, _ in pairs]))} stands twice in one object")
    return row


def _constant(word: str) -> None:
    """NaN is how some writers spell "no value"; the infinities are no JSON and no value either."""
    if word != "NaN":
        raise _NotARowError(f"{word} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # what the escape of half a surrogate pair begins with


def _object(row: Any, source: str) -> Row:
    """`row`, decoded from `source`, if it can be a row."""
    if not isinstance(row, dict):
        raise _NotARowError(f"a {type(row).__name__} stands here; it must be an object {{...}}")
    if source.count("[") + source.count("{") > DEEPEST and _depth(row) > DEEPEST:
        raise _NotARowError("nested too deep")
    if _HALF.search(source):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape", "surrogatepass").decode()
            raise _NotARowError(f"half of a surrogate pair ({half}) stands here, which is no character") from error
    return row


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)
        ]  # fmt: skip
    return depth


def _jsonl(text: str, name: str, names: Any, quotes: bool, bad: Bad) -> Iterator[tuple[Any, Row]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            yield number, _object(_DECODER.decode(line), line)
        except _NotARowError as error:
            bad(f"{name}:{number}", "no row", str(error))
        except json.JSONDecodeError as error:
            bad(f"{name}:{number}:{error.colno}", "not JSON", f"this line is not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:  # Python reads no number of more than 4,300 digits
            bad(f"{name}:{number}", "no row", "nested too deep" if isinstance(error, RecursionError) else DIGITS)


def _json(text: str, name: str, names: Any, quotes: bool, bad: Bad) -> Iterator[tuple[Any, Row]]:
    blank = re.compile(r"[ \t\r\n]*")
    line, counted, last, row_number = 1, 0, 0, 0

    def skip(position: int) -> int:
        return blank.match(text, position).end()  # type: ignore[union-attr]

    def here(position: int) -> int:
        """The line of `position`; positions only grow."""
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    at = skip(0)
    if at == len(text):
        return
    if text[at] == "{" and re.search(r'"(?:paragraphs|qas)"\s*:', text):
        yield from _squad(text, name, names, quotes, bad)
        return
    if text[at] != "[":
        raise InputError(f"{name}:1: a .json file must hold a list of objects [{{...}}, ...]; one object a line is .jsonl")
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        number, row_number = here(at), row_number + 1
        try:
            row, end = _DECODER.raw_decode(text, at)
            yield (number if number > last else f"row {row_number}"), _object(row, text[at:end])  # many may share a line
            last = number
        except json.JSONDecodeError as error:
            raise InputError(f"{name}:{error.lineno}:{error.colno}: this is not JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:  # where this one ends is not known, so the others cannot be read
            deep = "this is not JSON: nested too deep"
            said = str(error) if isinstance(error, _NotARowError) else deep if isinstance(error, RecursionError) else DIGITS
            raise InputError(f"{name}:{number}: {said}") from error
        at = skip(end)
        if text[at : at + 1] not in (",", "]"):
            raise InputError(f"{name}:{here(at)}: after this object a comma or ] is missing")
        if text[at] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                raise InputError(
                    f"{name}:{here(at)}: a comma stands before the ]; a row is missing, or the comma is one too many"
                )
    at = skip(at + 1)
    if at < len(text):
        raise InputError(f"{name}:{here(at)}: something stands after the list's end, and would be lost; a .json file is one list")


def _separated(separator: str) -> Any:
    def rows(text: str, name: str, names: list[str] | None, quotes: bool, bad: Bad) -> Iterator[tuple[Any, Row]]:
        style: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=style, strict=quotes)
        header = names
        line = 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{name}:{line}: {error}; check the quotes from this line on, or set data.quoting") from error
            start, line = line, reader.line_num + 1
            if not fields:  # a blank line; one with "" on it is a row whose only field is empty
                continue
            if header is None:
                header = [f.strip() for f in fields]
                if twice := _twice(header):
                    raise InputError(f"{name}:{start}: the column {quoted(twice)} stands twice in the header")
                continue
            if len(fields) != len(header):
                few = f"{len(fields)} field{'s' if len(fields) > 1 else ''} where the header has {len(header)}"
                bad(f"{name}:{start}", "wrong number of fields", f"{few}; a separator or a quote is missing or too many")
                continue
            yield start, dict(zip(header, fields, strict=True))

    return rows


def _txt(text: str, name: str, names: Any, quotes: bool, bad: Bad) -> Iterator[tuple[Any, Row]]:
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            yield number, {"text": line}


def _squad(text: str, name: str, names: Any, quotes: bool, bad: Bad) -> Iterator[tuple[Any, Row]]:
    from engine.data.squad import questions

    return questions(text, name, bad)


def _conll(text: str, name: str, names: Any, quotes: bool, bad: Bad) -> Iterator[tuple[Any, Row]]:
    return conll.sentences(_lines(text), name, names, bad)


_READERS = {
    "jsonl": _jsonl, "json": _json, "squad": _squad, "csv": _separated(","), "tsv": _separated("\t"), "txt": _txt, "conll": _conll,
}  # fmt: skip


def _read_parquet(raw: bytes, name: str, table: Table) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()  # refuses a column that stands twice
    except Exception as error:  # pyarrow raises many kinds for a damaged file; the reader of this message needs one
        reason = plain((str(error).splitlines() or [type(error).__name__])[0])
        raise InputError(f"{name}: this is no readable parquet file: {reason}") from error
    table.rows += rows
    table.places += [f"{name}:row {i}" for i in range(1, len(rows) + 1)]


def _read_hub(source: str, where: str, table: Table, way_out: str) -> None:
    """hub:OWNER/NAME[/CONFIG]#SPLIT through the datasets library (its cache first)."""
    from engine.hub import reachable

    name, _, split = source.removeprefix("hub:").partition("#")
    parts = name.split("/")
    if not split or len(parts) not in (1, 2, 3) or not all(HUB_NAME.fullmatch(part) for part in parts):
        raise InputError(f"{where}: '{source}' should be hub:OWNER/NAME[/CONFIG]#SPLIT, such as hub:stanfordnlp/imdb#train")
    import datasets

    online = reachable()
    datasets.config.HF_HUB_OFFLINE = not online
    try:
        loaded = datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split)
    except Exception as error:  # datasets raises many kinds; what a reader needs is the same for all of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        net = "" if online else " The hub cannot be reached and the data set is not in its cache."
        raise InputError(f"{where}: {source} cannot be loaded: {reason}.{net} Or name a local file.{way_out}") from error
    features = loaded.features
    rows = loaded.to_list()
    for column, feature in features.items():  # labels by name, as a file would have them
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                if row[column] is not None and row[column] >= 0:
                    row[column] = feature.int2str(row[column])
        elif isinstance(inner := getattr(feature, "feature", None), datasets.ClassLabel):  # a list of them: tags
            for row in rows:
                row[column] = row[column] and [inner.int2str(i) if i is not None and i >= 0 else i for i in row[column]]
    table.sources[source] = str(loaded._fingerprint)
    table.rows += rows
    table.places += [f"{source}:row {i}" for i in range(1, len(rows) + 1)]
