"""Side by side with transformers' Trainer: same model, rows, epochs, batch and learning rate; who scores what, in what time.

    make bench-trainer    20,000 rows of SST-2, one epoch, in one process after the other

Needs the SST-2 files in ../shared/data/sst2 (not part of the project). Prints a table and writes bench.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "sst2"
BATCH, RATE, LENGTH = 32, 5e-5, 128


def engine(rows: int, out: Path) -> None:
    """The engine, by its command line's own function; the recipe is written out here."""
    from engine.finetune import finetune
    from engine.recipe import load

    recipe = out / "sst2.yaml"
    recipe.write_text(f"""task: classification
model: {{name: sentence-transformers/all-MiniLM-L6-v2}}
data: {{train: {DATA}/train.tsv, test: {DATA}/dev.tsv, train_limit: {rows}, columns: {{text: sentence}}, max_length: {LENGTH}}}
train: {{epochs: 1, batch_size: {BATCH}, learning_rate: {RATE}, warmup: 0.06}}
evaluate: {{metrics: [accuracy]}}
""")
    result = finetune(load(str(recipe), [f"data.cache={out}/cache"]), str(out / "run"))
    interval = result.metrics["intervals"]["test"]["accuracy"]
    print(
        json.dumps(
            {"accuracy": result.metrics["test"]["accuracy"], "interval": interval, "train_loss": result.metrics["train"]["loss"]}
        )
    )


def trainer(rows: int, out: Path) -> None:
    """Trainer with its defaults: padding to the longest of a batch, float32, fused AdamW, linear schedule."""
    import csv

    import numpy as np
    import transformers
    from datasets import Dataset

    from engine import models

    folder = models.find(models.EMBEDDED, None, True, "bench").folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    def read(name: str, limit: int | None) -> Dataset:
        with (DATA / name).open(encoding="utf-8") as file:
            made = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
        data = Dataset.from_dict({"text": [r["sentence"] for r in made], "label": [int(r["label"]) for r in made]})
        return data.map(lambda b: tokenizer(b["text"], truncation=True, max_length=LENGTH), batched=True, remove_columns=["text"])

    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, num_train_epochs=1,
        learning_rate=RATE, warmup_steps=0.06, weight_decay=0.01, seed=13, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run = transformers.Trainer(
        model=model, args=arguments, train_dataset=read("train.tsv", rows), processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    done = run.train()
    predicted = run.predict(read("dev.tsv", None))
    accuracy = float((np.argmax(predicted.predictions, 1) == predicted.label_ids).mean())
    print(json.dumps({"accuracy": accuracy, "train_loss": done.training_loss}))


def main() -> int:
    """Run both, one after the other, each as a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--only", choices=["engine", "trainer"])
    parser.add_argument("--out", default="runs/bench")
    options = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return 0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.only:
        {"engine": engine, "trainer": trainer}[options.only](options.rows, out)
        return 0
    table = {}
    for name in ("engine", "trainer"):
        start = time.perf_counter()
        command = [sys.executable, __file__, "--only", name, "--rows", str(options.rows), "--out", str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=_environment())
        table[name] = {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name:<8} {json.dumps(table[name])}", flush=True)
    print(f"wall time, trainer / engine: {table['trainer']['seconds'] / table['engine']['seconds']:.2f}")
    (out / "bench.json").write_text(json.dumps({"rows": options.rows, **table}, indent=2) + "\n")
    return 0


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    sys.exit(main())
