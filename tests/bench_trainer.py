"""Side by side with transformers' Trainer: same model, rows, epochs, batch and learning rate; who scores what, in what time.

    make bench-trainer                       20,000 rows of SST-2, one epoch, in one process after the other
    make bench-trainer ARGS="--seeds 3 --kinds float32 bfloat16"     three seeds, and both in bfloat16 too
    make bench-trainer ARGS="--seeds 5 --kinds frozen --rows 5000 --epochs 3"     5 of 6 blocks frozen: their cached states here
    make bench-trainer ARGS=--table          the README's table from the last results

A seed decides the new head's weights, the order of rows and the dropout of either side. Needs the SST-2 files in
../shared/data/sst2 (not part of the project). Writes trainer.json as it goes on.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "sst2"
BATCH, RATE, LENGTH = 32, 5e-5, 128
KINDS = {"float32": "", "bfloat16": "weights: bfloat16", "frozen": "cache_frozen: bfloat16"}  # under `train:`


def engine(rows: int, epochs: int, seed: int, kind: str, out: Path) -> dict[str, Any]:
    """The engine, by its command line's own function; the recipe is written out here."""
    from engine.finetune import finetune
    from engine.recipe import load

    recipe = out / "sst2.yaml"
    recipe.write_text(f"""task: classification
seed: {seed}
model: {{name: sentence-transformers/all-MiniLM-L6-v2}}
data: {{train: {DATA}/train.tsv, test: {DATA}/dev.tsv, train_limit: {rows}, columns: {{text: sentence}}, max_length: {LENGTH}}}
train: {{epochs: {epochs}, batch_size: {BATCH}, learning_rate: {RATE}, warmup: 0.06, {KINDS[kind]}}}
tune: {"{method: last_n, n: 1}" if kind == "frozen" else "{method: full}"}
evaluate: {{metrics: [accuracy]}}
""")
    result = finetune(load(str(recipe), [f"data.cache={out}/cache"]), tempfile.mkdtemp(prefix="run-", dir=out))
    metrics = result.metrics
    return {"accuracy": metrics["test"]["accuracy"], "interval": metrics["intervals"]["test"]["accuracy"], "loss": metrics["train"]["loss"]}


def trainer(rows: int, epochs: int, seed: int, kind: str, out: Path) -> dict[str, Any]:
    """Trainer with its defaults: padding to the longest of a batch, fused AdamW, linear schedule; bfloat16 by autocast."""
    import csv

    import numpy as np
    import torch
    import transformers
    from datasets import Dataset

    from engine import models

    folder = models.find(models.EMBEDDED, None, True, "bench").folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if kind == "frozen":
        for module in (model.bert.embeddings, *model.bert.encoder.layer[:5]):
            module.requires_grad_(False)

    def read(name: str, limit: int | None) -> Dataset:
        with (DATA / name).open(encoding="utf-8") as file:
            made = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
        data = Dataset.from_dict({"text": [r["sentence"] for r in made], "label": [int(r["label"]) for r in made]})
        return data.map(lambda b: tokenizer(b["text"], truncation=True, max_length=LENGTH), batched=True, remove_columns=["text"])

    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, num_train_epochs=epochs,
        learning_rate=RATE, warmup_steps=0.06, weight_decay=0.01, seed=seed, report_to=[], save_strategy="no", disable_tqdm=True,
        bf16=kind == "bfloat16", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    run = transformers.Trainer(
        model=model, args=arguments, train_dataset=read("train.tsv", rows), processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    done = run.train()
    predicted = run.predict(read("dev.tsv", None))
    accuracy = float((np.argmax(predicted.predictions, 1) == predicted.label_ids).mean())
    return {"accuracy": accuracy, "loss": done.training_loss}


def measured(side: str, rows: int, epochs: int, seed: int, kind: str, out: Path) -> dict[str, Any]:
    """One whole process: its scores and its wall time."""
    start = time.perf_counter()
    spec = json.dumps([side, rows, epochs, seed, kind])
    command = [sys.executable, __file__, "--child", spec, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - start}


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Markdown for the README: a row a seed, and the mean."""
    print("| | engine: dev accuracy | 95 % interval | Trainer: dev accuracy | seconds | ratio |\n|---|---|---|---|---|---|")
    for kind, runs in found.items():
        for one in runs:
            ours, theirs = one["engine"], one["trainer"]
            low, high = ours["interval"]
            cells = f"{ours['accuracy']:.4f} | {low:.3f} to {high:.3f} | {theirs['accuracy']:.4f}"
            times = f"{ours['seconds']:.0f} and {theirs['seconds']:.0f} | {theirs['seconds'] / ours['seconds']:.2f}"
            print(f"| {kind}, seed {one['seed']} | {cells} | {times} |")
        mean = [statistics.mean(one[side]["accuracy"] for one in runs) for side in ("engine", "trainer")]
        ratio = statistics.median(one["trainer"]["seconds"] / one["engine"]["seconds"] for one in runs)
        print(f"| {kind}, mean accuracy, median ratio | {mean[0]:.4f} | | {mean[1]:.4f} | | **{ratio:.2f}** |")


def main() -> int:
    """Run both, one after the other, each as a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["float32"])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--out", default="runs/bench")
    options = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.child:
        side, *given = json.loads(options.child)
        print(json.dumps({"engine": engine, "trainer": trainer}[side](*given, out)))
        return 0
    if options.table:
        table(json.loads((out / "trainer.json").read_text()))
        return 0
    path = out / "trainer.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    found |= {kind: [] for kind in options.kinds}
    for seed, kind in itertools.product(range(13, 13 + options.seeds), options.kinds):
        sizes = (options.rows, options.epochs)
        one = {side: measured(side, *sizes, seed, kind, out) for side in ("engine", "trainer")}
        found[kind].append({"seed": seed, "rows": options.rows, "epochs": options.epochs, **one})
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({"seed": seed, "kind": kind, **one}), flush=True)
    table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
