"""CoNLL files: a word a line, its columns apart by tabs or spaces, a blank line after each sentence. One row is one sentence.

    EU       B-ORG            {"tokens": ["EU", "rejects", "German", "call"],
    rejects  O          ->     "tags":   ["B-ORG", "O", "B-MISC", "O"]}         at file.conll:1-4
    German   B-MISC
    call     O

The first column is `tokens` and the last `tags`; those between go by their number, "2" and up. `data.names` names them all.
A row's place is its range of lines, so that its word i stands at line first + i (`line_of`). Lines -DOCSTART- part documents
and are counted as dropped. A line that begins with "# " before a sentence is a comment where it has not the file's columns, or a
"=" ("# sent_id = 7").
A row is broken where one of its lines has more or fewer columns than most lines of the file.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from engine.errors import InputError, quoted

GAP = re.compile(r"[ \t]+")  # not \s: a no-break or ideographic space may be a word
DOCUMENT = "-DOCSTART-"


def fields(line: str) -> list[str]:
    """The columns of a line: parted by tabs where it has one, so that a word may hold a space, else by spaces."""
    line = line.strip(" \t")
    return [part.strip(" ") for part in line.split("\t")] if "\t" in line else GAP.split(line)


def sentences(
    lines: list[str], name: str, names: list[str] | None, bad: Callable[[str, str, str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(range of lines, row) of each sentence; `bad(place, reason, detail)` is told of others, with no detail where nothing is wrong."""
    parted = [(number, fields(line)) for number, line in enumerate(lines, 1) if line.strip(" \t")]
    hashes = {number for number, _ in parted if lines[number - 1].lstrip(" \t").startswith("# ")}
    words = [(number, parts) for number, parts in parted if parts[0] != DOCUMENT]
    widths = Counter(len(parts) for number, parts in words if number not in hashes) or Counter(len(parts) for _, parts in words)
    width = widths.most_common(1)[0][0] if widths else 0
    if names and width and len(names) != width:
        raise InputError(f"{name}: data.names has {len(names)} names, and the file's lines have {width} columns")
    keys = names or (["tokens", *map(str, range(2, width)), "tags"] if width > 1 else ["tokens"])
    sentence: list[tuple[int, list[str]]] = []
    for number, parts in [*parted, (len(lines) + 2, [])]:
        begins = not sentence or number > sentence[-1][0] + 1
        if sentence and (begins or parts[:1] == [DOCUMENT]):
            yield from _row(sentence, width, keys, name, bad)
            sentence, begins = [], True
        if parts[:1] == [DOCUMENT]:
            bad(f"{name}:{number}", DOCUMENT, "")
        elif parts and not (begins and number in hashes and (len(parts) != width or "=" in lines[number - 1])):
            sentence.append((number, parts))


def _row(
    sentence: list[tuple[int, list[str]]], width: int, keys: list[str], name: str, bad: Callable[[str, str, str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, parts in sentence:
        if len(parts) != width or "" in parts:
            count = f"{len(parts)} column{'s' if len(parts) > 1 else ''}" if "" not in parts else "an empty column"
            detail = f"{count} where the file has {width} ({quoted(' '.join(parts))}); its sentence is no row"
            bad(f"{name}:{number}", "wrong number of columns", detail)
            return
    columns = zip(*(parts for _, parts in sentence), strict=True)
    first, last = sentence[0][0], sentence[-1][0]
    yield (
        f"{first}-{last}" if last > first else str(first),
        {key: list(column) for key, column in zip(keys, columns, strict=True)},
    )


def line_of(place: str, word: int) -> str:
    """Where word number `word` of a row stands: "f.conll:12-19" -> "f.conll:15" for 3; other places are lines already."""
    file, colon, lines = place.rpartition(":")
    first, dash, last = lines.partition("-")
    return f"{file}{colon}{int(first) + word}" if dash and first.isdigit() and last.isdigit() else place
