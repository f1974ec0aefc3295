"""Every tuning method on SST-2: accuracy, what trains, time and memory; and LoRA beside the peft package.

    make bench-methods                      accuracy: 10,000 rows, 2 epochs, every method (hours on two cores; goes on where it stopped)
    make bench-methods ARGS=--speed         time of a step and peak memory of every method, one after the other, and of peft
    make bench-methods ARGS=--table         the README's table from both

Needs the SST-2 files in ../shared/data/sst2 (not part of the project). Results stand in runs/bench-methods/*.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "sst2"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ALL_LINEAR = "['**.{query,key,value}', '**.dense']"

# name -> (the recipe's tune group, learning rate); rates by the usual advice for each method, none searched on dev
METHODS: dict[str, tuple[str, float]] = {
    "linear head": "{method: last_n, n: 0}, 3e-3",
    "full": "{method: full}, 1e-4",
    "lora": "{method: lora, r: 8}, 2e-3",
    "dora": "{method: lora, r: 8, dora: true}, 2e-3",
    "houlsby": "{method: adapter}, 2e-3",
    "prefix": "{method: prefix, length: 16}, 1e-2",
    "ia3": "{method: ia3}, 1e-2",
    "bitfit": "{method: bitfit}, 2e-3",
    "layernorm": "{method: layernorm}, 2e-3",
    "last_n, 2 blocks": "{method: last_n, n: 2}, 2e-4",
    "rslora": "{method: lora, r: 8, rslora: true}, 1e-3",
    "lora+": "{method: lora, r: 8, b_rate: 16}, 5e-4",
    "pfeiffer": "{method: adapter, placement: pfeiffer}, 2e-3",
}  # type: ignore[assignment,dict-item]  # split below
METHODS = {k: (v.rpartition(", ")[0], float(v.rpartition(", ")[2])) for k, v in METHODS.items()}  # type: ignore[attr-defined]


def recipe_file(out: Path) -> Path:
    """The recipe that all runs share."""
    path = out / "sst2.yaml"
    path.write_text(f"""task: classification
model: {{name: {MODEL}}}
data: {{train: {DATA}/train.tsv, test: {DATA}/dev.tsv, train_limit: 10000, columns: {{text: sentence}}, max_length: 128, cache: {out}/cache}}
train: {{epochs: 2, batch_size: 32, warmup: 0.06}}
evaluate: {{metrics: [accuracy]}}
checkpoint: {{every: epoch, keep: 1}}
""")
    return path


def overrides(name: str) -> list[str]:
    tune, rate = METHODS[name]
    return [f"tune={tune}", f"train.learning_rate={rate}"]


def accuracy(name: str, out: Path) -> dict[str, Any]:
    """One whole run."""
    from engine.finetune import finetune
    from engine.recipe import load

    folder = out / "runs" / name.replace(" ", "_").replace(",", "")
    result = finetune(load(str(recipe_file(out)), overrides(name)), str(folder))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    coverage = next(e["coverage"] for e in log if e["event"] == "model")
    low, high = result.metrics["intervals"]["test"]["accuracy"]
    return {"accuracy": result.metrics["test"]["accuracy"], "interval": [low, high], "coverage": coverage}


def main() -> int:
    """Run what is missing; each run is a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(METHODS))
    parser.add_argument("--out", default="runs/bench-methods")
    options = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only:
        print(json.dumps(accuracy(options.only, out)))
        return 0
    for name in METHODS:
        file = out / f"{name}.json"
        if not file.exists():
            command = [sys.executable, __file__, "--only", name, "--out", str(out)]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
            file.write_text(done.stdout.splitlines()[-1] + "\n")
        print(f"{name:<20} {file.read_text().strip()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
