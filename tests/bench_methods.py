"""Every tuning method on SST-2: accuracy, what trains, time and memory; and LoRA beside the peft package.

    make bench-methods                      accuracy: 10,000 rows, 2 epochs, every method (under an hour; goes on where it stopped)
    make bench-methods ARGS=--speed         a step's time and the peak memory of every method, and of peft's LoRA, interleaved
    make bench-methods ARGS=--table         the README's table from both

Needs the SST-2 files in ../shared/data/sst2 (not part of the project). Results stand in runs/bench-methods/.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "sst2"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EVERYWHERE = "at: ['**.{query,key,value}', '**.dense']"  # all linear layers of the blocks, and the pooler
STEPS, WARM = 45, 5  # of a timing; the first ones are not counted
HOULSBY = "houlsby, H / 4, and the pooler"  # rate and pooler by a score on rows 10,001 to 13,000 of train

# name -> (the recipe's tune group, learning rate)
METHODS: dict[str, tuple[str, float]] = {
    "linear head, frozen body": ("{method: last_n, n: 0}", 3e-3),
    "full": ("{method: full}", 1e-4),
    "full, unfreezing gradually": ("{method: full, unfreeze: 0.15, layer_decay: 0.9}", 2e-4),
    "last_n, 2 of 6 blocks": ("{method: last_n, n: 2}", 2e-4),
    "lora, query and value": ("{method: lora, r: 8}", 2e-3),
    "lora": (f"{{method: lora, r: 8, {EVERYWHERE}}}", 1e-3),
    "dora": (f"{{method: lora, r: 8, dora: true, {EVERYWHERE}}}", 1e-3),
    "lora+, query and value": ("{method: lora, r: 8, b_rate: 16}", 5e-4),
    "rslora, query and value": ("{method: lora, r: 8, rslora: true}", 1e-3),
    "pissa, query and value": ("{method: lora, r: 8, init: pissa}", 5e-4),
    "qlora, nf4": (f"{{method: lora, r: 8, quantize: nf4, {EVERYWHERE}}}", 1e-3),
    "qlora, int8": (f"{{method: lora, r: 8, quantize: int8, {EVERYWHERE}}}", 1e-3),
    HOULSBY: ("{method: adapter, reduction: 4, train: ['**.pooler.**']}", 2e-3),
    "pfeiffer, H / 16": ("{method: adapter, placement: pfeiffer}", 2e-3),
    "parallel, H / 16": ("{method: adapter, placement: parallel}", 1e-3),
    "compacter": ("{method: compacter}", 5e-3),
    "ia3": ("{method: ia3}", 1e-2),
    "bitfit": ("{method: bitfit}", 2e-3),
    "layernorm": ("{method: layernorm}", 2e-3),
    "prefix, 16": ("{method: prefix, length: 16}", 1e-2),
    "prompt, 16": ("{method: prompt, length: 16}", 3e-2),
    "ptuning, 16": ("{method: ptuning, length: 16}", 3e-3),
}
PEFT = "peft's lora, query and value"
SEEDS = dict.fromkeys(("full", "lora", "dora", HOULSBY), (13, 14, 15))  # compared with each other; 13 for the rest


def recipe_of(name: str, out: Path, *more: str) -> Any:
    """The recipe that all runs share, with a method's options."""
    from engine.recipe import load

    path = out / "sst2.yaml"
    path.write_text(f"""task: classification
model: {{name: {MODEL}}}
data: {{train: {DATA}/train.tsv, test: {DATA}/dev.tsv, train_limit: 10000, columns: {{text: sentence}}, max_length: 128}}
train: {{epochs: 2, batch_size: 32, warmup: 0.06}}
evaluate: {{metrics: [accuracy]}}
checkpoint: {{every: epoch, keep: 1}}
""")
    tune, rate = METHODS[name]
    return load(str(path), [f"tune={tune}", f"train.learning_rate={rate}", *more])


def accuracy(name: str, out: Path, seed: int) -> dict[str, Any]:
    """One whole run."""
    from engine.finetune import finetune

    folder = out / "runs" / f"{name.replace(' ', '_').replace(',', '').replace('/', '')}-{seed}"
    result = finetune(recipe_of(name, out, f"seed={seed}"), str(folder), resume=(folder / "recipe.yaml").exists())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    coverage = next(e["coverage"] for e in log if e["event"] == "model")
    return {
        "accuracy": result.metrics["test"]["accuracy"],
        "interval": result.metrics["intervals"]["test"]["accuracy"],
        "coverage": coverage,
    }


def speed(name: str, out: Path) -> dict[str, Any]:
    """Seconds of a step by the engine's own loop, and the process's peak memory."""
    import torch

    from engine import freeze, optim, prepare
    from engine.fast import kernels
    from engine.progress import Progress, Settings
    from engine.train import train

    ready = prepare.prepare(recipe_of(name, out, f"train.max_steps={STEPS}"), say=lambda line: None)
    model, rate, marks = ready.loaded.model, ready.recipe.train.learning_rate, [time.perf_counter()]
    optimizer = optim.adamw(freeze.groups(model, rate, 0.01, ready.rates), rate, [0.9, 0.999], 1e-8)
    settings = Settings(steps=STEPS, seed=13, clip=1.0, max_skipped=0, evaluate_every=None, save_every=10**9)
    progress = Progress()
    with kernels.fast_kernels(ready.device):
        train(
            model, ready.task, ready.windows, optimizer, torch.amp.GradScaler("cpu", enabled=False), lambda step: 1.0,
            lambda step: freeze.thaw(model, step), settings, progress, device=ready.device,
            autocast=optim.autocast("float32", ready.device), evaluate=dict, save=lambda kind: None,
            write=lambda record: marks.append(time.perf_counter()), interrupted=lambda: False,
        )  # fmt: skip
    steps = [b - a for a, b in itertools.pairwise(marks)][WARM:]
    return {"step": statistics.median(steps), "memory": _peak(), "loss": progress.loss_sum / progress.items}


def rival(out: Path) -> dict[str, Any]:
    """The same batches through the peft package's LoRA and a plain loop: padded to the longest text, clipped, fused AdamW."""
    import peft
    import torch

    from engine import prepare

    ready = prepare.prepare(
        recipe_of("lora, query and value", out, "tune={method: full}", "train.packing=false"), say=lambda line: None
    )
    train = ready.encoded["train"]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(ready.loaded.model, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, weight_decay=0.01, fused=True)
    steps, losses = [], []
    for window in ready.windows.epoch(0):
        batch = train.batch(window.rows)
        start = time.perf_counter()
        inputs = {k: v for k, v in batch.items() if k != "truncated"}
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        steps.append(time.perf_counter() - start)
        if len(steps) == STEPS:
            break
    return {"step": statistics.median(steps[WARM:]), "memory": _peak(), "loss": statistics.mean(losses)}


def _peak() -> float:
    """This process's largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child(out: Path, *arguments: str) -> dict[str, Any]:
    """This file in a process of its own; its last line is the result."""
    command = [sys.executable, __file__, "--out", str(out), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def accuracies(out: Path) -> None:
    """Every method's accuracy; what is there already stays."""
    found = _read(out / "accuracy.json")
    for name, seed in ((method, seed) for method in METHODS for seed in SEEDS.get(method, (13,))):
        runs = found.setdefault(name, {})
        if str(seed) not in runs:
            runs[str(seed)] = _child(out, "--only", name, "--seed", str(seed))
            (out / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name:<28} {seed} {runs[str(seed)]}", flush=True)


def speeds(out: Path, rounds: int) -> None:
    """Every method and peft, one after the other, several rounds; medians over the rounds."""
    taken: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name in (*METHODS, PEFT):
            taken.setdefault(name, []).append(_child(out, "--speed", "--only", name))
            print(f"{name:<28} {taken[name][-1]}", flush=True)
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in taken.items()}
    ours = [r["step"] for r in taken["lora, query and value"]]
    theirs = [r["step"] for r in taken[PEFT]]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    (out / "speed.json").write_text(json.dumps(medians, indent=1) + "\n")
    print(f"peft / engine, LoRA r=8 on query and value: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def table(out: Path) -> None:
    """Markdown: the mean over seeds, with their range; the interval is the first seed's. Time and memory are ratios to full fine-tuning."""
    scores, times = _read(out / "accuracy.json"), _read(out / "speed.json")
    full = times["full"]
    print("| method | dev accuracy | 95 % interval | trains | a step's time | peak memory |\n|---|---|---|---|---|---|")
    for name in (*METHODS, PEFT):
        runs, clock = list(scores.get(name, {}).values()), times.get(name)
        if runs:
            one, each = runs[0], [run["accuracy"] for run in runs]
            trains = (
                one["coverage"].split(";")[-1] if "train (" in one["coverage"].split(";")[-1] else one["coverage"].split(";")[-2]
            )
            seeds = f" ({min(each):.3f} to {max(each):.3f})" if len(each) > 1 else ""
            cells = [
                f"{statistics.mean(each):.4f}{seeds}",
                "{:.3f} to {:.3f}".format(*one["interval"]),
                trains.split(" of ")[0].strip(),
            ]
        else:
            cells = ["", "", ""]
        cells += [f"{clock['step'] / full['step']:.2f}", f"{clock['memory'] / full['memory']:.2f}"] if clock else ["", ""]
        print(f"| {name} | {' | '.join(cells)} |")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[*METHODS, PEFT])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="runs/bench-methods")
    options = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: {DATA} is not here")
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only:
        if options.only == PEFT:
            one = rival(out)
        else:
            one = speed(options.only, out) if options.speed else accuracy(options.only, out, options.seed)
        print(json.dumps(one))
    elif options.table:
        table(out)
    elif options.speed:
        speeds(out, options.rounds)
    else:
        accuracies(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
