"""Data files that nobody meant well by: thousands, seeded, of every format and fault.

The law, for each file: its rows come out and the ledger balances (read = used + dropped, by reason), or one InputError
names the file. Never another exception, a hang, a raw control character, or a row that is gone without a word: what a
file holds is counted here by its own writer, not by the reader under test.
"""

import codecs
import csv
import gzip
import io
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SHARED, MakeRecipe, make_rows, write_jsonl

from engine import prepare
from engine.data import read, rows
from engine.errors import InputError, plain
from engine.tasks.classification import Task

FORMATS = ("jsonl", "json", "csv", "tsv", "txt", "parquet")
SECONDS = 5  # a file takes about a millisecond
NASTY = ["", " ", "\t", "nan", "NaN", "None", "null", "N/A", "0", "1", "1.0", "-1", "true", "True", "é", "e\u0301", "ﬁ", "\u200b", "\u202eabc",
         "\x1b[31mred\x1b[0m", "\x07", "\x7f\x9b2J", "\u2028", "\x85", "\ufeff", "\ufffe", "\U0001f600", "a\u0000b", "<script>alert(1)</script>", '"', '""', '"open',
         "'", ",", ";", "\t\t", "a,b", "a\nb", "a\r\nb", "a\rb", "=1+1", "$(touch canary)", "../../x", "%s%n", "{{7*7}}", "x" * 3000, "中文", "ا" * 9, "a" + "\u0301" * 60]  # fmt: skip


class Hang(BaseException):
    """No `except Exception` may swallow it."""


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """The block ends within `seconds`, or the test does."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"{seconds} s are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def naughty() -> list[str]:
    """The Big List of Naughty Strings where it is at hand, and our own."""
    path = SHARED / "data" / "blns" / "blns.json"
    return NASTY + (json.loads(path.read_text("utf-8")) if path.exists() else [])


TEXTS = naughty()


# -- well-formed files, by writers of our own -------------------------------------------------------------------------


def drawn(draw: random.Random, kind: str) -> list[dict[str, Any]]:
    """0 to 8 rows of what `kind` can hold."""
    made: list[dict[str, Any]] = []
    for _ in range(draw.choice((0, 1, 2, 3, 5, 8))):
        text: Any = draw.choice(TEXTS) if draw.random() < 0.6 else " ".join(draw.choices(["good", "bad", "film", "was"], k=3))
        label: Any = draw.choice(("a", "b", "a", "b", "b", draw.choice(TEXTS)))
        if kind in ("jsonl", "json") and draw.random() < 0.15:
            label = draw.choice((1, 1.0, True, False, None, 0, -7, 2**70, 1e300, ["a"], {"a": 1}, [[[]]]))
        if kind in ("jsonl", "json") and draw.random() < 0.05:
            text = draw.choice((None, 3, ["t"], {}))
        row = {"text": text, "label": label}
        if kind not in ("csv", "tsv", "txt", "parquet") and draw.random() < 0.2:
            row[draw.choice(TEXTS) or "k"] = draw.choice((1, None, [], {"x": [1, {"y": 2}]}, "z"))
        made.append(row)
    if kind in ("csv", "tsv", "txt"):  # a NUL is refused, which has its own cases
        made = [{k: v.replace("\0", "") for k, v in row.items()} for row in made]
    if kind == "tsv":  # without quotes there is no way to write these
        made = [{k: re.sub(r"[\t\r\n]", " ", v) for k, v in row.items()} for row in made]
    if kind == "txt":
        made = [{"text": t} for row in made if (t := re.sub(r"[\r\n]", " ", row["text"])).strip()]
    return made


def written(made: list[dict[str, Any]], kind: str, draw: random.Random) -> bytes:
    """The rows as a well-formed file, by the format's own grammar."""
    end = draw.choice(("\n", "\n", "\r\n", "\r")) if kind in ("jsonl", "csv", "txt") else "\n"
    if kind == "parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({k: [r[k] for r in made] for k in ("text", "label")}), sink)
        return sink.getvalue()
    if kind == "jsonl":
        blank = draw.choice(("", "", end, "  " + end))
        text = "".join(json.dumps(r, ensure_ascii=draw.random() < 0.5) + end + blank for r in made)
    elif kind == "json":
        text = json.dumps(made, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 1)))
    elif kind == "txt":
        text = "".join(r["text"] + end for r in made)
    elif kind == "csv":
        out = io.StringIO()
        writer = csv.writer(
            out, lineterminator=end, quoting=draw.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC))
        )
        writer.writerows([["text", "label"], *([r["text"], r["label"]] for r in made)])
        text = out.getvalue()
    else:
        text = "\n".join(["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in made)]) + "\n"
    raw = text.encode("utf-8")
    return codecs.BOM_UTF8 + raw if draw.random() < 0.1 or text.startswith("\ufeff") else raw


# -- faults -----------------------------------------------------------------------------------------------------------


def flip(raw: bytes, draw: random.Random) -> bytes:
    out = bytearray(raw or b"x")
    for _ in range(draw.randint(1, 4)):
        out[draw.randrange(len(out))] = draw.randrange(256)
    return bytes(out)


def insert(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(raw))
    what = draw.choice((b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"'", b"\r", b"\n", b"\t", b",", b"{", b"[", b"}", b"]", b"\\", b"\\ud800", b"\xef\xbb\xbf", b"\x1b[2J", b"NaN",
                        b"Infinity", b"9" * 5000, b"[" * 3000, b'{"a":' * 800, b"\n\n\n", b"null", b"\xe2\x80\xa8", b"\x85", b"\x1a", b"#", b"//", b"x" * 100_000))  # fmt: skip
    return raw[:at] + what + raw[at:]


def repeat(raw: bytes, draw: random.Random) -> bytes:
    a, b = sorted((draw.randint(0, len(raw)), draw.randint(0, len(raw))))
    return raw[:b] + raw[a:b] * draw.randint(1, 3) + raw[b:]


FAULTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "insert": insert,
    "repeat": repeat,
    "cut": lambda raw, draw: raw[: draw.randint(0, len(raw))],
    "remove": lambda raw, draw: raw[: (a := draw.randint(0, len(raw)))] + raw[a + draw.randint(1, 9) :],
    "noise": lambda raw, draw: draw.randbytes(draw.randint(0, 200)),
    "utf-16": lambda raw, draw: raw.decode("latin-1").encode(draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32"))),
    "latin-1": lambda raw, draw: raw + "ÄÖÜ".encode("latin-1"),
    "gzip": lambda raw, draw: gzip.compress(raw, mtime=0),
    "header": lambda raw, draw: (
        draw.choice((b"text,text\n", b"text\n", b"label,text,\n", b",\n", b"\n", b"text;label\n", b"sep=,\n")) + raw
    ),
    "ragged": lambda raw, draw: (
        raw + draw.choice((b"x\n", b"a,b,c,d\n", b"a\tb\tc\n", b",,,,\n", b'"\n', b'x,"y\n', b'"a"b,c\n'))
    ),
    "two in one": lambda raw, draw: raw + raw,
    "twice a key": lambda raw, draw: raw.replace(b'"label"', b'"text"', 1),
    "trailing comma": lambda raw, draw: raw.replace(b"}", b",}", 1).replace(b"]", b",]", 1),
    "another format": lambda raw, draw: written(drawn(draw, k := draw.choice(FORMATS)), k, draw),
    "ending": lambda raw, draw: raw.rstrip(b"\n") + draw.choice((b"", b"\r", b"\n\n", b"\x1a", b" \n ")),
    "many columns": lambda raw, draw: (",".join(f"c{i}" for i in range(500)) + "\n").encode() + raw,
}
ANSWERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def outcome(path: Path, mode: str, **options: Any) -> rows.Split | str:
    """What reading and cleaning a file comes to: the split, or the message. Anything else fails the law."""
    with limited():
        try:
            table = read.read([path.name], "data.train", bad_rows=mode, **options)
            columns = {"text": "text"} if "label" not in table.rows[0] else {}
            task = Task({"text": "text", "label": "label"} | columns, ["a", "b"])
            rows.require_columns(table, {"text": "text"}, "data.columns")
            return rows.clean(table, task, mode)
        except InputError as error:
            return str(error)


def lawful(found: rows.Split | str, path: Path) -> None:
    if isinstance(found, str):
        assert path.name in found, found
        assert not ANSWERS.search(found), found
        assert found.count("\n") <= 24, found
        assert len(found) < 20_000, found[:300]
        return
    assert found.read == len(found) + sum(found.dropped.values())
    assert all(n > 0 and reason for reason, n in found.dropped.items())
    places = found.table.places
    assert len(places) == len(found) == len(set(places))
    if path.suffix != ".json":  # where many rows share a line
        numbers = [int(p.rpartition(":")[2].removeprefix("row ")) for p in places]
        assert numbers == sorted(numbers)
    for row in found.table.rows:  # what is used can be tokenised and written down again
        json.loads(json.dumps(row, ensure_ascii=False).encode(), parse_constant=lambda word: pytest.fail(f"{word} came through"))


def one_file(number: int, folder: Path) -> str:
    """Draw, write, spoil and read file `number`; returns what it came to."""
    draw = random.Random(f"fuzz {number}")
    kind = draw.choice(FORMATS)
    path = folder / f"f{number}.{kind}"
    made = drawn(draw, kind)
    if kind == "parquet":
        made = [{k: v if isinstance(v, str) else None for k, v in row.items()} for row in made]
    raw = written(made, kind, draw)
    fault = draw.choice(["none", "none", *FAULTS])
    path.write_bytes(raw if fault == "none" else FAULTS[fault](raw, draw))
    mode = draw.choice(("error", "drop"))
    try:
        found = outcome(path, mode)
        lawful(found, path)
        if fault == "none":
            if not made:
                assert isinstance(found, str), found
                assert "has no rows" in found
            else:
                table = read.read([path.name], "k")
                assert table.rows == made
                if not isinstance(found, str):
                    assert found.read == len(made)
        return "error" if isinstance(found, str) else "rows"
    except BaseException as error:
        error.add_note(f"file {number}: {kind}, fault {fault}, bad_rows {mode}, {path.read_bytes()[:300]!r}")
        raise
    finally:
        path.unlink()


def fuzz(first: int, last: int, folder: Path) -> None:
    came = [one_file(i, folder) for i in range(first, last)]
    assert min(came.count("error"), came.count("rows")) > 0.1 * len(came), "the files are all good or all bad"


@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_fuzzed_files_give_rows_or_one_error(tmp_path: Path, part: int) -> None:
    fuzz(1000 * part, 1000 * part + 1000, tmp_path)


# -- what is no file, or no longer one --------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


PLACES: dict[str, Callable[[Path], None]] = {
    "pipe": pipe, "folder": Path.mkdir, "nothing": lambda path: None, "endless": lambda path: path.symlink_to("/dev/zero"), "null": lambda path: path.symlink_to("/dev/null"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"), "link to itself": lambda path: path.symlink_to(path.name), "link to nothing": lambda path: path.symlink_to("gone"), "empty": Path.touch,
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, place: str, kind: str) -> None:
    path = tmp_path / f"odd.{kind}"
    PLACES[place](path)
    found = outcome(path, "drop")
    assert isinstance(found, str)
    lawful(found, path)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300 + ".jsonl",
        "~nobody_at_all/x.jsonl",
        "a\0b.jsonl",
        "\x1b[2J.jsonl",
        "\udcff.jsonl",
        "../" * 900 + "x.jsonl",
        "",
        ".",
        "/",
    ],
)
def test_odd_names_are_answered(name: str) -> None:
    with pytest.raises(InputError) as error, limited():
        read.read([name], "data.train")
    assert not ANSWERS.search(str(error.value))


@pytest.mark.parametrize(
    "fault",
    [
        PermissionError(13, "Permission denied"),
        FileNotFoundError(2, "No such file or directory"),
        OSError(5, "Input/output error"),
        IsADirectoryError(21, "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_or_went_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError) -> None:
    for kind in FORMATS:
        (tmp_path / f"f.{kind}").write_bytes(b"x")

        def fail(self: Path) -> bytes:
            raise fault

        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(InputError, match=f"data.train: f.{kind} cannot be read: {fault.strerror}"):
            read.read([f"f.{kind}"], "data.train")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_field_of_ten_megabytes_is_read_whole(tmp_path: Path, kind: str) -> None:
    text = "good film " * 1_000_000
    made = [{"text": text, "label": "a"}, {"text": "short", "label": "b"}]
    if kind == "txt":
        made = [{"text": r["text"]} for r in made]
    (tmp_path / f"f.{kind}").write_bytes(written(made, kind, random.Random(1)))
    with limited():
        table = read.read([f"f.{kind}"], "k")
    assert [r["text"] == m["text"] for r, m in zip(table.rows, made, strict=True)] == [True, True]


# -- rows that would be gone without a word ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.json", b'[{"a": 1}]\n[{"a": 2}]', "f.json:2: something stands after the list's end"), ("f.json", b'[{"a": 1},]', "f.json:1: a comma stands before the ]"), ("f.jsonl", b'{"a": 1, "a": 2}', "f.jsonl:1: the key 'a' stands twice"),
        ("f.json", b'[{"a": {"b": 1, "b": 2}}]', "f.json:1: the key 'b' stands twice"), ("f.jsonl", b'{"a": "\\ud800"}', "half of a surrogate pair (\\ud800)"), ("f.jsonl", b'{"a": Infinity}', "Infinity is no JSON"),
        ("f.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"), ("f.jsonl", b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "nested too deep"), ("f.jsonl", b'{"a":' + b"[" * 90_000, "nested too deep"), ("f.jsonl", gzip.compress(b"x", mtime=0), "it is gzip"),
    ],
)  # fmt: skip
def test_what_a_parser_lets_pass_is_an_error_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read.read([name], "k")
    assert said in str(error.value)
    assert str(error.value).startswith(f"{name}:1:" if name == "f.jsonl" else name)


def test_every_end_of_line_ends_a_row_and_nothing_else_does(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "f.txt").write_bytes(end.join(["a\u2028b\x0bc\x85", "d", "", "e"]).encode())
        assert read.read(["f.txt"], "k").rows == [{"text": "a\u2028b\x0bc\x85"}, {"text": "d"}, {"text": "e"}]
        assert read.read(["f.txt"], "k").places == ["f.txt:1", "f.txt:2", "f.txt:4"]
        (tmp_path / "f.jsonl").write_bytes(end.join(['{"a": "\u2028\x85"}', '{"a": 2}']).encode())
        assert read.read(["f.jsonl"], "k").rows == [{"a": "\u2028\x85"}, {"a": 2}]


def test_a_quoted_empty_field_is_a_row_and_a_blank_line_is_none(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text('text\nx\n""\n\ny\n')
    assert [r["text"] for r in read.read(["f.csv"], "k").rows] == ["x", "", "y"]


def test_a_column_that_stands_twice_is_an_error_wherever_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("1,2\n")
    with pytest.raises(InputError, match="data.names: the column 'a' stands there twice"):
        read.read(["f.csv"], "k", names=["a", "a"])
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), "f.parquet")
    with pytest.raises(InputError, match=r"f.parquet: .*Multiple matches .*Name\(a\)"):
        read.read(["f.parquet"], "k")


def test_lines_that_are_no_rows_are_listed_or_counted(tmp_path: Path) -> None:
    lines = ['{"text": "x", "label": "a"}', "{", "[1]", '{"text": "y", "label": "b"}', "null", '{"a": 1, "a": 2}']
    (tmp_path / "f.jsonl").write_text("\n".join(lines * 30))
    with pytest.raises(InputError) as error:
        read.read(["f.jsonl"], "k")
    said = str(error.value).splitlines()
    assert said[0].startswith("f.jsonl:2:2: this line is not JSON")
    assert said[20:] == ["... and 100 more", "lines that are no rows: 120; mend them, or drop them with data.bad_rows=drop"]
    table = read.read(["f.jsonl"], "k", bad_rows="drop")
    assert (len(table), dict(table.dropped)) == (60, {"not JSON": 30, "no row": 90})
    split = rows.clean(table, Task({}, ["a", "b"]), "drop")
    assert (split.read, len(split)) == (180, 60)


# -- labels -----------------------------------------------------------------------------------------------------------


def test_odd_labels_are_learnt_in_an_order_that_no_hash_decides() -> None:
    for labels in (
        ["1", "01", "001"],
        ["²", "1"],
        ["--5", "1"],
        ["-", "1"],
        ["9" * 5000, "1"],
        ["٣", "3"],
        ["x" * 3000, "y"],
        ["\u0130", "i"],
        ["1e3", "1000"],
    ):
        orders = set()
        for seed in range(10):
            task = Task({})
            task.fit([{"text": "x", "label": v} for v in random.Random(seed).sample(labels, len(labels))], "f")
            orders.add(tuple(task.labels))
        assert len(orders) == 1, labels
        if all(re.fullmatch("-?[0-9]{1,18}", v) for v in labels):
            assert list(orders.pop()) == sorted(labels, key=lambda v: (int(v), v))


def test_a_label_is_one_however_its_accents_are_composed() -> None:
    task = Task({})
    task.fit([{"text": "x", "label": v} for v in ("caf\u00e9", "cafe\u0301", "tea")], "f")
    assert task.labels == ["caf\u00e9", "tea"]
    assert Task({}, ["cafe\u0301", "tea"]).problem({"text": "x", "label": "caf\u00e9"}) is None


@pytest.mark.parametrize("value", [["a"], {"a": 1}, [], b"a"])
def test_a_list_or_a_mapping_is_no_label(value: Any) -> None:
    problem = Task({}, ["a", "b"]).problem({"text": "x", "label": value})
    assert problem is not None
    assert problem[0] == "label is no name"


def test_many_unknown_labels_are_told_in_no_time() -> None:
    task = Task({}, [f"a label of some length {i}" for i in range(5000)])
    table = read.Table(
        [{"text": "x", "label": f"a lable of some length {i}"} for i in range(5000)], [f"f:{i}" for i in range(5000)], {}
    )
    with pytest.raises(InputError) as error, limited(3):
        rows.clean(table, task, "error")
    assert "did you mean" in str(error.value)
    assert len(str(error.value)) < 20_000


def test_half_a_character_from_the_command_line_is_no_text() -> None:
    assert Task({}).problem({"text": "good \udcff"}, target=False) == (
        "text is no text",
        "column 'text' holds half of a surrogate pair, which is no character",
    )


def test_labels_come_from_rows_that_are_used(recipe: MakeRecipe) -> None:
    """A class whose rows are all dropped is no class: nothing would ever train it."""
    made = make_rows(90, 1)
    write_jsonl(Path("train.jsonl"), [*made, {"text": "", "label": "ghost"}])
    ready = prepare.prepare(recipe("data.bad_rows=drop"), say=lambda line: None)
    assert ready.task.labels == ["negative", "positive"]
    write_jsonl(Path("train.jsonl"), [{"text": r["text"] if r["label"] == "positive" else "", "label": r["label"]} for r in made])
    with pytest.raises(InputError, match="holds only 'positive'"):
        prepare.prepare(recipe("data.bad_rows=drop"), say=lambda line: None)


# -- what people see --------------------------------------------------------------------------------------------------

EVIL = {
    "positive": "<script>alert('p')</script>$x_$\x1b[31m",
    "negative": "</pre><img src=x onerror=alert(1)>$\\frac$\u202e" + "n" * 300,
}


def test_the_ledger_balances_in_log_and_report_and_markup_stays_text(
    recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run on data with every kind of bad row, labels and texts that are HTML, mathtext and terminal commands."""
    from engine.__main__ import main

    noise = [
        "{",
        "[1]",
        '{"text": "", "label": "x"}',
        '{"text": "x"}',
        '{"text": null, "label": "x"}',
        '{"text": 3, "label": "x"}',
        '{"text": "\\udc00", "label": "x"}',
        '{"text": "x", "label": ["y"]}',
    ]
    counts = {}
    for name, count, seed in (("train", 90, 1), ("validation", 30, 2), ("test", 30, 3)):
        made = [
            {"text": r["text"] + " <b onclick=evil()>\x1b[2J", "label": EVIL[r["label"]]} for r in make_rows(count, seed, 0.5)
        ]
        lines = [json.dumps(r) for r in made]
        for one in noise:
            lines.insert(random.Random(f"{name}{one}").randint(0, len(lines)), one)
        Path(f"{name}.jsonl").write_text("\n".join(lines))
        counts[name] = (count + len(noise), count)
    code = main(["finetune", str(recipe().path), "data.bad_rows=drop", "train.epochs=1", "--out", "run"])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert "\x1b[31m" not in said.out + said.err
    assert "\u202e" not in said.out + said.err
    splits = next(r for line in Path("run/log.jsonl").read_text().splitlines() if (r := json.loads(line))["event"] == "data")[
        "splits"
    ]
    page = Path("run/report.html").read_text()
    for name, (read_, used) in counts.items():
        fact = splits[name]
        assert (fact["rows_read"], fact["rows_used"]) == (read_, used)
        assert sum(fact["dropped"].values()) == read_ - used
        assert set(fact["dropped"]) == {
            "not JSON",
            "no row",
            "empty text",
            "missing label",
            "missing text",
            "text is no text",
            "label is no name",
        }
        assert f"{name}: {read_} rows read = {used} used + {read_ - used} dropped (" in said.out
    for reason, n in splits["train"]["dropped"].items():
        assert f"{n} {reason}" in page
    for raw in ("<script>", "<img src=x", "<b onclick", "</pre><img"):
        assert raw not in page
    assert "&lt;script&gt;alert(" in page
    assert main(["evaluate", "run"]) == 0
    assert "38 read; dropped: " in (said := capfd.readouterr()).out
    assert not re.search("\x1b|\u202e", said.out + said.err)
    assert main(["check", str(recipe().path), "data.bad_rows=drop"]) == 0
    assert not re.search("\x1b|\u202e", capfd.readouterr().out)


def test_a_limit_on_rows_is_in_the_ledger(recipe: MakeRecipe) -> None:
    fact = prepare.prepare(recipe("data.train_limit=40"), say=lambda line: None).facts["train"]
    assert (fact["rows_read"], fact["rows_used"], fact["dropped"]) == (90, 40, {"beyond data.train_limit": 50})


def test_a_message_is_made_of_printable_characters_and_short_lines() -> None:
    said = str(InputError("a\x1b[2J\x9b\x07\u202e\u2028\ud800\tb\n" + "x" * 5000))
    assert said.startswith("a\\x1b[2J\\x9b\\x07\\u202e\\u2028\\ud800\tb\n")
    assert len(said) < 1100
    for text in TEXTS:
        assert not ANSWERS.search(plain(text))
        plain(text).encode()


# -- tokens on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_token_file_is_made_anew(recipe: MakeRecipe, seed: int) -> None:
    quiet = {"say": lambda line: None}
    whole = prepare.prepare(recipe(), **quiet).encoded["train"]
    assert whole.path is not None
    raw = whole.path.read_bytes()
    draw = random.Random(seed)
    spoiled = [raw[: draw.randrange(len(raw))], b"", b"x", raw + raw][seed] if seed < 4 else raw
    if seed >= 4:
        at = raw.index(np.asarray(whole.ragged["input_ids"][0]).tobytes()) + draw.randrange(len(whole.ragged["input_ids"][0]) * 4)
        spoiled = raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
    tokens = whole.ragged["input_ids"][0].tolist()
    del whole
    path = next(p for p in Path("runs/.cache").glob("*.arrow") if p.read_bytes() == raw)
    path.unlink()
    path.write_bytes(spoiled)
    again = prepare.prepare(recipe(), **quiet).encoded["train"]
    assert again.ragged["input_ids"][0].tolist() == tokens
    assert again.reused == (spoiled == raw or seed == 3)
