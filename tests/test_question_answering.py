"""Question answering: SQuAD's files, windows, spans, scores and thresholds against formulas and SQuAD's own rules."""

import collections
import itertools
import json
import math
import random
import re
import string
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, WORDS, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import finetune, prepare, recipe, runs
from engine.__main__ import main
from engine.data import encode, read, rows
from engine.errors import InputError
from engine.tasks import _squad
from engine.tasks._answers import answers_of
from engine.tasks.question_answering import Options, Task, _asked

# -- files ------------------------------------------------------------------------------------------------------------

QA = {"id": "q1", "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]}
V2 = {
    "version": "v2.0",
    "data": [
        {"title": "Ann: a life", "topic": 7, "paragraphs": [
            {"context": "Ann sang.", "qas": [QA, {"id": "a:b", "question": "when?", "answers": [], "is_impossible": True,
                                                 "plausible_answers": [{"text": "sang", "answer_start": 4}]}]},
            {"qas": [{**QA, "id": "q3", "level": "easy"}], "context": "Ann ran."},
        ]},
        {"paragraphs": [{"context": "Bo\u00eb slept.", "qas": []}, {"context": "Bo\u00eb ate.", "source": "x", "qas": [
            {"id": "q4", "question": "who?", "answers": [{"text": "Bo\u00eb", "answer_start": 0}], "is_impossible": False}]}]},
    ],
}  # fmt: skip


def squad(data: Any, name: str = "s.json", **how: Any) -> Path:
    Path(name).write_text(json.dumps(data, **how), "utf-8")
    return Path(name)


@pytest.mark.parametrize("how", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_squad_files_become_one_row_a_question_and_lose_nothing(how: dict[str, Any]) -> None:
    table = read.read([str(squad(V2, **how))], "data.train")
    expected = [
        {k: v for k, v in {**article, **paragraph, **qa}.items() if k not in ("paragraphs", "qas", "plausible_answers")}
        for article in V2["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]
    ]  # fmt: skip
    assert table.rows == expected
    assert [answers_of(row["answers"]) for row in table.rows] == [[("Ann", 0)], [], [("Ann", 0)], [("Boë", 0)]]
    where = ["article 1, paragraph 1, question q1", "article 1, paragraph 1, question 2", "article 1, paragraph 2, question q3",
             "article 2, paragraph 2, question q4"]  # fmt: skip
    lines = Path("s.json").read_text("utf-8").split("\n")
    for place, said, row in zip(table.places, where, table.rows, strict=True):
        file, line, rest = re.fullmatch(r"([^:]*):(\d+), (.*)", place).groups()  # type: ignore[union-attr]
        assert (file, rest) == ("s.json", said)
        assert place.rpartition(":")[0] == "s.json"
        assert "{" in lines[int(line) - 1]
        assert f'"{row["id"]}"' in "".join(lines[int(line) - 1 : int(line) + 1]), "the line is where the question begins"
    Path("s.json").rename("s.txt")
    assert read.read(["s.txt"], "data.train", format="squad").rows == expected


def test_broken_squad_files_are_named_and_counted() -> None:
    text = json.dumps(V2)
    for cut in range(1, len(text), 3):
        Path("cut.json").write_text(text[:cut], "utf-8")
        with pytest.raises(InputError, match=r"cut\.json"):
            read.read(["cut.json"], "data.train", format="squad")
    for broken, said in [
        (text + "x", "something stands after the end"),
        (text.replace('"id": "q1"', '"id": "q1", "id": "q2"'), "the key 'id' stands twice"),
        (text.replace('"version"', '"data"'), "the list of articles must begin with ["),
        (text.replace('"version"', '"paragraphs": 1, "paragraphs"'), "the key 'paragraphs' stands twice"),
        ('{"version": 1}', 'there is no "data"'),
        ('{"data": []}', "the file has no rows"),
        ('{"data": [{"paragraphs": [{"context": "x", "qas": [{}],}]}]}', "a comma stands before the }"),
        ('{"data": [{"paragraphs": [{"context": "x", "qas": [{"n": ' + "9" * 5000 + "}]}]}]}", "thousands of digits"),
        ('{"data": ' + "[" * 100_000, "SQuAD"),
    ]:
        Path("s.json").write_text(broken, "utf-8")
        with pytest.raises(InputError, match=re.escape(said)):
            read.read(["s.json"], "data.train", format="squad")
    bad = {"data": [{"title": "no paragraphs"}, {"paragraphs": [
        {"context": "half \ud800", "qas": [QA, QA]}, {"context": "fine"}, {"context": "fine", "qas": [7, {**QA, "x": "\udfff"}, QA]},
    ]}]}  # fmt: skip
    squad(bad)
    with pytest.raises(InputError, match=r"s\.json:1, article 1: this article has no \"paragraphs\"") as error:
        read.read(["s.json"], "data.train")
    for said in ("paragraph 1, question q1: in the context, half of a surrogate pair", 'paragraph 2: this paragraph has no "qas"',
                 "paragraph 3, question 1: a int stands here", "paragraph 3, question q1: half of a surrogate pair"):  # fmt: skip
        assert said in str(error.value)
    table = read.read(["s.json"], "data.train", bad_rows="drop")
    assert (len(table), sum(table.dropped.values())) == (1, 6)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda x: st.lists(x, max_size=3)
                    | st.dictionaries(st.sampled_from(["data", "paragraphs", "qas", "context", "id", "question"]), x, max_size=4))  # fmt: skip


@given(JSON, st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_json_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, value: Any, indent: bool) -> None:
    path = tmp_path_factory.mktemp("any") / "s.json"
    for made in (value, {"data": value}, {"data": [{"paragraphs": value}]}, {"data": [{"paragraphs": [{"qas": value}]}]}):
        path.write_text(json.dumps(made, indent=2 if indent else None), "utf-8")
        try:
            table = read.read([str(path)], "data.train", format="squad", bad_rows="drop")
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert len(table.rows) == len(table.places) > 0
            assert all(isinstance(row, dict) for row in table.rows)


def test_a_bad_row_of_a_squad_file_ends_with_2_and_its_place(capsys: pytest.CaptureFixture[str], bert: Path) -> None:
    data = json.loads(json.dumps(V2))
    data["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["answer_start"] = 1
    squad(data, indent=1)
    Path("r.yaml").write_text(
        f"task: question_answering\nmodel: {{name: {bert}}}\ndata: {{train: s.json, max_length: 40}}\ntrain: {{max_steps: 1}}\n"
    )
    assert main(["check", "r.yaml"]) == 2
    said = capsys.readouterr().err
    line = Path("s.json").read_text().split("\n").index('       "id": "q3",')
    assert f"s.json:{line}, article 1, paragraph 2, question q3: column 'answers': the answer 'Ann' is not at 1" in said
    assert "'nn ' stands; it stands at 0" in said
    assert main(["check", "r.yaml", "data.bad_rows=drop"]) == 0
    assert "1 answer not at its offset" in capsys.readouterr().out


def test_a_fraction_taken_for_validation_tears_no_context_apart(bert: Path) -> None:
    every = [{**row, "question": f"{row['question']} {k}"} for row in facts(40, 3) for k in range(1 + len(row["context"]) % 4)]
    write_jsonl(Path("all.jsonl"), every)
    text = f"task: question_answering\nmodel: {{name: {bert}}}\ndata: {{train: all.jsonl, validation: 0.25, max_length: 40}}\n"
    Path("r.yaml").write_text(text)
    ready = prepare.prepare(recipe.load("r.yaml", []), say=lambda line: None)
    train, validation = ([row["context"] for row in ready.splits[name].table.rows] for name in ("train", "validation"))
    assert len(train) + len(validation) == len(every)
    assert set(train).isdisjoint(validation)
    assert len(set(validation)) == round(0.25 * len({row["context"] for row in every}))


# -- windows ----------------------------------------------------------------------------------------------------------

TEXTS = [
    ("who  ran?", "  The caf\u00e9 of Ann\u00a0Lee, in 1412 \u2014 it was small. " * 6 + "\u3000", "Ann\u00a0Lee"),
    ("when?", "x", "x"),
    ("\u8c01 (who)?", "\u674e\u767d\u662f\u5510\u4ee3\u8bd7\u4eba\u3002\n\n\u4ed6\u751f\u4e8e701\u5e74\uff0c\U0001f600 \u5352\u4e8e762\u5e74\u3002" * 5, "\u674e\u767d"),
    ("what?", "a " * 200 + "needle " + "b " * 200, "needle"),
    ("what all?", "one two three four five six seven eight nine ten " * 4, "one two three four five six seven eight nine ten " * 4),
]  # fmt: skip


def tokenizers() -> dict[str, Any]:
    """Tokenizers of the kinds that encoders have: BERT's, RoBERTa's (bytes, no types), DeBERTa's (pieces); one without [CLS]."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    corpus = [text for q, c, _ in TEXTS for text in (q, c)]
    made = {}
    for kind in ("bert", "roberta", "deberta", "gpt2"):
        special = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}.get(kind, ["<pad>", "<unk>", "<s>", "</s>"])
        pad, unk, cls, sep = special
        if kind == "bert":
            one = tk.Tokenizer(tk.models.WordPiece(unk_token=unk))
            one.normalizer, one.pre_tokenizer = tk.normalizers.BertNormalizer(), tk.pre_tokenizers.BertPreTokenizer()
            trainer: Any = tk.trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
        elif kind == "deberta":
            one = tk.Tokenizer(tk.models.Unigram())
            one.pre_tokenizer = tk.pre_tokenizers.Metaspace()
            trainer = tk.trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token=unk)
        else:
            one = tk.Tokenizer(tk.models.BPE())
            one.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
            alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
            trainer = tk.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
        one.train_from_iterator(corpus, trainer)
        ids = [(token, one.token_to_id(token)) for token in (cls, sep)]
        if kind == "roberta":
            one.post_processor = tk.processors.RobertaProcessing(ids[1], ids[0], trim_offsets=True, add_prefix_space=False)
        elif kind != "gpt2":
            pair = f"{cls} $A {sep} $B:1 {sep}:1"
            one.post_processor = tk.processors.TemplateProcessing(single=f"{cls} $A {sep}", pair=pair, special_tokens=ids)
        inputs = (
            ["input_ids", "token_type_ids", "attention_mask"] if kind in ("bert", "deberta") else ["input_ids", "attention_mask"]
        )
        named = {} if kind == "gpt2" else {"cls_token": cls, "sep_token": sep}
        made[kind] = PreTrainedTokenizerFast(
            tokenizer_object=one, pad_token=pad, unk_token=unk, model_input_names=inputs, **named
        )
    return made


def asked(texts: list[tuple[str, str, str]] = TEXTS) -> list[dict[str, Any]]:
    return [{"question": q, "context": c, "answers": {"text": [a], "answer_start": [c.index(a)]}} for q, c, a in texts]


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_cover_every_token_and_answers_stand_where_they_should(kind: str, side: str) -> None:
    tokenizer, table, length, stride = tokenizers()[kind], asked(), 64, 13
    tokenizer.padding_side, tokenizer.truncation_side = side, side
    task = Task({}, options=Options.model_construct(train=[], stride=stride, answer_tokens=10_000))
    task.fit(table, "f")
    made = encode.encode(task, table, tokenizer, length, None)
    assert ("token_type_ids" in made.ragged) == (kind in ("bert", "deberta"))
    for r, row in enumerate(table):
        context, (answer, at) = row["context"], answers_of(row["answers"])[0]  # type: ignore[index]
        whole = tokenizer(row["question"], context, return_offsets_mapping=True)
        tokens = [o for o, s in zip(whole["offset_mapping"], whole.sequence_ids(), strict=True) if s == 1]
        room = length - (len(whole["input_ids"]) - len(tokens))
        own = np.flatnonzero(made.row == r)
        count = 1 if len(tokens) <= room else 1 + math.ceil((len(tokens) - room) / (room - stride))
        assert len(own) == count
        seen: set[tuple[int, int]] = set()
        whole_in_one = False
        for i in own:
            offsets = made.ragged["begin"][1]
            begin, end = (made.ragged[name][0][offsets[i] : offsets[i + 1]] for name in ("begin", "end"))
            assert len(begin) == made.lengths[i] <= length
            for a, b in zip(begin.tolist(), end.tolist(), strict=True):
                assert (a < 0) == (b < 0)
                assert a < 0 or (a < b and not context[a].isspace() and not context[b - 1].isspace())
            seen |= {(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True) if a >= 0}
            ids = made.ragged["input_ids"][0][offsets[i] : offsets[i + 1]].tolist()
            null, (s, e) = int(made.scalars["null"][i]), made.scalars["labels"][i].tolist()
            assert null == (0 if kind == "gpt2" else ids.index(tokenizer.cls_token_id))
            if (s, e) != (null, null):
                whole_in_one = True
                assert 0 <= begin[s] <= at + len(answer) - len(answer.lstrip())
                assert end[e] >= at + len(answer.rstrip())
                assert s <= e
                assert all(not (t >= 0 and t > begin[s] and u <= at) for t, u in zip(begin, end, strict=True)), (
                    "no token too many"
                )
            else:
                gone = [(a, b) for a, b in tokens if a < at + len(answer.rstrip()) and b > at and context[a:b].strip()]
                have = {(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True)}
                stripped = {(a + len(context[a:b]) - len(context[a:b].lstrip()), a + len(context[a:b].rstrip())) for a, b in gone}
                assert stripped - have, "it is here and was not found"
        solid = {i for a, b in tokens for i in range(a, b) if not context[i].isspace()}
        assert {i for a, b in seen for i in range(a, b)} >= solid, "every character of the context is in a window"
        assert made.scalars["truncated"][own].sum() == (not whole_in_one)


def test_the_last_row_of_the_texts_is_longer_than_a_window_and_counted() -> None:
    task = Task({}, options=Options.model_construct(train=[]))
    made = encode.encode(task, asked(), tokenizers()["bert"], 40, None)
    assert made.scalars["truncated"].sum() == 1
    assert made.row[np.flatnonzero(made.scalars["truncated"])[0]] == len(TEXTS) - 1


def test_a_question_without_room_for_its_context_is_an_error_for_people() -> None:
    tokenizer = tokenizers()["bert"]
    row = {"question": "what " * 40, "context": "one two three " * 60, "answers": {"text": ["one"], "answer_start": [0]}}
    size, some = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (row["question"], "one two"))
    limit = size + 3 + 20  # [CLS], two [SEP] and 20 tokens of context
    task = Task({}, options=Options.model_construct(train=[], stride=20))
    with pytest.raises(
        InputError, match=rf"data\.max_length={limit}: the question 'what .* has {size} tokens.* 20 for.* 20 \(data\.stride\)"
    ):
        encode.encode(task, [row], tokenizer, limit, None)
    assert len(encode.encode(task, [row], tokenizer, limit + 1, None)) > 1
    assert some <= 20
    short = {**row, "context": "one two"}  # fits whole, so there is nothing to slide
    assert len(encode.encode(task, [short], tokenizer, limit, None)) == 1


def test_rows_without_answers_can_be_answered() -> None:
    row = {"question": "who?", "context": "Ann ran"}
    task = Task({})
    assert task.problem(row, target=False) is None
    assert task.problem(row) is not None
    made = encode.encode(task, [row], tokenizers()["bert"], 32, None)
    assert made.scalars["labels"].tolist() == [[-100, -100]]


# -- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "DebertaV2", "Electra"])
def test_the_loss_is_that_of_transformers_summed_over_windows(architecture: str) -> None:
    import transformers
    from laws import ARCHITECTURES, IDS

    kind = {"Bert": "bert", "Electra": "bert", "DebertaV2": "deberta"}.get(architecture, "roberta")
    tokenizer = tokenizers()[kind]
    sizes = ARCHITECTURES[architecture] | {"vocab_size": len(tokenizer), "max_position_embeddings": 80}
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes, **IDS)
    model = transformers.AutoModelForQuestionAnswering.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    task, table = Task({}), asked()
    made = encode.encode(task, table, tokenizer, 64, None)
    batch = made.batch(np.arange(len(made)))
    assert task.items(batch) == len(made) > len(table)
    with torch.no_grad():
        total, expected, mine = task.loss(model, batch), 0.0, []
        for i in range(len(made)):
            one = made.batch(np.array([i]))
            inputs = {k: one[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in one}
            start, end = one["labels"][:, 0], one["labels"][:, 1]
            expected += float(model(**inputs, start_positions=start, end_positions=end).loss)
            mine.append(task.output(model, one)[0].numpy())
    assert float(total) == pytest.approx(expected, rel=1e-5)
    judged = task.judge(mine, made, table)
    assert judged.losses.sum() == pytest.approx(expected, rel=1e-5)
    assert judged.items.tolist() == np.bincount(made.row).tolist()


# -- spans and the threshold ------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_best_spans_are_those_of_a_search_through_all(length: int, longest: int, n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, usable = draw.integers(-4, 5, (length, 2)).astype(np.float32), draw.random(length) < 0.7
    every = sorted(
        (-(float(scores[i, 0]) + float(scores[j, 1])), i, j)
        for i in range(length)
        for j in range(i, min(length, i + longest))
        if usable[i] and usable[j]
    )
    found, i, j = _squad.best_spans(scores, usable, longest, n)
    assert found.tolist() == [-score for score, *_ in every[:n]]
    assert {(-s, a, b) for s, a, b in zip(found.tolist(), i.tolist(), j.tolist(), strict=True)} <= set(every)
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(found)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_the_threshold_is_the_best_of_all(rows_: list[tuple[int, int, int]]) -> None:
    margins, answered, unanswered = (np.array(x, dtype=float) for x in zip(*rows_, strict=True))

    def total(t: float) -> float:
        return float(np.where(margins > t, unanswered, answered).sum())

    best = max(total(t) for t in np.arange(-5, 5, 0.25))
    found = _squad.best_threshold(margins, answered, unanswered)
    assert total(found) == best


def one_row(context: str, outputs: list[list[tuple[float, float]]], begins: list[list[int]], task: Task) -> Any:
    """The prediction for a row whose windows have these logits; token i is the word that begins at begins[i]."""
    ends = [[-1 if b < 0 else (context + " ").index(" ", b) for b in window] for window in begins]
    columns = {"input_ids": begins, "begin": begins, "end": ends, "row": [0] * len(begins), "null": [0] * len(begins),
               "labels": [(0, 0)] * len(begins), "truncated": [False] * len(begins)}  # fmt: skip
    made = encode._from_columns(columns, {})
    return task.predictions([np.float32(o) for o in outputs], made, [{"question": "?", "context": context}])[0]


def test_the_answer_is_the_best_span_of_all_windows_and_a_piece_of_the_context() -> None:
    context, task = "It was Ann Lee of Ulm", Task({})
    begins = [[-1, 0, 3, 7], [-1, 7, 11, 15]]  # [CLS] It was Ann | [CLS] Ann Lee of
    outputs = [[(9, 9), (0, 0), (0, 0), (3, 2)], [(9, 9), (4, 0), (0, 5), (0, 1)]]
    found = one_row(context, outputs, begins, task)
    assert (found["prediction"], found["start"], found["end"], found["score"]) == ("Ann Lee", 7, 14, 9.0)
    assert "null_score" not in found, "train had no question without an answer, so one is always given"
    assert [(one["text"], one["score"]) for one in found["best"]] == [("Ann Lee", 9.0), ("Ann", 5.0), ("Ann Lee of", 5.0)]
    assert all(context[one["start"] : one["end"]] == one["text"] for one in found["best"])
    task.longest = 1
    assert one_row(context, outputs, begins, task)["prediction"] in ("Ann", "Lee")


def test_no_answer_is_given_where_the_least_null_score_is_above_the_threshold() -> None:
    context, task, begins = "Ann ran", Task({}), [[-1, 0, 4], [-1, 4, 4]]
    outputs = [[(5, 5), (3, 3), (0, 0)], [(4, 4), (0, 0), (0, 0)]]  # null scores 10 and 8, best span 6: margin 2
    for threshold, text in ((None, "Ann"), (2.0, "Ann"), (1.9, "")):
        task.threshold = threshold
        found = one_row(context, outputs, begins, task)
        assert found["prediction"] == text
        assert found["score"] == 6
        assert (found["start"], found["end"]) == ((0, 3) if text else (None, None))
        assert found.get("null_score") == (None if threshold is None else 8)


# -- scores -----------------------------------------------------------------------------------------------------------


def official_words(text: str) -> list[str]:
    """normalize_answer of evaluate-v2.0.py, as it is published."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split()


def official(predicted: str, golds: list[str]) -> tuple[float, float]:
    """get_raw_scores of evaluate-v2.0.py."""
    golds = [gold for gold in golds if official_words(gold)] or [""]
    best = [0.0, 0.0]
    for gold in golds:
        g, p = official_words(gold), official_words(predicted)
        same = sum((collections.Counter(g) & collections.Counter(p)).values())
        if not g or not p:
            f1 = float(g == p)
        elif same == 0:
            f1 = 0.0
        else:
            precision, recall = 1.0 * same / len(p), 1.0 * same / len(g)
            f1 = (2 * precision * recall) / (precision + recall)
        best = [max(best[0], float(" ".join(g) == " ".join(p))), max(best[1], f1)]
    return best[0], best[1]


PIECES = st.sampled_from(["the", "The", "a", "An", "than", "U.S.", "10%", "-", "_", "24", "Ann's", "Ann", "lee", "\u201cx\u201d", "\u00e9", "\u5317\u4eac", "  ", "\n", "!"])  # fmt: skip
PHRASE = st.lists(PIECES, max_size=6).flatmap(lambda parts: st.sampled_from([" ".join(parts), "".join(parts)]))


@given(PHRASE, st.lists(PHRASE, max_size=3))
@settings(max_examples=400, deadline=None)
def test_scores_are_those_of_squads_own_script(predicted: str, golds: list[str]) -> None:
    assert _squad.against(predicted, golds) == pytest.approx(official(predicted, golds), abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "golds", "exact", "f1"),
    [
        ("The Panthers!", ["panthers"], 1, 1),
        ("Denver Broncos", ["the Denver Broncos defense"], 0, 0.8),  # 2 shared of 2 and 3: P = 1, R = 2/3
        ("Denver Denver", ["Denver"], 0, 2 / 3),  # a bag: one of two is shared
        ("1412", ["in 1412", "1412"], 1, 1),
        ("", [], 1, 1),
        ("Ann", [], 0, 0),
        ("", ["Ann"], 0, 0),
        ("the", [], 1, 1),  # nothing but an article is no answer, as SQuAD's script has it
    ],
)
def test_scores_by_hand(predicted: str, golds: list[str], exact: float, f1: float) -> None:
    assert _squad.against(predicted, golds) == (exact, pytest.approx(f1))


def mlqa_words(text: str, marks: set[str]) -> list[str]:
    """normalize_answer of mlqa_evaluation_v1.py for zh: punctuation of all Unicode goes, then the mixed segmentation."""
    text = "".join(ch for ch in text.lower() if ch not in marks)
    segments: list[str] = []
    temporary = ""
    for ch in text:
        if re.search(r"[\u4e00-\u9fa5]", ch) or ch in marks:
            segments += temporary.split()
            segments.append(ch)
            temporary = ""
        else:
            temporary += ch
    return [word for word in segments + temporary.split() if word.strip()]


ZH = ["\u4e00\u4e5d\u516b\u56db\u5e74", "\uff0cTFEU \u7684\u3001\u673a\u6784\u3002", "the NBA \u8054\u76df", "\u201c\u674e\u767d\u201d\uff08Li Bai\uff09", "308\u5206", "$5 \u7f8e\u5143", ""]  # fmt: skip


def test_chinese_words_are_those_of_mlqas_script() -> None:
    marks = {chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")} | set(string.punctuation)
    for text in ZH:
        assert _squad.words_of(text, characters=True) == mlqa_words(text, marks)
    assert _squad.words_of("\u30ab\u30e1\u30e9\u3068the\u732b", characters=True) == [
        "\u30ab",
        "\u30e1",
        "\u30e9",
        "\u3068",
        "the",
        "\u732b",
    ]


def test_chinese_scores_by_hand() -> None:
    assert _squad.against("308", ["308\u5206"], True) == (0, pytest.approx(2 / 3))  # of "308" and "\u5206" one is shared
    assert _squad.against("\u300a\u5510\u8bd7\u300b\u3002", ["\u5510\u8bd7"], True) == (1, 1)
    assert _squad.against("\u5510\u8bd7\u4eba", ["\u8bd7\u4eba\u674e\u767d"], True) == (0, pytest.approx(2 * 2 / 7))
    assert _squad.without_spaces("\u674e\u767d\u751f\u4e8e701\u5e74\uff0c\u662f\u5510\u4ee3\u8bd7\u4eba")
    assert not _squad.without_spaces("Genghis Khan (\u6210\u5409\u601d\u6c57) founded the Mongol Empire in 1206")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_gold_answers_score_full_marks_on_xquad(language: str) -> None:
    path = SHARED / "data" / "xquad" / f"xquad.{language}.json"
    if not path.exists():
        pytest.skip(f"no {path}: the shared data are not here")
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    table = read.read([str(path)], "data.train")
    assert len(table) == 1190
    task = Task({}, options=Options.model_construct(train=[], answer_tokens=400))
    task.fit(table.rows, str(path))
    assert len(rows.clean(table, task, "error")) == 1190
    scores = [_squad.against(text, task.gold(row), _squad.without_spaces(row["context"]))
              for row in table.rows for text in task.gold(row)]  # fmt: skip
    assert set(scores) == {(1.0, 1.0)}
    assert {_squad.without_spaces(row["context"]) for row in table.rows} == {language == "zh"}

    words = tk.Tokenizer(tk.models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = tk.normalizers.BertNormalizer(), tk.pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    words.post_processor = tk.processors.TemplateProcessing(pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    made = encode.encode(task, table.rows, tokenizer, 384, None)
    assert made.scalars["truncated"].sum() == 0
    outputs = []
    for label, null, length in zip(made.scalars["labels"], made.scalars["null"], made.lengths, strict=True):
        one = np.zeros((length, 2), np.float32)
        one[label, [0, 1]] = 1 if label[0] == null else 9
        outputs.append(one)
    judged = task.judge(outputs, made, table.rows)
    wrong = [row for row, exact in zip(table.rows, judged.arrays[0], strict=True) if not exact]
    # a gold answer that ends within a number ("2,70" of "2,700") is the piece of a token, and no span of tokens is it
    assert len(wrong) <= 3
    for row in wrong:
        text, at = answers_of(row["answers"])[0]  # type: ignore[index]
        edges = [row["context"][max(0, k - 1) : k + 1] for k in (at, at + len(text))]
        assert any(edge.isalnum() and len(edge) == 2 for edge in edges), (text, edges)


# -- a run ------------------------------------------------------------------------------------------------------------


RECIPE = """task: question_answering
model: {{name: {model}}}
data: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl, max_length: 40}}
train: {{epochs: 4, batch_size: 16, learning_rate: 5e-3, device: cpu}}
evaluate: {{bootstrap: 20}}
early_stopping: {{monitor: f1}}
"""


def facts(count: int, seed: int) -> list[dict[str, Any]]:
    """Salads of up to three windows in which something "is" something, or nothing is."""
    draw = random.Random(seed)
    out = []
    for i in range(count):
        fill, kind = (
            draw.choices(["the", "it", "and", "we", "had", "they", "with"], k=draw.randint(4, 70)),
            draw.choice(WORDS[:20]),
        )
        at = draw.randint(0, len(fill))
        before, after = " ".join([*fill[:at], "is "]), " ".join(["", *fill[at:]])
        known = {"context": before + kind + after, "answers": {"text": [kind], "answer_start": [len(before)]}}
        nothing = {"context": " ".join(fill), "answers": {"text": [], "answer_start": []}}
        out.append({"question": "this", **(nothing if i % 4 == 0 else known)})
    return out


def test_a_run_learns_to_answer_and_to_abstain(still_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, count) in enumerate((("train", 160), ("validation", 40), ("test", 40))):
        write_jsonl(Path(f"{name}.jsonl"), facts(count, seed))
    Path("qa.yaml").write_text(RECIPE.format(model=still_bert), "utf-8")
    made = finetune.finetune(recipe.load("qa.yaml", []), "r", say=lambda line: None)
    scores = made.metrics["test"]
    assert scores["f1"] > 60, scores  # never answering gives 25, a random span less
    assert scores["unanswerable_exact_match"] > 60
    lines = [json.loads(line) for line in Path("r/predictions/test.jsonl").read_text("utf-8").splitlines()]
    assert all(line["context"][line["start"] : line["end"]] == line["prediction"] for line in lines if line["prediction"])
    exact = [any(line["prediction"] == gold for gold in line["label"] or [""]) for line in lines]
    assert 100 * np.mean(exact) == pytest.approx(scores["exact_match"])

    # the threshold is that of validation, and is kept with the model
    threshold = json.loads(Path("r/model/config.json").read_text())["task_state"]["null_threshold"]
    assert threshold == made.metrics["detail"]["test"]["null_threshold"]
    held = [json.loads(line) for line in Path("r/predictions/validation.jsonl").read_text("utf-8").splitlines()]
    margins = np.array([line["null_score"] - line["best"][0]["score"] for line in held])
    answered, none = (np.array([_squad.against(text, line["label"])[1] for line in held for text in [pick(line)]])
                      for pick in (lambda line: line["best"][0]["text"], lambda line: ""))  # fmt: skip
    totals = [np.where(margins > t, none, answered).sum() for t in [*margins, margins.min() - 1]]
    assert np.where(margins > threshold, none, answered).sum() == pytest.approx(max(totals))

    # transformers alone loads it and finds the same scores
    import transformers

    run = runs.open_run("r")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained("r/model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("r/model")
    line = next(line for line in lines if line["prediction"] and len(line["context"].split()) < 35)
    inputs = tokenizer(line["question"], line["context"], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    best = max(
        float(out.start_logits[0, i] + out.end_logits[0, j])
        for i, j in itertools.product(range(inputs["input_ids"].shape[1]), repeat=2)
        if i <= j < i + 30 and inputs.sequence_ids(0)[i] == inputs.sequence_ids(0)[j] == 1
    )
    assert line["score"] == pytest.approx(best, abs=1e-4)
    assert run.task.threshold == threshold

    # predict: a file of questions, whatever the order of its keys; a bare text is no question
    write_jsonl(
        Path("ask.jsonl"), [{"context": row["context"], "question": row["question"], "n": i} for i, row in enumerate(lines[:5])]
    )
    capsys.readouterr()
    assert main(["predict", "r", "--input", "ask.jsonl"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["answer"] for one in told] == [line["prediction"] for line in lines[:5]]
    assert list(told[0])[:3] == ["context", "question", "n"]
    assert main(["predict", "r", "--text", "what?"]) == 2
    assert "reads question and context; give them as a file with --input" in capsys.readouterr().err
    assert main(["evaluate", "r"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("exact_match", "no answer", "asks"))


def test_what_a_report_shows_is_escaped_marked_and_short() -> None:
    from engine.report import _template

    context = "<b>x</b> " * 200 + "it was <Ann> Lee & co" + " y" * 600
    at = context.index("<Ann>")
    line = {"id": "1", "question": "who <i>?", "context": context, "answers": {"text": ["<Ann> Lee"], "answer_start": [at]}, "loss": 1.0,
            "label": ["<Ann> Lee"], "prediction": "Lee & co", "start": at + 6, "end": at + 14, "score": 1.0, "best": []}  # fmt: skip
    example = Task.example(line)
    assert Task.wrong(line)
    assert not Task.wrong({**line, "prediction": "the <Ann> Lee!"})
    marks = [(span.text, span.kind) for span in example.texts["context"] if span.kind]  # type: ignore[union-attr]
    assert marks == [("<Ann> ", "missed"), ("Lee", "good"), (" & co", "bad")]
    assert sum(len(span.text) for span in example.texts["context"]) < 1200  # type: ignore[union-attr]
    assert example.cells == ["<Ann> Lee", "Lee & co"]
    assert not example.right
    assert Task.example({**line, "prediction": "the <Ann> Lee!"}).right
    assert _template() is not None
    none = {**line, "label": [], "answers": {"text": [], "answer_start": []}, "prediction": "", "start": None, "end": None}
    assert Task.example(none).cells == ["(no answer)", "(no answer)"]
    assert not any(span.kind for span in Task.example(none).texts["context"])  # type: ignore[union-attr]
    assert not Task.wrong(none)
    mapped = {("passage" if k == "context" else k): v for k, v in line.items()}
    assert [s.kind for s in Task.example(mapped).texts["passage"]].count("good") == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("question", "word"),
    [("How many points?", "how many"), ("In what year did he who ran win?", "what"), ("To whom?", "who"), ("Is it so?", "other"),
     ("How was it?", "how"), ("\u4ed6\u4ec0\u4e48\u65f6\u5019\u51fa\u751f\uff1f", "\u4f55\u65f6"), ("\u4ed6\u4e3a\u4ec0\u4e48\u8d70\uff1f", "\u4e3a\u4ec0\u4e48"), ("\u4ed6\u662f\u8c01\uff1f", "\u8c01")],
)  # fmt: skip
def test_question_words(question: str, word: str) -> None:
    assert _asked(question) == word


def test_columns_options_and_metrics_that_cannot_be_are_errors() -> None:
    with pytest.raises(InputError, match="reads no 'text'"):
        Task({"text": "x"})
    with pytest.raises(InputError, match="has no labels"):
        Task({}, ["a"])
    with pytest.raises(InputError, match="no question in train has an answer"):
        Task({}).fit([{"question": "q", "context": "c", "answers": []}], "f")
    with pytest.raises(InputError, match="no metric 'accuracy'"):
        Task({}).check(["accuracy"], "k")
