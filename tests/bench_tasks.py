"""Every task side by side with transformers' Trainer: who scores what, in what time.

    make bench-tasks                                    every row (some 1 h 45 min on 2 free cores, added up from three calls; 20 min pre-train)
    make bench-tasks ARGS="--only stsb,conll2003"       some
    make bench-tasks ARGS="--rows 64"                   a rehearsal, 64 rows of each file; --rows 2000 takes some 30 minutes (estimated)

Same model, rows, epochs, batch, learning rate, length, float32, no accumulation. Each side is a process of its own, from its
start to its end, and the two of a row run one after the other. Trainer is used as its documentation shows for the task, with
padding to the longest of a batch, which is the faster of the ways it shows. The engine does what it always does besides:
checkpoints, 1,000 bootstrap resamples, predictions, the report. Both sides' predictions are scored by the engine's metrics.

    better    the engine's score is above Trainer's, and Trainer's lies outside the engine's 95 % bootstrap interval
    equal     Trainer's score lies in that interval
    WORSE     below, and outside

Needs ../shared/data (not part of the project). Prints a markdown table, writes OUT/tasks.json and OUT/tasks.md.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"
MINILM = "name: sentence-transformers/all-MiniLM-L6-v2"
GPT2 = (
    "from_scratch: {architecture: gpt2, layers: 4, hidden: 256, heads: 4, max_positions: 128}, "
    f"tokenizer: {SHARED}/weights/gpt2_tokenizer"
)
BERT = (
    "from_scratch: {architecture: bert, layers: 4, hidden: 256, heads: 4, max_positions: 128}, "
    "tokenizer: {train: {kind: wordpiece, vocabulary: 4000, lowercase: true}}"
)
PRETRAINED = "pretraining/model"  # in the row's folder, where a row pre-trains
Rows = list[dict[str, Any]]


@dataclass
class Job:
    """One row of the table."""

    task: str
    metric: str
    read: Callable[[], tuple[Rows, Rows]]  # train, dev; the columns have the engine's own names
    rows: int  # of train, at the most
    epochs: int
    batch: int
    rate: float
    length: int
    model: str = MINILM
    columns: str = ""
    data: str = ""  # other keys of the recipe's `data`
    pretrain: int = 0  # passes of masked_lm over train's own texts, by the engine; both sides begin from what it made

    @property
    def scratch(self) -> bool:
        """Whether both sides begin from random weights."""
        return self.model != MINILM and not self.pretrain


def _table(path: str, names: list[str] | None = None, delimiter: str = "\t") -> Iterator[dict[str, str]]:
    with (DATA / path).open(encoding="utf-8", newline="") as file:
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        yield from csv.DictReader(file, names, delimiter=delimiter, quoting=quoting)


def _classes(path: str, text: str, label: str, pair: str = "", **how: Any) -> Rows:
    """Rows of a text, or a pair, with a label; those without a text are left out."""
    made = []
    for row in _table(path, **how):
        if row[text] and row[text].strip():
            made.append({"text": row[text], **({"text_pair": row[pair]} if pair else {}), "label": row[label]})
    return made


def sst2() -> tuple[Rows, Rows]:
    return _classes("sst2/train.tsv", "sentence", "label"), _classes("sst2/dev.tsv", "sentence", "label")


def tweets() -> tuple[Rows, Rows]:
    return tuple(_classes(f"tweet_sentiment/{name}.csv", "text", "sentiment", delimiter=",") for name in ("train", "test"))  # type: ignore[return-value]


def cola() -> tuple[Rows, Rows]:
    names = ["source", "label", "star", "sentence"]
    return tuple(_classes(f"cola/in_domain_{name}.tsv", "sentence", "label", names=names) for name in ("train", "dev"))  # type: ignore[return-value]


def mrpc() -> tuple[Rows, Rows]:
    return tuple(
        _classes(f"mrpc/{name}.tsv", "#1 String", "\ufeffQuality" if _marked(f"mrpc/{name}.tsv") else "Quality", "#2 String")
        for name in ("train", "test")
    )  # type: ignore[return-value]


def _marked(path: str) -> bool:
    """Whether a file begins with a byte order mark."""
    return (DATA / path).read_bytes().startswith(b"\xef\xbb\xbf")


def rte() -> tuple[Rows, Rows]:
    return tuple(_classes(f"rte/{name}.tsv", "sentence1", "label", "sentence2") for name in ("train", "dev"))  # type: ignore[return-value]


def stsb() -> tuple[Rows, Rows]:
    names = ["genre", "file", "year", "id", "score", "text", "text_pair"]
    return tuple(
        [
            {"text": r["text"], "text_pair": r["text_pair"], "score": float(r["score"])}
            for r in _table(f"stsb/sts-{name}.csv", names)
        ]
        for name in ("train", "dev")
    )  # type: ignore[return-value]


def conll2003() -> tuple[Rows, Rows]:
    def sentences(name: str) -> Rows:
        blocks = (DATA / "conll2003" / name).read_text("utf-8").split("\n\n")
        pairs = [[line.split() for line in block.splitlines() if line.strip()] for block in blocks]
        return [
            {"tokens": [p[0] for p in one], "tags": [p[-1] for p in one]} for one in pairs if one and one[0][0] != "-DOCSTART-"
        ]

    return sentences("train.txt"), sentences(
        "dev.txt"
    )  # some 200 of its entities begin with I- after O: scheme "any", as seqeval reads


def xquad() -> tuple[Rows, Rows]:
    """Its English part, the last 8 of 48 articles held out: no context stands in both."""
    articles = json.loads((DATA / "xquad/xquad.en.json").read_text("utf-8"))["data"]
    parts: list[Rows] = []
    for some in (articles[:-8], articles[-8:]):
        rows = []
        for paragraph in (p for article in some for p in article["paragraphs"]):
            for qa in paragraph["qas"]:
                given = {key: [a[key] for a in qa["answers"]] for key in ("text", "answer_start")}
                rows.append({"question": qa["question"], "context": paragraph["context"], "answers": given})
        parts.append(rows)
    return parts[0], parts[1]


def waimai() -> tuple[Rows, Rows]:
    """Chinese reviews of deliveries, a tenth held out."""
    rows = _classes("waimai_10k/waimai_10k.csv", "review", "label", delimiter=",")
    random.Random(13).shuffle(rows)
    return rows[len(rows) // 10 :], rows[: len(rows) // 10]


TAGS = ["O", *(f"{prefix}-{kind}" for kind in ("LOC", "MISC", "ORG", "PER") for prefix in "BI")]
PAIR = "{text: text, text_pair: text_pair, label: label}"
JOBS = {
    "sst2": Job("classification", "accuracy", sst2, 10_000, 1, 32, 5e-5, 64),
    "tweet_sentiment": Job("classification", "accuracy", tweets, 10_000, 2, 32, 5e-4, 64, GPT2),
    "stsb": Job("regression", "spearman", stsb, 5_749, 4, 16, 1e-4, 96, columns="{text: text, text_pair: text_pair, score: score}"),
    "mrpc": Job("classification", "f1", mrpc, 4_076, 2, 16, 5e-5, 128, columns=PAIR),
    "rte": Job("classification", "accuracy", rte, 2_490, 2, 16, 5e-5, 128, columns=PAIR),
    "cola": Job("classification", "matthews_corrcoef", cola, 8_551, 2, 32, 5e-5, 48),
    "conll2003": Job("token_classification", "f1", conll2003, 14_041, 2, 16, 2e-4, 128,
                     data=f"scheme: any, labels: [{', '.join(TAGS)}]"),
    "xquad": Job("question_answering", "f1", xquad, 1_000, 2, 16, 1e-4, 384),
    "waimai_10k": Job("classification", "accuracy", waimai, 10_800, 3, 32, 5e-4, 96, BERT),
    "waimai_pretrained": Job("classification", "accuracy", waimai, 10_800, 3, 32, 2e-4, 96, BERT, pretrain=40),
}  # fmt: skip
SHARING = ("cola", "mrpc", "rte", "stsb")  # what multitask trains together


# -- the engine's side ------------------------------------------------------------------------------------------------


def pretraining_of(job: Job, folder: Path) -> str:
    """The recipe that pre-trains a row's model from scratch, on the texts of train alone."""
    return f"""task: masked_lm
seed: 13
model: {{{job.model}}}
data: {{train: {folder}/train.jsonl, validation: 0.02, max_length: {job.length}, columns: {{text: text}}}}
train: {{epochs: {job.pretrain}, batch_size: 64, learning_rate: 1e-3, warmup: 0.1, dropout: pool}}
"""


def recipe_of(job: Job, folder: Path) -> str:
    """The recipe of a row, with everything that both sides must agree on."""
    model = f"name: {folder}/{PRETRAINED}" if job.pretrain else job.model
    columns = (f", columns: {job.columns}" if job.columns else "") + (f", {job.data}" if job.data else "")
    return f"""task: {job.task}
seed: 13
model: {{{model}}}
data: {{train: {folder}/train.jsonl, test: {folder}/dev.jsonl, max_length: {job.length}{columns}}}
train: {{epochs: {job.epochs}, batch_size: {job.batch}, learning_rate: {job.rate}, warmup: 0.06, weight_decay: 0.01}}
evaluate: {{metrics: [{job.metric}]}}
"""


def multitask_recipe(out: Path) -> str:
    """The tasks of SHARING on one encoder, by their own files; as many passes as the longest of them has."""
    parts = []
    for name in SHARING:
        job = JOBS[name]
        columns = f", columns: {job.columns}" if job.columns else ""
        data = f"{{train: {out}/{name}/train.jsonl, test: {out}/{name}/dev.jsonl{columns}}}"
        parts.append(f"  {name}: {{task: {job.task}, metrics: [{job.metric}], data: {data}}}")
    return f"""task: multitask
seed: 13
model: {{{MINILM}}}
data: {{max_length: 128}}
tasks:
{chr(10).join(parts)}
train: {{epochs: 2, batch_size: 16, learning_rate: 1e-4, warmup: 0.06, weight_decay: 0.01}}
"""


def finetuned(recipe: Path, out: str) -> float:
    """The whole verb as a person would type it, its run beside the recipe; returns its seconds."""
    verb = [sys.executable, "-m", "engine", "finetune", str(recipe), f"data.cache={recipe.parent}/cache"]
    return _timed([*verb, "--out", str(recipe.parent / out)], recipe.parent)


def engine(folder: Path) -> dict[str, Any]:
    """The engine's run of a row; the score is read from the run folder afterwards."""
    seconds = finetuned(folder / "recipe.yaml", "run")
    results = json.loads((folder / "run/metrics.json").read_text("utf-8"))
    return {"seconds": seconds, "scores": results["test"], "intervals": results["intervals"]["test"], "steps": results["steps"]}


# -- Trainer's side ---------------------------------------------------------------------------------------------------


def trainer(name: str, folder: Path) -> dict[str, Any]:
    """transformers' Trainer by its documentation; returns {metric: score, "steps": n}."""
    import transformers
    from datasets import Dataset

    from engine import models

    job = JOBS[name]
    train, dev = (Dataset.from_list(_rows(folder / f"{split}.jsonl")) for split in ("train", "dev"))
    if job.model == MINILM:
        source = models.find(models.EMBEDDED, None, True, "bench").folder
    else:
        source = folder / (PRETRAINED if job.pretrain else "run/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def model_of(kind: Any, **options: Any) -> Any:
        """The pretrained body with a fresh head; of a model from scratch the same architecture, with weights of its own."""
        transformers.set_seed(13)
        if not job.scratch:
            return kind.from_pretrained(source, **options)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        config.pad_token_id = tokenizer.pad_token_id
        return kind.from_config(config)

    side = {"classification": _classify, "regression": _regress, "token_classification": _tag, "question_answering": _answer}
    model, encode, collator, score = side[job.task](job, tokenizer, train, dev, model_of)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=job.batch, per_device_eval_batch_size=64,
        num_train_epochs=job.epochs, learning_rate=job.rate, warmup_steps=0.06, weight_decay=0.01, seed=13, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    encoded = {
        split: data.map(encode, batched=True, remove_columns=data.column_names)
        for split, data in (("train", train), ("dev", dev))
    }
    unused = [column for column in ("offset_mapping", "row") if column in encoded["train"].column_names]
    run = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"].remove_columns(unused),
        processing_class=tokenizer,
        data_collator=collator,
    )
    run.train()
    predicted = run.predict(encoded["dev"].remove_columns(unused))
    return {job.metric: score(predicted.predictions, encoded["dev"]), "steps": run.state.global_step}


def _texts(batch: dict[str, list[Any]]) -> list[list[str]]:
    return [batch["text"], batch["text_pair"]] if "text_pair" in batch else [batch["text"]]


def _classify(job: Job, tokenizer: Any, train: Any, dev: Any, model_of: Any) -> tuple[Any, ...]:
    import numpy as np
    import transformers

    from engine import metrics

    ids = {label: i for i, label in enumerate(sorted(set(train["label"])))}
    model = model_of(transformers.AutoModelForSequenceClassification, num_labels=len(ids))

    def encode(batch: Any) -> Any:
        made = tokenizer(*_texts(batch), truncation=True, max_length=job.length)
        return {**made, "labels": [ids[label] for label in batch["label"]]}

    def score(logits: Any, encoded: Any) -> float:
        q = np.exp(logits - logits.max(1, keepdims=True))
        arrays = (np.array(encoded["labels"]), logits.argmax(1), q / q.sum(1, keepdims=True))
        return metrics.compute(metrics.CLASSIFICATION, [job.metric], arrays)[job.metric]

    return model, encode, transformers.DataCollatorWithPadding(tokenizer), score


def _regress(job: Job, tokenizer: Any, train: Any, dev: Any, model_of: Any) -> tuple[Any, ...]:
    import numpy as np
    import transformers

    from engine import metrics

    model = model_of(transformers.AutoModelForSequenceClassification, num_labels=1, problem_type="regression")

    def encode(batch: Any) -> Any:
        return {**tokenizer(*_texts(batch), truncation=True, max_length=job.length), "labels": batch["score"]}

    def score(logits: Any, encoded: Any) -> float:
        arrays = (np.array(encoded["labels"]), logits[:, 0].astype(np.float64))
        return metrics.compute(metrics.REGRESSION, [job.metric], arrays)[job.metric]

    return model, encode, transformers.DataCollatorWithPadding(tokenizer), score


def _tag(job: Job, tokenizer: Any, train: Any, dev: Any, model_of: Any) -> tuple[Any, ...]:
    import transformers

    from engine import spans

    ids = {tag: i for i, tag in enumerate(TAGS)}
    model = model_of(transformers.AutoModelForTokenClassification, num_labels=len(TAGS))

    def encode(batch: Any) -> Any:
        made = tokenizer(batch["tokens"], truncation=True, max_length=job.length, is_split_into_words=True)
        made["labels"] = []
        for i, tags in enumerate(batch["tags"]):
            words = made.word_ids(batch_index=i)  # a word's first piece is labelled
            firsts = [w is not None and (j == 0 or words[j - 1] != w) for j, w in enumerate(words)]
            made["labels"].append([ids[tags[w]] if first else -100 for w, first in zip(words, firsts, strict=True)])
        return made

    def score(logits: Any, encoded: Any) -> float:
        gold, made = dev["tags"], []
        for tags, labels, one in zip(gold, encoded["labels"], logits.argmax(2), strict=True):
            answered = [TAGS[k] for k, label in zip(one, labels, strict=False) if label != -100]
            made.append(answered + ["O"] * (len(tags) - len(answered)))  # of words beyond the length
        kinds = spans.types({tag for tags in [*gold, *made] for tag in tags})
        return float(spans.scores(spans.counts(gold, made, kinds).sum(axis=0))[job.metric])

    return model, encode, transformers.DataCollatorForTokenClassification(tokenizer), score


def _answer(job: Job, tokenizer: Any, train: Any, dev: Any, model_of: Any) -> tuple[Any, ...]:
    import numpy as np
    import transformers

    from engine.tasks import _squad

    model = model_of(transformers.AutoModelForQuestionAnswering)

    def encode(batch: Any) -> Any:
        made = tokenizer(
            [q.strip() for q in batch["question"]], batch["context"], truncation="only_second", max_length=job.length,
            stride=job.length // 4, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        rows = made.pop("overflow_to_sample_mapping")
        made |= {"row": rows, "start_positions": [], "end_positions": []}
        for i, row in enumerate(rows):
            text, begin = (batch["answers"][row][key][0] for key in ("text", "answer_start"))
            inside = [j for j, part in enumerate(made.sequence_ids(i)) if part == 1]
            offsets = made["offset_mapping"][i]
            start = [j for j in inside if offsets[j][0] <= begin < offsets[j][1]]
            end = [j for j in inside if offsets[j][0] < begin + len(text) <= offsets[j][1]]
            made["start_positions"].append(start[0] if start and end else 0)
            made["end_positions"].append(end[0] if start and end else 0)
            made["offset_mapping"][i] = [list(o) if j in set(inside) else [-1, -1] for j, o in enumerate(offsets)]
        return dict(made)

    def score(logits: Any, encoded: Any) -> float:
        """The best of start + end over the 20 likeliest of both in each window, 30 tokens at the most; then SQuAD's F1."""
        # `row` counts within a batch of `map`: 1,000 rows
        assert len(dev) <= 1000
        best: dict[int, tuple[float, str]] = {}
        for row, offsets, start, end in zip(encoded["row"], encoded["offset_mapping"], *logits, strict=True):
            usable = [j for j, o in enumerate(offsets) if o[0] >= 0]
            starts, ends = (sorted(usable, key=lambda j: -one[j])[:20] for one in (start, end))
            for s in starts:
                for e in ends:
                    if s <= e < s + 30 and start[s] + end[e] > best.get(row, (-np.inf, ""))[0]:
                        best[row] = (float(start[s] + end[e]), dev[row]["context"][offsets[s][0] : offsets[e][1]])
        both = [
            _squad.against(best.get(i, (0, ""))[1], row["answers"]["text"], _squad.without_spaces(row["context"]))
            for i, row in enumerate(dev)
        ]
        return 100 * float(np.mean([f1 if job.metric == "f1" else exact for exact, f1 in both]))

    return model, encode, transformers.DataCollatorWithPadding(tokenizer), score


# -- the table --------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _timed(command: list[str], folder: Path) -> float:
    """Wall time of a whole process; its output goes to a file, and is shown if it fails."""
    said = folder / f"{Path(command[-1]).name}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "HF_DATASETS_CACHE": str(folder / "datasets")}  # fmt: skip
    with said.open("wb") as file:
        start = time.perf_counter()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment).returncode
        seconds = time.perf_counter() - start
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{said.read_text('utf-8', 'replace')[-3000:]}")
    return round(seconds, 1)


def verdict(mine: float, theirs: float, low: float, high: float) -> str:
    """A difference counts only outside the interval."""
    if low <= theirs <= high:
        return "equal within the interval"
    return "better" if mine > theirs else "WORSE"


def prepare(name: str, out: Path, limit: int | None) -> tuple[Path, dict[str, Any]]:
    """The rows and the recipe of one row of the table, as files that both sides read."""
    job, folder = JOBS[name], out / name
    folder.mkdir(parents=True)
    train, dev = job.read()
    random.Random(13).shuffle(train)
    train, dev = train[: min(job.rows, limit or job.rows)], dev[: limit or len(dev)]
    for split, rows in (("train", train), ("dev", dev)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    (folder / "recipe.yaml").write_text(recipe_of(job, folder), "utf-8")
    if job.pretrain:
        (folder / "pretrain.yaml").write_text(pretraining_of(job, folder), "utf-8")
    fact: dict[str, Any] = {"task": job.task, "metric": job.metric, "train": len(train), "dev": len(dev), "epochs": job.epochs}
    if job.task == "classification" and job.metric == "accuracy":
        counts = [sum(r["label"] == label for r in dev) for label in {r["label"] for r in dev}]
        fact["majority"] = max(counts) / len(dev)
    return folder, fact


def compare(name: str, out: Path, limit: int | None, first: str) -> dict[str, Any]:
    """One row: both sides, one after the other."""
    folder, fact = prepare(name, out, limit)
    job, sides = JOBS[name], {}
    if job.pretrain:
        fact["pretraining_seconds"] = finetuned(folder / "pretrain.yaml", str(Path(PRETRAINED).parent))
    order = ["engine", "trainer"] if job.scratch or first == "engine" else ["trainer", "engine"]
    for side in order:  # a model from scratch is the engine's first: Trainer takes its tokenizer and architecture
        if side == "engine":
            sides[side] = engine(folder)
        else:
            seconds = _timed([sys.executable, __file__, "--side", name, "--out", str(out), str(folder / "trainer.json")], folder)
            sides[side] = {"seconds": seconds, **json.loads((folder / "trainer.json").read_text("utf-8"))}
    mine, theirs = sides["engine"]["scores"][job.metric], sides["trainer"][job.metric]
    low, high = sides["engine"]["intervals"][job.metric]
    times = {side: sides[side]["seconds"] for side in sides}
    assert sides["engine"]["steps"] == sides["trainer"]["steps"] or job.task == "question_answering", (
        f"{name}: not the same steps"
    )
    return {**fact, "engine": mine, "interval": [low, high], "trainer": theirs, "seconds": times, "first": order[0],
            "ratio": times["trainer"] / times["engine"], "verdict": verdict(mine, theirs, low, high)}  # fmt: skip


def together(out: Path, done: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Multitask against the single runs of the same tasks, all by the engine: means of the scores, total times."""
    folder = out / "multitask"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(multitask_recipe(out), "utf-8")
    made = engine(folder)
    each = {name: made["scores"][f"{name}.{JOBS[name].metric}"] for name in SHARING}
    single = {name: done[name]["engine"] for name in SHARING}
    return {"task": "multitask", "scores": each, "single": single, "mean": sum(each.values()) / len(each), "single_mean": sum(single.values()) / len(single),
            "seconds": made["seconds"], "single_seconds": sum(done[name]["seconds"]["engine"] for name in SHARING)}  # fmt: skip


def markdown(done: dict[str, Any]) -> str:
    """The results as a table."""
    lines = ["| data | task | train rows x epochs | metric | engine | 95 % interval | Trainer | verdict | engine, s | Trainer, s | ratio |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in done.items():
        if name == "multitask":
            continue
        digits = 1 if r["task"] == "question_answering" else 3
        low, high = r["interval"]
        lines.append(
            f"| {name} | {r['task']} | {r['train']:,} x {r['epochs']} | {r['metric']} | {r['engine']:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} "
            f"| {r['trainer']:.{digits}f} | {r['verdict']} | {r['seconds']['engine']:.0f} | {r['seconds']['trainer']:.0f} | {r['ratio']:.2f} |"
        )
    for name, r in done.items():
        if JOBS.get(name) and JOBS[name].model == BERT:  # a language that the model learns from these rows alone
            above = 100 * (r["engine"] - r["majority"])
            lines += ["", f"{name}: the majority class has {r['majority']:.3f}; the engine lies {above:.1f} points from it."]
            if JOBS[name].pretrain:
                lines[-1] += f" Pre-trained by the engine on the same texts ({JOBS[name].pretrain} passes) in {r['pretraining_seconds']:.0f} s."
    if "multitask" in done:
        r = done["multitask"]
        lines += ["", f"multitask ({', '.join(SHARING)} on one encoder): mean score {r['mean']:.3f} in {r['seconds']:.0f} s; "
                      f"the single runs: {r['single_mean']:.3f} in {r['single_seconds']:.0f} s."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Every row that was asked for; the table grows on the disk, so a stopped bench has what it measured."""
    from engine import find

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    every = [*JOBS, *(["multitask"] if "multitask" in find.names("tasks") else [])]
    parser.add_argument("--only", default=",".join(every), help=f"some of {','.join(every)}")
    parser.add_argument("--rows", type=int, help="no more rows of train than this (and of dev)")
    parser.add_argument("--out", default="runs/bench-tasks")
    parser.add_argument("--side", choices=JOBS, help=argparse.SUPPRESS)  # Trainer's process
    parser.add_argument("result", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = Path(options.out).resolve()
    if options.side:
        Path(options.result).write_text(json.dumps(trainer(options.side, base / options.side)), "utf-8")
        return 0
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(every)):
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(every)}")
    if "multitask" in chosen and (needed := [name for name in SHARING if name not in chosen]):
        parser.error(f"--only: multitask is compared with the single runs; name {', '.join(needed)} too")
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return 0
    out, done = base / time.strftime("%Y%m%d-%H%M%S"), {}
    out.mkdir(parents=True)
    for i, name in enumerate(sorted(chosen, key=every.index)):
        done[name] = (
            together(out, done, options.rows)
            if name == "multitask"
            else compare(name, out, options.rows, ("engine", "trainer")[i % 2])
        )
        print(f"{name:<16} {json.dumps(done[name])}", flush=True)
        (out / "tasks.json").write_text(json.dumps({"rows": options.rows, "results": done}, indent=2) + "\n", "utf-8")
        (out / "tasks.md").write_text(markdown(done), "utf-8")
    print(f"\n{markdown(done)}\nwritten to {out}/tasks.json and tasks.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
