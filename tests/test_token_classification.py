"""Token classification: entities as seqeval counts them, CoNLL files line by line, every word once, a run from end to end."""

import contextlib
import itertools
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FLOAT32, SHARED, WORDS, make_bert, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import evaluate, find, metrics, spans, train
from engine import recipe as recipes
from engine.__main__ import main
from engine.data import conll, encode, read, rows, words
from engine.data.windows import Windows
from engine.errors import InputError
from engine.fast import packing
from engine.finetune import finetune
from engine.tasks.token_classification import Options, Task, join

TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC", "B-odd"))]
SCHEMES = {"BIO2": "BI", "BIO1": "BI", "IOBES": "BIES"}
tag_lists = st.lists(st.sampled_from([*TAGS, "B", "I", "E", "S"]), min_size=1, max_size=12)


def written_as(found: list[spans.Span], size: int, scheme: str) -> list[str]:
    """The tags of spans under a scheme, from its definition: the inverse of `decode`."""
    tags = ["O"] * size
    for n, (kind, start, end) in enumerate(found):
        for i in range(start, end):
            touches = n > 0 and found[n - 1][2] == start and found[n - 1][0] == kind
            first, last = i == start, i == end - 1
            if scheme == "IOBES":
                tags[i] = ("S" if first and last else "B" if first else "E" if last else "I") + f"-{kind}"
            else:
                tags[i] = ("B" if first and (scheme == "BIO2" or touches) else "I") + f"-{kind}"
    return tags


# -- spans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seqeval() -> Any:
    return pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")


def test_thousands_of_random_sequences_score_as_in_seqeval(seqeval: Any) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    draw, every = random.Random(0), [*TAGS, "B", "I", "E", "S"]
    kinds = spans.types(every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(600):
            gold = [[draw.choice(every) for _ in range(draw.randint(1, 12))] for _ in range(draw.randint(1, 6))]
            made = [[draw.choice(every) if draw.random() < 0.4 else tag for tag in tags] for tags in gold]
            for tags in (*gold, *made):
                assert [(kind, a, b + 1) for kind, a, b in get_entities(tags)] == spans.decode(tags)
            sums = spans.counts(gold, made, kinds).sum(axis=0)
            ours = spans.scores(sums)
            assert ours["accuracy"] == pytest.approx(seqeval.accuracy_score(gold, made), abs=1e-9)
            for name in ("precision", "recall", "f1"):
                for average in ("micro", "macro", "weighted"):
                    theirs = getattr(seqeval, f"{name}_score")(gold, made, average=average)
                    mine = float(ours[name if average == "micro" else f"{name}_{average}"])
                    assert mine == pytest.approx(0.0 if np.isnan(theirs) else theirs, abs=1e-9), (name, average)
            table = spans.per_type(sums, kinds)
            for kind, theirs in seqeval.classification_report(gold, made, output_dict=True).items():
                if not kind.endswith(" avg"):
                    mine = [table[kind][k] for k in ("precision", "recall", "f1", "support")]
                    assert mine == pytest.approx([theirs[k] for k in ("precision", "recall", "f1-score", "support")], abs=1e-9)


@given(tag_lists)
@settings(max_examples=300, deadline=None)
def test_a_sequence_is_faultless_if_and_only_if_its_spans_write_it_again(tags: list[str]) -> None:
    tags = [tag if "-" in tag or tag == "O" else f"{tag}-X" for tag in tags]
    for scheme, letters in SCHEMES.items():
        fits = [tag for tag in tags if tag[0] in letters + "O"]
        found = spans.fault(fits, scheme)
        assert (found is None) == (written_as(spans.decode(fits), len(fits), scheme) == fits), (scheme, fits, found)
        lawful = written_as(spans.decode(tags), len(tags), scheme)
        assert spans.fault(lawful, scheme) is None
        assert spans.decode(lawful) == spans.decode(tags)


@given(st.lists(tag_lists, min_size=30, max_size=40), st.sampled_from(sorted(SCHEMES)))
@settings(max_examples=30, deadline=None)
def test_the_scheme_is_found_though_a_few_sentences_break_it(drawn: list[list[str]], scheme: str) -> None:
    lawful = [written_as(spans.decode(tags), len(tags), scheme) for tags in drawn]
    lawful += [written_as([("PER", 1, 3), ("PER", 3, 4)], 5, scheme)] * 8
    broken = [["O", "I-PER"]] * 3 if scheme == "BIO2" else [["O", "B-PER"]] * 3
    if any(tags != written_as(spans.decode(tags), len(tags), other) for tags in lawful for other in SCHEMES if other != scheme):
        assert spans.scheme(lawful + broken) == scheme


def test_bilou_and_bmes_are_iobes_and_tags_without_prefixes_are_plain() -> None:
    assert spans.decode(["B-A", "I-A", "L-A", "U-B"]) == spans.decode(["B-A", "M-A", "E-A", "S-B"]) == [("A", 0, 3), ("B", 3, 4)]
    assert spans.scheme([["B-A", "L-A", "O"], ["U-A"]]) == "IOBES"
    assert spans.scheme([["NOUN", "VERB", "O"]]) == "plain"
    assert spans.decode(["NOUN", "NOUN", "O"]) == [("NOUN", 0, 1), ("NOUN", 1, 2)]


# -- files ------------------------------------------------------------------------------------------------------------

tokens_of = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\n\r \0", exclude_categories=["Cs"]), min_size=1, max_size=6
)
sentences_of = st.lists(
    st.lists(st.tuples(tokens_of.filter(lambda t: t[0] not in "#-\ufeff"), st.sampled_from(TAGS)), min_size=1, max_size=5),
    min_size=1,
    max_size=6,
)


@given(sentences_of, st.sampled_from([" ", "\t", "  ", " \t "]), st.sampled_from(["\n", "\r\n"]), st.integers(0, 3), st.randoms())
@settings(max_examples=80, deadline=None)
def test_sentences_survive_a_conll_file_and_every_word_knows_its_line(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[list[tuple[str, str]]],
    gap: str,
    newline: str,
    blanks: int,
    draw: random.Random,
) -> None:
    lines: list[str] = []
    for sentence in made:
        if draw.random() < 0.3:
            lines += [f"-DOCSTART-{gap}O", ""]
        lines += [f"{token}{gap}{tag}" for token, tag in sentence] + [draw.choice(["", "  ", "\t"])] * draw.randint(1, 3)
    path = tmp_path_factory.mktemp("conll") / "f.conll"
    path.write_bytes(newline.join(lines + [""] * blanks).encode())
    table = read.read([str(path)], "data.train")
    assert table.rows == [{"tokens": [t for t, _ in s], "tags": [t for _, t in s]} for s in made]
    assert table.dropped["-DOCSTART-"] == sum(line.startswith("-DOCSTART-") for line in lines)
    for row, place in zip(table.rows, table.places, strict=True):
        for i, (token, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
            number = int(conll.line_of(place, i).rpartition(":")[2])
            assert lines[number - 1] == f"{token}{gap}{tag}"


@given(st.binary(max_size=120) | st.text(st.sampled_from("ab#- \t\n\rO"), max_size=80).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_no_bytes_crash_the_conll_reader_or_lose_a_row(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "f.conll"
    path.write_bytes(content)
    try:
        table = read.read([str(path)], "data.train", bad_rows="drop")
    except InputError as error:
        assert str(path) in str(error)
        return
    assert len(table.rows) == len(table.places) > 0
    for row in table.rows:
        assert len({len(column) for column in row.values()}) == 1


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("a O\nb O\n\nc O\nd\ne O\n", {}, "f.conll:5: 1 column where the file has 2 ('d'); its sentence is no row"),
        ("a x O\nb O\n\nc x O\n", {}, "f.conll:2: 2 columns where the file has 3"),
        ("a\tO\n\t\tO\nb\tO\n", {}, "f.conll:2: 1 column where the file has 2"),
        ("a\tx\tO\nb\t\tO\n", {}, "f.conll:2: an empty column where the file has 3"),
        ("a O\n", {"names": ["tokens", "pos", "tags"]}, "data.names has 3 names, and the file's lines have 2 columns"),
        ("-DOCSTART- O\n\n", {}, "f.conll: the file has no rows"),
        ("\n \n", {}, "f.conll: the file has no rows"),
    ],
)  # fmt: skip
def test_a_bad_conll_file_is_named_by_line(tmp_path: Path, content: str, options: Any, said: str) -> None:
    (tmp_path / "f.conll").write_text(content)
    with pytest.raises(InputError, match=re.escape(said)):
        read.read(["f.conll"], "data.train", **options)


def test_columns_between_go_by_number_or_by_name_and_comments_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("# id 1\nEU NNP B-NP B-ORG\n\n# text = a\n# b\n# NN O O\nx NN O O\n")
    first, second = read.read(["f.txt"], "k", format="conll").rows
    assert first == {"tokens": ["EU"], "2": ["NNP"], "3": ["B-NP"], "tags": ["B-ORG"]}
    assert second["tokens"] == ["#", "x"]  # a comment has not the file's columns; this line has
    assert set(read.read(["f.txt"], "k", format="conll", names=["w", "pos", "np", "ner"]).rows[0]) == {"w", "pos", "np", "ner"}


def test_tags_of_a_hub_data_set_come_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")),
                                  "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))})  # fmt: skip
    held = datasets.Dataset.from_dict({"tokens": [["Al", "Oz"], []], "ner_tags": [[1, 2], []]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held)
    assert read.read(["hub:some/names#train"], "k").rows[0] == {"tokens": ["Al", "Oz"], "ner_tags": ["B-PER", "I-PER"]}


# -- words, tokens, windows -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words of this text are one token or several (letters and ##letters), so that words differ in length."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzé,.'我北京"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), *WORDS[:20]]
    made = Tokenizer(
        models.WordPiece(
            {t: i for i, t in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]", max_input_chars_per_word=1000
        )
    )
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


ODD = [
    "good",
    "Blackburn",
    "don't",
    "a.b",
    "é",
    "我北京",
    "x" * 600,
    "New York",
    "\u200b",
    "\ufe0f",
    "\u3000",
    "\U0001f600",
    "zebra",
    "u.s.",
]


@given(st.lists(st.sampled_from(ODD), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_words_have_the_tokens_that_transformers_gives_them_and_each_has_one(tokenizer: Any, made: list[str]) -> None:
    mine = words.tokenize([made], tokenizer)[0]
    theirs = tokenizer(made, is_split_into_words=True, add_special_tokens=False)
    tokens: dict[int, list[int]] = {}
    for word, token in zip(theirs.word_ids(), theirs["input_ids"], strict=True):
        tokens.setdefault(word, []).append(token)
    for i in range(len(made)):
        assert mine.ids[mine.starts[i] : mine.starts[i + 1]].tolist() == tokens.get(i, [tokenizer.unk_token_id])
    assert len(mine.starts) == len(made) + 1


def test_byte_level_words_keep_the_space_of_pretraining() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "Ġa"])}, [("Ġ", "a")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of = PreTrainedTokenizerFast(tokenizer_object=made)
    found = words.tokenize([["a", "a", "我", "a"]], bytes_of)[0]
    assert [bytes_of.convert_ids_to_tokens(int(found.ids[i])) for i in found.starts[:-1]][1] == "Ġa"
    assert found.ids.tolist() == bytes_of("a a 我 a")["input_ids"]
    assert (np.diff(found.starts) > 0).all()


@given(st.lists(st.integers(1, 9) | st.just(40), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 20))
@settings(max_examples=300, deadline=None)
def test_windows_fit_and_score_each_word_once_where_it_has_most_context(sizes: list[int], capacity: int, stride: int) -> None:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    stride = min(stride, capacity - 1)
    made = words.windows(starts, capacity, stride)
    assert sorted(np.concatenate([w.scored for w in made]).tolist()) == list(range(len(sizes)))
    held = [min(size, capacity) for size in sizes]

    def context(window: words.Window, word: int) -> float:
        before = sum(held[window.first : word]) if window.first else np.inf
        return min(before, sum(held[word + 1 : window.last]) if window.last < len(sizes) else np.inf)

    for window in made:
        assert sum(held[window.first : window.last]) <= capacity
        for word in window.scored.tolist():
            assert window.first <= word < window.last
            assert all(context(w, word) <= context(window, word) for w in made if w.first <= word < w.last)
    for one, other in itertools.pairwise(made):
        assert one.first < other.first <= one.last < other.last
        assert sum(held[other.first : one.last]) <= stride


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["U.S.", "Peter's", "O'Neill", "3.5", "don't", "(x)", "我在", "a-b", "  "])).map(" ".join)
)
@settings(max_examples=200, deadline=None)
def test_the_words_of_a_text_are_all_of_it_but_the_spaces(text: str) -> None:
    found = words.split(text)
    assert "".join(text[a:b] for a, b in found) == "".join(c for c in text if not c.isspace())
    assert all(a < b for a, b in found)
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(found))


def test_a_text_is_parted_as_newspapers_data_are() -> None:
    text = "Peter's dog (from Saint-Denis) bit O'Neill in the U.S., for $3.50. 我在Paris。"
    parts = ["Peter", "'s", "dog", "(", "from", "Saint-Denis", ")", "bit", "O'Neill", "in", "the", "U.S.", ",", "for", "$", "3.50", ".",
             "我", "在", "Paris", "。"]  # fmt: skip
    assert [text[a:b] for a, b in words.split(text)] == parts


# -- the task ---------------------------------------------------------------------------------------------------------

NAMES = {"PER": WORDS[:5], "LOC": WORDS[5:10]}  # words that are names, and of what


def make_sentences(count: int, seed: int, longest: int = 12) -> list[dict[str, Any]]:
    """Sentences whose entities are one of a type's first words, and perhaps one of its second words."""
    draw, made = random.Random(seed), []
    for n in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        for _ in range(draw.randint(1, longest) if n else 3 * longest):
            kind = draw.choice(["O", "O", "PER", "LOC"])
            if kind == "O":
                tokens.append(draw.choice(WORDS[20:]))
                tags.append("O")
            else:
                size = draw.randint(1, 2)
                tokens += [draw.choice(NAMES[kind][:3]), draw.choice(NAMES[kind][3:])][:size]
                tags += [f"B-{kind}", f"I-{kind}"][:size]
                tokens.append("the")
                tags.append("O")
        made.append({"tokens": tokens, "tags": tags})
    return made


def as_conll(sentences: list[dict[str, Any]]) -> str:
    return "\n".join("".join(f"{a} {b}\n" for a, b in zip(s["tokens"], s["tags"], strict=True)) for s in sentences)


def fitted(made: list[dict[str, Any]], **columns: str) -> Task:
    task = Task(columns, options=Options(train="x", stride=4))
    task.fit(made, "train")
    return task


def oracle(task: Task, encoded: encode.Encoded, strength: float = 9.0) -> list[np.ndarray]:
    """Outputs of a model that knows the labels of the tokens, and is wrong about all others."""
    flat, offsets = encoded.ragged["labels"]
    made = []
    for a, b in itertools.pairwise(offsets.tolist()):
        logits = np.zeros((b - a, len(task.labels)), dtype=np.float32)
        logits[np.arange(b - a), np.where(flat[a:b] >= 0, flat[a:b], 1)] = strength
        made.append(logits)
    return made


@given(
    st.lists(st.lists(st.sampled_from(ODD), min_size=1, max_size=30), min_size=1, max_size=4), st.integers(6, 40), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_every_word_is_labelled_once_and_gold_outputs_score_full_marks(
    tokenizer: Any, made: list[list[str]], max_length: int, draw: random.Random
) -> None:
    sentences = [{"tokens": t, "tags": written_as(spans.decode(draw.choices(TAGS, k=len(t))), len(t), "BIO2")} for t in made]
    sentences += [{"tokens": ["a", "b"], "tags": ["B-PER", "O"]}]
    task = fitted(sentences)
    encoded = encode.encode(task, sentences, tokenizer, max_length, None)
    assert encoded.lengths.max() <= max_length
    labels = encoded.ragged["labels"][0]
    assert (labels >= 0).sum() == sum(len(s["tokens"]) for s in sentences) == task.items(encoded.batch(np.arange(len(encoded))))
    judged = task.judge(oracle(task, encoded), encoded, sentences)
    scores = task.compute(task.every_metric(), judged)
    entities = sum(len(spans.decode(s["tags"])) for s in sentences)
    assert scores["accuracy"] == 1
    assert {scores[name] for name in ("precision", "recall", "f1", "f1_macro", "f1_weighted")} == {1.0 if entities else 0.0}
    for s, one in zip(sentences, task.predictions(oracle(task, encoded), encoded, sentences), strict=True):
        assert one["prediction"] == s["tags"]
        assert [(e["type"], e["start"], e["end"]) for e in one["entities"]] == spans.decode(s["tags"])


def test_reported_scores_are_those_of_seqeval_on_random_outputs(tokenizer: Any, seqeval: Any) -> None:
    sentences = make_sentences(60, 1)
    task = fitted(sentences)
    encoded = encode.encode(task, sentences, tokenizer, 16, None)
    assert len(encoded) > len(sentences)
    random_outputs = np.random.default_rng(0)
    outputs = [o + random_outputs.normal(size=o.shape) for o in oracle(task, encoded, 1.5)]
    scored = evaluate.score(task, outputs, encoded, sentences, ["f1"])
    made = [one["prediction"] for one in task.predictions(outputs, encoded, sentences)]
    gold = [s["tags"] for s in sentences]
    report = evaluate.report(task, scored, ["f1", "f1_macro"], 200)
    assert 0.1 < scored.scores["f1"] < 0.9
    assert report["scores"]["f1"] == pytest.approx(seqeval.f1_score(gold, made), abs=1e-9)
    assert report["scores"]["f1_macro"] == pytest.approx(seqeval.f1_score(gold, made, average="macro"), abs=1e-9)

    def drawn(index: np.ndarray) -> dict[str, float]:
        return {"f1": seqeval.f1_score([gold[i] for i in index], [made[i] for i in index])}

    assert report["intervals"]["f1"] == pytest.approx(metrics.intervals(drawn, ["f1"], len(gold), 200)["f1"], abs=1e-9)
    labels = np.concatenate([[task.ids[t] for t in tags] for tags in gold])
    logits, _, _ = task._by_word(outputs, encoded)
    assert scored.scores["loss"] == pytest.approx(float(F.cross_entropy(torch.tensor(logits), torch.tensor(labels))), rel=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForTokenClassification

    folder = make_bert(tmp_path_factory.mktemp("tagger"), dropout=0.0)
    return AutoModelForTokenClassification.from_pretrained(folder, num_labels=5), folder


def test_accumulation_is_one_big_batch_though_micro_batches_hold_uneven_numbers_of_labels(model: Any) -> None:
    from transformers import AutoTokenizer

    net, folder = model
    sentences = make_sentences(11, 2)
    task = fitted(sentences)
    encoded = encode.encode(task, sentences, AutoTokenizer.from_pretrained(folder), 20, None)
    assert len(encoded) > len(sentences)

    def gradient(tokens: int) -> tuple[float, torch.Tensor, int]:
        windows = Windows(encoded, task.items, batch_size=len(encoded), tokens=tokens, seed=0)
        window = next(windows.epoch(0))
        net.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss = train.gradients(net, task, scaler, torch.device("cpu"), contextlib.nullcontext, window, window.items, (0, 0))
        return (
            float(loss),
            torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]),
            len(window.micro_batches),
        )

    net.train()
    whole = encoded.batch(np.arange(len(encoded)))
    net.zero_grad()
    logits = net(**{k: whole[k] for k in ("input_ids", "attention_mask")}).logits
    F.cross_entropy(logits[whole["labels"] >= 0], whole["labels"][whole["labels"] >= 0]).backward()
    reference = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for tokens, parts in ((10_000, 1), (60, 3), (1, len(encoded))):
        _, found, count = gradient(tokens)
        assert count >= parts
        assert float((found - reference).norm() / reference.norm()) < FLOAT32


def test_packed_rows_give_the_same_outputs_for_every_token(model: Any) -> None:
    from transformers import AutoTokenizer

    net, folder = model
    sentences = make_sentences(9, 3)
    task = fitted(sentences)
    encoded = encode.encode(task, sentences, AutoTokenizer.from_pretrained(folder), 20, None)
    batch = encoded.batch(np.arange(len(encoded)))
    net.eval()
    with torch.no_grad():
        padded = task.forward(net, batch)
        packer, said = packing.install(net, {k: batch[k] for k in ("input_ids", "attention_mask")})
        assert packer is not None, said
        packed = task.forward(net, batch)
        packer.remove()
    inside = batch["attention_mask"].bool()
    assert float((padded - packed)[inside].abs().max()) < 1e-5


# -- bad rows ---------------------------------------------------------------------------------------------------------

GOOD = "good B-PER\nfilm O\n\nsuperb B-LOC\nbright I-LOC\nwas O\n\n"


@pytest.mark.parametrize(
    ("train_file", "bad", "said"),
    [
        (GOOD, "the O\nsuperb I-LOC\n", "bad.conll:2: column 'tags': word 1 ('superb'): 'I-LOC' after 'O' continues no entity; in BIO2"),
        (GOOD, "the O\n\ngood B-PER\nsuperb I-LOC\n", "bad.conll:4: column 'tags': word 1 ('superb'): 'I-LOC' after 'B-PER' continues no entity"),
        (GOOD, "the O\n\ngood B-ORG\n", "bad.conll:3: column 'tags': the tag 'B-ORG' of 'good' is not in the training set; did you mean"),
        (GOOD, "the O\ngood PER\n", "bad.conll:2: column 'tags': word 1 ('good'): the tag 'PER' is neither O nor a prefix and a type"),
        ("a B-X\nb E-X\nc S-X\nd O\ne B-X\nf I-X\ng E-X\n", "a O\nb B-X\nc O\n", "bad.conll:2: column 'tags': word 1 ('b'): an entity of type X is left open by 'B-X'"),
        ("a B-X\nb E-X\nc S-X\nd O\ne B-X\nf I-X\ng E-X\n", "a O\nb E-X\n", "bad.conll:2: column 'tags': word 1 ('b'): 'E-X' continues no entity; in IOBES"),
        ("a I-X\nb I-X\nc O\n\na I-X\nb B-X\n", "a O\nb B-X\n", "bad.conll:2: column 'tags': word 1 ('b'): 'B-X' after 'O' parts no two entities; in BIO1"),
    ],
)  # fmt: skip
def test_tags_that_break_the_scheme_are_named_by_their_line(
    bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], train_file: str, bad: str, said: str
) -> None:
    (tmp_path / "train.conll").write_text(train_file)
    (tmp_path / "bad.conll").write_text(bad)
    (tmp_path / "r.yaml").write_text(
        f"task: token_classification\nmodel: {{name: {bert}}}\ndata: {{train: train.conll, validation: bad.conll, max_length: 32}}\n"
    )
    assert main(["check", "r.yaml"]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert "1 of " in error
    assert "data.bad_rows=drop" in error


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "misaligned tags", "2 words and 1 tags"), ({"tokens": "a b", "tags": ["O"]}, "tokens are no list", "holds a str"),
        ({"tokens": [], "tags": []}, "no words", "empty list"), ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word is no text", "word 1 is empty"),
        ({"tokens": ["a", 7], "tags": ["O", "O"]}, "word is no text", "word 1 is a int"), ({"tokens": ["a", None], "tags": ["O", "O"]}, "word is no text", "word 1 is a NoneType"),
        ({"tokens": ["a"], "tags": "O"}, "missing tags", "holds a str"), ({"tokens": ["a"]}, "missing tags", "missing or null"), ({"tags": ["O"]}, "missing tokens", "missing or null"),
        ({"tokens": ["a"], "tags": [None]}, "missing tag", "has no tag"), ({"tokens": ["a"], "tags": [["O"]]}, "missing tag", "has no tag"),
        ({"tokens": ["a"], "tags": ["I-PER"]}, "tags break BIO2", "after the beginning"), ({"tokens": ["a\ud800"], "tags": ["O"]}, "word is no text", "surrogate"),
    ],
)  # fmt: skip
def test_bad_rows_of_a_json_file_are_named_or_counted(row: dict[str, Any], reason: str, said: str) -> None:
    good = make_sentences(5, 0)
    task = fitted(good)
    table = read.Table([*good, row], [f"f.jsonl:{i}" for i in range(1, 7)], {})
    with pytest.raises(InputError, match=rf"f.jsonl:6: .*{re.escape(said)}"):
        rows.clean(table, task, "error")
    split = rows.clean(table, task, "drop")
    assert (split.read, len(split), dict(split.dropped)) == (6, 5, {reason: 1})


def test_a_tag_that_stands_in_broken_rows_alone_is_no_tag_and_numbers_go_by_the_names_given() -> None:
    task = fitted([*make_sentences(9, 0), {"tokens": ["a"], "tags": ["B_PER"]}, {"tokens": ["a"], "tags": ["I-ORG"]}])
    assert task.labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    numbered = Task({}, ["O", "B-PER", "I-PER"], Options(train="x"))
    numbered.fit([{"tokens": ["a", "b", "c"], "tags": [1, 2, 0]}], "train")
    assert numbered.gold({"tags": [1, 2, 0]}) == ["B-PER", "I-PER", "O"]
    assert numbered.scheme == "BIO2"
    taking_all = Task({}, options=Options(train="x", scheme="any"))
    taking_all.fit([{"tokens": ["a", "b"], "tags": ["O", "I-PER"]}], "train")
    assert taking_all.problem({"tokens": ["a", "b"], "tags": ["O", "I-PER"]}) is None
    assert "1 = B-LOC" in str(task.adapt([{"tokens": ["a"], "tags": [1]}]))


# -- a run from end to end --------------------------------------------------------------------------------------------

RUN = """task: token_classification
model: {{name: {model}}}
data: {{train: train.conll, validation: 0.2, test: test.jsonl, max_length: 16, stride: 6}}
train: {{epochs: 6, batch_size: 8, learning_rate: 1e-2}}
evaluate: {{bootstrap: 50}}
early_stopping: {{monitor: f1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ner")
    model = make_bert(folder / "bert")
    (folder / "train.conll").write_text("-DOCSTART- O\n\n" + as_conll(make_sentences(90, 1)) + "\n\n \n")
    hostile = {"tokens": ["<b>", "superb", "x" * 600, "我"], "tags": ["B-PER", "B-LOC", "O", "O"]}
    write_jsonl(folder / "test.jsonl", [*make_sentences(25, 2), hostile, {"tokens": ["the"], "tags": ["O"]}])
    (folder / "r.yaml").write_text(RUN.format(model=model))
    with contextlib.chdir(folder):
        result = finetune(recipes.load("r.yaml"), "out", say=lambda line: None)
    assert result.metrics["test"]["f1"] > 0.9, result.metrics["test"]
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_run_folder_holds_what_seqeval_would_say(run: Path, seqeval: Any) -> None:
    results = json.loads((run / "out" / "metrics.json").read_text())
    assert results["test"]["f1"] < 1  # the names in markup cannot be known
    for split in ("validation", "test"):
        lines = lines_of(run / "out" / "predictions" / f"{split}.jsonl")
        gold, made = [line["label"] for line in lines], [line["prediction"] for line in lines]
        assert results[split]["f1"] == pytest.approx(seqeval.f1_score(gold, made), abs=1e-9)
        assert results[split]["accuracy"] == pytest.approx(seqeval.accuracy_score(gold, made), abs=1e-9)
        low, high = results["intervals"][split]["f1"]
        assert low <= results[split]["f1"] <= high
        for line in lines:
            assert line["label"] == line["tags"]
            assert [(e["type"], e["start"], e["end"]) for e in line["entities"]] == spans.decode(line["prediction"])
            for e in line["entities"]:
                assert e["text"] == join(line["tokens"][e["start"] : e["end"]])[0]
                assert 0 < e["score"] <= 1
    assert lines_of(run / "test.jsonl") == [
        {"tokens": line["tokens"], "tags": line["tags"]} for line in lines_of(run / "out" / "predictions" / "test.jsonl")
    ]
    data = next(json.loads(line) for line in (run / "out" / "log.jsonl").read_text().splitlines())["splits"]
    assert data["train"]["dropped"] == {"-DOCSTART-": 1}
    assert data["train"]["rows_read"] == data["train"]["rows_used"] + 1


def test_the_report_marks_entities_and_escapes_the_text(run: Path) -> None:
    page = (run / "out" / "report.html").read_text("utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>superb" not in page
    assert '<mark class="good">' in page
    assert '<mark class="missed">' in page
    assert "Each type of entity" in page
    assert (run / "out" / "plots" / "confusion.png").stat().st_size > 1000


def test_evaluate_scores_the_run_anew_and_holds_gold_tags_to_the_scheme_of_train(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert main(["evaluate", "out", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    results = json.loads((run / "out" / "metrics.json").read_text())
    assert found["scores"]["f1"] == results["test"]["f1"]
    assert found["detail"] == results["detail"]["test"]
    assert main(["evaluate", "out"]) == 0
    assert re.search(r"PER +\d\.\d{4} +\d\.\d{4}", capfd.readouterr().out)
    Path("bad.conll").write_text("the O\ngood I-PER\n")
    assert main(["evaluate", "out", "--data", "bad.conll"]) == 2
    assert "bad.conll:2: column 'tags': word 1 ('good')" in capfd.readouterr().err


def test_predict_covers_every_word_of_tokens_and_gives_characters_of_texts(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    text = "  the good lovely, film " * 9
    odd = ["the", "x" * 600, "我在北京 good.", "\u200b", "good\r\n\r\n"]
    assert main(["predict", "out", *(a for t in (text, *odd) for a in ("--text", t))]) == 0
    first, *others = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["text"] for line in others] == odd
    assert first["tokens"] == ["the", "good", "lovely", ",", "film"] * 9  # more than one window
    write_jsonl(Path("in.jsonl"), [{"tokens": first["tokens"]}])
    assert main(["predict", "out", "--input", "in.jsonl"]) == 0
    same = json.loads(capfd.readouterr().out)
    assert same["label"] == first["label"]
    places = words.split(text)
    assert len(same["entities"]) >= 9
    for by_word, by_character in zip(same["entities"], first["entities"], strict=True):
        assert by_character["start"] == places[by_word["start"]][0]
        assert by_character["end"] == places[by_word["end"] - 1][1]
        assert text[by_character["start"] : by_character["end"]] == by_character["text"]
        assert (by_word["type"], by_word["score"]) == (by_character["type"], by_character["score"])
    Path("in.conll").write_text("the\r\ngood\r\n\r\nfilm\r\n\r\n\r\n")
    assert main(["predict", "out", "--input", "in.conll"]) == 0
    first, second = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert first["label"] == ["O", "B-PER"]
    assert [(e["start"], e["end"], e["text"]) for e in first["entities"]] == [(1, 2, "good")]
    assert second == {"tokens": ["film"], "label": ["O"], "entities": []}
    write_jsonl(Path("in.jsonl"), [{"text": "the good film", "id": 7}])
    assert main(["predict", "out", "--input", "in.jsonl"]) == 0
    assert json.loads(capfd.readouterr().out)["id"] == 7
    write_jsonl(Path("in.jsonl"), [{"txt": "the good film"}])
    assert main(["predict", "out", "--input", "in.jsonl"]) == 2
    assert "has no column 'tokens'" in capfd.readouterr().err


def test_the_saved_model_works_in_transformers_pipeline_and_agrees(run: Path) -> None:
    from transformers import pipeline

    tagger = pipeline("token-classification", model=str(run / "out" / "model"), aggregation_strategy="simple", device="cpu")
    assert set(tagger.model.config.label2id) == {"O", "B-PER", "I-PER", "B-LOC", "I-LOC"}
    agreed = 0
    for line in lines_of(run / "out" / "predictions" / "test.jsonl"):
        if len(line["tokens"]) <= 14 and "我" not in line["tokens"]:
            text, places = join(line["tokens"])
            theirs = [(e["entity_group"], e["start"], e["end"]) for e in tagger(text)]
            assert theirs == [(e["type"], places[e["start"]][0], places[e["end"] - 1][1]) for e in line["entities"]]
            agreed += len(theirs)
    assert agreed > 10


# -- data of the project, and real ones -------------------------------------------------------------------------------


def test_the_recipe_s_own_sentences_are_clean_and_stand_in_one_split() -> None:
    folder, texts = find.PROJECT / "recipes" / "data" / "ner", []
    kinds = {}
    for name, count in (("train", 299), ("validation", 60), ("test", 60)):
        table = read.read([str(folder / f"{name}.conll")], "k")
        assert len(table) == count
        assert spans.scheme(r["tags"] for r in table.rows) == "BIO2"
        assert not [r for r in table.rows if spans.fault(r["tags"], "BIO2")]
        kinds[name] = spans.types(tag for r in table.rows for tag in r["tags"])
        texts += [" ".join(r["tokens"]) for r in table.rows]
    assert set(map(tuple, kinds.values())) == {("LOC", "MISC", "ORG", "PER")}
    assert len(set(texts)) == len(texts)


@pytest.mark.skipif(not (SHARED / "data" / "conll2003").exists(), reason="the real data are not here")
def test_conll_2003_is_read_whole_and_its_few_broken_sentences_are_found(seqeval: Any) -> None:
    for name, sentences, documents in (("dev", 3250, 0), ("test", 3453, 230)):
        table = read.read([str(SHARED / "data" / "conll2003" / f"{name}.txt")], "k", format="conll")
        assert (len(table), table.dropped["-DOCSTART-"]) == (sentences, documents)
        tags = [r["tags"] for r in table.rows]
        assert spans.scheme(tags) == "BIO2"
        broken = [t for t in tags if spans.fault(t, "BIO2")]
        assert 0 < len(broken) < 0.02 * len(tags)
        assert all(
            any(tag[0] == "I" and spans.parse(before)[1] != tag[2:] for before, tag in zip(["O", *t], t, strict=False))
            for t in broken
        )
        scores = spans.scores(spans.counts(tags, tags, spans.types(tag for t in tags for tag in t)).sum(axis=0))
        assert scores["f1"] == seqeval.f1_score(tags, tags) == 1
