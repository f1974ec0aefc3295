"""What safety costs: the share of a bert_sentiment run that goes into not losing it.

    make bench-safety                             one run of the recipe; some minutes
    make bench-safety ARGS="train.max_steps=3"    a look at whether it works

Timed in the run itself, so the machine's mood does not matter: saving and pruning checkpoints, hashing and syncing, the log,
seeding each micro-batch, the check of numbers, locks, the data's hashes. The rest of the run is the work.
"""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Wrap what keeps a run safe in clocks, run, print a table."""
    from engine import checkpoint, claim, disk, faults, finetune, lock, recipe, runs, seeds, vet, watch

    spent: dict[str, float] = {}
    inside = [0]

    def clocked(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            inside[0] += 1
            start = time.perf_counter()
            try:
                return real(*arguments, **more)
            finally:
                inside[0] -= 1
                if not inside[0]:  # what runs inside another clock is counted there
                    spent[what] = spent.get(what, 0.0) + time.perf_counter() - start

        setattr(owner, name, wrapper)

    for name in ("write", "prune", "load_weights"):
        clocked(checkpoint, name, "checkpoints: write, hash, sync, prune")
    for name in ("replace", "sync_tree", "require", "sync_directory"):
        clocked(disk, name, "other files: whole or not at all")
    clocked(watch.Log, "__call__", "the log, a line a step")
    clocked(watch.Log, "sync", "the log, a line a step")
    clocked(seeds, "seed_all", "seeds for each micro-batch")
    for name in ("finite", "release", "clean"):
        clocked(faults, name, "finite weights before a save")
    clocked(vet, "folder", "a look at the model folder")
    clocked(runs, "environment", "versions, hashes, commit")
    clocked(lock, "take", "claim and lock of the run folder")
    clocked(claim, "_state", "claim and lock of the run folder")

    out = Path("runs/bench-safety") / time.strftime("%Y%m%d-%H%M%S")
    made = recipe.load("bert_sentiment", sys.argv[1:])
    start = time.perf_counter()
    finetune.finetune(made, str(out))
    whole = time.perf_counter() - start
    print(f"\n| part | seconds | share of {whole:.1f} s |\n|---|---|---|")
    for what, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {what} | {seconds:.2f} | {seconds / whole:.2%} |")
    print(f"| together | {sum(spent.values()):.2f} | {sum(spent.values()) / whole:.2%} |")
    (out / "safety.json").write_text(json.dumps({"seconds": whole, "spent": spent}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
