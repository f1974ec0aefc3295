"""Data: every row has a place, nothing is lost silently, tokens are made once."""

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeRecipe, make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import prepare
from engine.data import read, rows
from engine.errors import InputError
from engine.tasks.classification import Task, label_name

ROWS = [{"text": 'a "b", c', "label": "x"}, {"text": "two\nlines", "label": "y"}, {"text": "é 中文 \u2028 end", "label": "x"}]


def as_csv(rows: list[dict[str, Any]], **style: Any) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **style)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def written(path: Path) -> None:
    """ROWS in the format that the ending of `path` names."""
    kind = path.suffix[1:]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        text = {"jsonl": lambda: "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), "json": lambda: json.dumps(ROWS, indent=1),
                "csv": lambda: as_csv(ROWS)}[kind]()  # fmt: skip
        path.write_text(text, "utf-8", newline="")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    written(tmp_path / f"f.{kind}")
    table = read.read([f"f.{kind}"], "data.train")
    assert table.rows == ROWS
    lines = {"jsonl": [1, 2, 3], "json": [2, 6, 10], "csv": [2, 3, 5], "parquet": ["row 1", "row 2", "row 3"]}[kind]
    assert table.places == [f"f.{kind}:{n}" for n in lines]


def test_tsv_keeps_stray_quotes_unless_told(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_text('text\tlabel\n"open\tx\nsay "hi"\ty\n')
    assert [r["text"] for r in read.read(["f.tsv"], "k").rows] == ['"open', 'say "hi"']
    with pytest.raises(InputError, match=r"f.tsv:2: .*check the quotes"):
        read.read(["f.tsv"], "k", quoting="csv")


def test_names_stand_in_for_a_header(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_text("x\tgood\ny\tbad\n")
    assert read.read(["f.tsv"], "k", names=["label", "text"]).rows[0] == {"label": "x", "text": "good"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.jsonl", b'{"a": 1}\n{"a": }\n[1]\n', "f.jsonl:2:7: this line is not JSON"), ("f.jsonl", b"[1]\n", "f.jsonl:1: a list stands here"),
        ("f.jsonl", b'{"a": "\xff"}', "f.jsonl:1:8: this is not UTF-8 (byte 0xff)"), ("f.csv", "a,b\n1,2".encode("utf-16"), "it looks like UTF-16"),
        ("f.csv", b"a,b\n1,2\n1,2,3\n1\n", "f.csv:3: 3 fields where the header has 2"), ("f.csv", b"a,a\n1,2\n", "the column 'a' stands twice"),
        ("f.csv", b'a,b\n1,"open\n2,3\n', "f.csv:2: unexpected end of data"), ("f.csv", b"a,b\n", "f.csv: the file has no rows"),
        ("f.jsonl", b"", "the file has no rows"), ("f.jsonl", b"\n \n", "the file has no rows"), ("f.json", b'{"a": 1}', "must hold a list"),
        ("f.json", b'[{"a": 1} {"a": 2}]', "a comma or ] is missing"), ("f.json", b'[{"a": 1},\n 3]', "f.json:2: a int stands here"),
        ("f.json", b'[{"a": 1}', "a comma or ] is missing"), ("f.json", b"[" * 5000, "not JSON"), ("f.parquet", b"PAR1", "no readable parquet"),
        ("f.xyz", b"a", "the ending '.xyz' names no format"), ("f.txt", b"a\0b", "f.txt:1:2: a NUL byte"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read.read([name], "data.train")
    assert said in str(error.value)


def test_absent_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    for name, said in (("none.jsonl", "no file none.jsonl"), ("d.jsonl", "is not a file")):
        with pytest.raises(InputError, match=said):
            read.read([name], "data.train")


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.text()}), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_jsonl_and_csv(tmp_path_factory: pytest.TempPathFactory, made: list[dict[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = [{k: v.replace("\0", "") for k, v in row.items()} for row in made]
    (folder / "f.jsonl").write_text("\n".join(json.dumps(r) for r in made), "utf-8")
    assert read.read([str(folder / "f.jsonl")], "k").rows == made
    (folder / "f.csv").write_text(as_csv(made, quoting=csv.QUOTE_ALL, lineterminator="\n"), "utf-8", newline="")
    if not any("\r" in v for r in made for v in r.values()):
        assert read.read([str(folder / "f.csv")], "k").rows == made


@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet"]))
@settings(max_examples=300, deadline=None)
def test_no_bytes_crash_a_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"f.{kind}"
    path.write_bytes(content)
    try:
        table = read.read([str(path)], "data.train")
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert len(table.rows) == len(table.places) > 0


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1, "1"),
        (1.0, "1"),
        ("1", "1"),
        (" a ", "a"),
        (True, "true"),
        (None, None),
        ("", None),
        (float("nan"), None),
        (0.5, "0.5"),
    ],
)
def test_a_label_is_one_name_however_it_is_written(value: Any, name: str | None) -> None:
    assert label_name(value) == name


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 2], ["2", "9", "10"]),
        (["1", "-1", "0"], ["-1", "0", "1"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_labels_have_a_stable_order(labels: list[Any], order: list[str]) -> None:
    task = Task({})
    task.fit([{"text": "x", "label": v} for v in labels], "f")
    assert task.labels == order
    task.fit([{"text": "x", "label": v} for v in reversed(labels)], "f")
    assert task.labels == order


BAD = [
    ({"text": "", "label": "a"}, "f:1: column 'text' is empty"), ({"text": " \n", "label": "a"}, "is empty"), ({"label": "a"}, "missing or null"),
    ({"text": None, "label": "a"}, "missing or null"), ({"text": 7, "label": "a"}, "holds a int (7), not a text"), ({"text": "x"}, "has no label"),
    ({"text": "x", "label": "bb"}, "the label 'bb' is not in the training set; did you mean 'b'?"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD)
def test_bad_rows_are_named_or_counted(row: dict[str, Any], said: str) -> None:
    task = Task({}, ["a", "b"])
    table = read.Table([row, {"text": "fine", "label": "b"}], ["f:1", "f:2"], {})
    with pytest.raises(InputError) as error:
        rows.clean(table, task, "error")
    assert said in str(error.value)
    assert "data.bad_rows=drop" in str(error.value)
    split = rows.clean(table, task, "drop")
    assert (split.read, len(split), sum(split.dropped.values())) == (2, 1, 1)
    assert split.table.places == ["f:2"]


def test_at_most_twenty_bad_rows_are_listed() -> None:
    table = read.Table([{"text": "", "label": "a"}] * 50, [f"f:{i}" for i in range(50)], {})
    with pytest.raises(InputError) as error:
        rows.clean(table, Task({}, ["a", "b"]), "error")
    assert str(error.value).count("\n") == 21
    assert "... and 30 more" in str(error.value)


def test_a_fraction_is_taken_alike_from_every_class_and_is_pure() -> None:
    table = read.Table([{"text": f"t{i}", "label": "a" if i % 4 else "b"} for i in range(80)], [f"f:{i}" for i in range(80)], {})
    split = rows.Split(table, 80)
    strata = [r["label"] for r in table.rows]
    rest, taken = rows.split_off(split, 0.25, strata, 1)
    assert [sum(r["label"] == "b" for r in s.table.rows) for s in (rest, taken)] == [15, 5]
    assert {r["text"] for r in rest.table.rows}.isdisjoint(r["text"] for r in taken.table.rows)
    assert len(rest) + len(taken) == 80
    assert rows.split_off(split, 0.25, strata, 1)[1].table.rows == taken.table.rows
    assert rows.split_off(split, 0.25, strata, 2)[1].table.rows != taken.table.rows


def test_duplicates_and_leaks_are_counted() -> None:
    def split(*texts: str) -> rows.Split:
        return rows.Split(
            read.Table([{"text": t, "label": "a"} for t in texts], [f"f:{i}" for i in range(len(texts))], {}), len(texts)
        )

    facts = rows.facts({"train": split("x", "y", "x"), "test": split("x", "z", "x")}, Task({}, ["a", "b"]))
    assert facts["train"]["duplicates"] == 1
    assert facts["test"]["also_in_train"] == 2
    assert facts["test"]["labels"] == {"a": 3, "b": 0}


def test_numbered_labels_are_read_as_ids_and_said() -> None:
    task = Task({}, ["negative", "positive"])
    table = [{"text": "x", "label": "1"}, {"text": "y", "label": 0}]
    assert task.adapt([{"text": "x", "label": "positive"}]) is None
    assert task.adapt([{"text": "x", "label": "7"}]) is None
    assert task.adapt(table) == "labels are read as ids: 0 = negative, 1 = positive"
    assert [task.problem(row) for row in table] == [None, None]


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_found_again_by_content(recipe: MakeRecipe) -> None:
    quiet = {"say": lambda line: None}
    first = prepare.prepare(recipe(), **quiet)
    assert not any(e.reused for e in first.encoded.values())
    again = prepare.prepare(recipe("train.learning_rate=1e-5"), **quiet)
    assert all(e.reused for e in again.encoded.values())
    assert not prepare.prepare(recipe("data.max_length=9"), **quiet).encoded["train"].reused
    rows = make_rows(90, 1)
    rows[7]["text"] += " so"
    write_jsonl(Path("train.jsonl"), rows)
    changed = prepare.prepare(recipe(), **quiet)
    assert [changed.encoded[s].reused for s in ("train", "validation")] == [False, True]


def test_the_token_file_is_what_datasets_reads(recipe: MakeRecipe) -> None:
    import datasets

    ready = prepare.prepare(recipe(), say=lambda line: None)
    encoded = ready.encoded["train"]
    loaded = datasets.Dataset.from_file(str(encoded.path))
    texts = [r["text"] for r in ready.splits["train"].table.rows]
    expected = ready.loaded.tokenizer(texts, truncation=True, max_length=48)["input_ids"]
    assert loaded["input_ids"][:] == expected
    flat, offsets = encoded.ragged["input_ids"]
    assert [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected
    assert loaded["labels"][:] == [["negative", "positive"].index(r["label"]) for r in ready.splits["train"].table.rows]
    assert not flat.flags.writeable, "memory-mapped, not copied"


def test_pairs_have_types_and_cut_texts_are_counted(recipe: MakeRecipe) -> None:
    pairs = [{"a": "good film " * 3, "b": "bad " * (1 + i), "label": i % 2} for i in range(20)]
    for name in ("train", "validation", "test"):
        write_jsonl(Path(f"{name}.jsonl"), pairs)
    ready = prepare.prepare(recipe("data.columns={text: a, text_pair: b}", "data.max_length=16"), say=lambda line: None)
    batch = ready.encoded["train"].batch(np.arange(20))
    assert batch["token_type_ids"].max() == 1
    assert batch["input_ids"].shape[1] == 16
    cut = [6 + 3 + 1 + i > 16 for i in range(20)]
    assert batch["truncated"].tolist() == cut
    assert ready.facts["train"]["tokens"]["truncated"] == sum(cut)
    assert any("were cut" in note for note in ready.notes)


def test_a_hub_data_set_gives_labels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    asked = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read.read(["hub:owner/name/config#train"], "data.train")
    assert asked == [("owner/name", "config", "train")]
    assert [r["label"] for r in table.rows] == ["good", "bad"]
    assert table.places == ["hub:owner/name/config#train:row 1", "hub:owner/name/config#train:row 2"]
    with pytest.raises(InputError, match="should be hub:OWNER/NAME"):
        read.read(["hub:owner/name"], "data.train")


def test_a_hub_data_set_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"data.train: hub:nobody/nothing#train cannot be loaded: .*The hub cannot be reached"):
        read.read(["hub:nobody/nothing#train"], "data.train")
