"""What one of two processes does in tests/test_ranks.py; started by torchrun, several laws in one start.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py FOLDER
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from test_loop import one_window_gradients
from transformers import logging

import engine.train as loop
from engine import disk, distributed, finetune, recipe, report, seeds
from engine.interrupt import Interrupt

STILL = ["tune.method=full", "train.clip=null"]


def gradients(made: Any) -> list[list[torch.Tensor | None]]:
    return one_window_gradients(made, 100)


class SignalAt(Interrupt):
    """A real SIGTERM to rank 1 alone, once the log holds this many steps."""

    def __init__(self, folder: str, steps: int):
        super().__init__()
        self.log, self.steps, self.sent = Path(folder, "log.jsonl"), steps, False

    def __call__(self) -> bool:
        if (
            distributed.rank() == 1
            and not self.sent
            and self.log.exists()
            and self.log.read_text().count('"event": "step"') >= self.steps
        ):
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__()


def main() -> None:
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    report.write = lambda folder: disk.replace(folder / "report.html", b"report")  # type: ignore[assignment]  # plots take seconds
    distributed.start()
    assert distributed.world() == 2
    rank, found = distributed.rank(), {}

    # exchanges
    assert distributed.total(rank + 1) == 3
    assert distributed.largest(rank) == 1
    assert distributed.gather(f"r{rank}") == ["r0", "r1"]
    assert distributed.from_first("zero" if rank == 0 else None) == "zero"

    # parameters with a gradient on all ranks, on one, on none; each bucket of one or two
    distributed.BUCKET = 8
    parameters = [
        torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float32, torch.float64, torch.float32)
    ]
    parameters[0].grad = torch.full((3,), 1.0 + rank)
    if rank == 1:
        parameters[2].grad = torch.full((3,), 5.0, dtype=torch.float64)
    loss = torch.tensor(0.5 + rank)
    distributed.sum_gradients(parameters, loss)
    found["buckets"] = [None if p.grad is None else p.grad.tolist() for p in parameters] + [float(loss)]
    distributed.BUCKET = 1 << 10

    # dropout differs by rank: the seed that the loop sets is another one
    seeds.seed_all(1, 2, 3, rank)
    found["draw"] = float(torch.rand(()))

    # gradients of each window: even, uneven, one example
    for name, options in (("even", []), ("uneven", ["train.batch_size=13"]), ("one", ["train.batch_size=89"])):
        found[name] = gradients(recipe.load("still.yaml", STILL + options))

    # runs: whole, and going on from one process and for one process
    def run(out: str, source: str, options: list[str], **more: Any) -> Any:
        return finetune.finetune(recipe.load(source, options), out, say=print if rank == 0 else lambda line: None, **more)

    made = run("whole", "still.yaml", [])
    found["scores"] = made.progress.evaluations
    run("one-two", "still.yaml", [], resume=True)
    run("frozen", "still.yaml", ["tune.method=last_n", "tune.n=0", "train.cache_frozen=float32"])
    with SignalAt("signalled", 4) as signalled:
        stopped = run("signalled", "still.yaml", [], interrupted=signalled)
    assert stopped.code == 143, stopped.code
    found["stopped"] = stopped.progress.step

    # rank 1 alone lacks memory in step 3, and has numbers that are not finite in step 5, once in one run and always in the other
    real, faults = loop.gradients, {"short": {2: 1}, "replayed": {4: 1}, "skipped": {4: 9}}
    for name, times in faults.items():

        def faulty(*arguments: Any, name: str = name, times: dict[int, int] = times) -> torch.Tensor:
            step = arguments[-1][1]
            wrong = rank == 1 and times.get(step, 0) > 0
            times[step] = times.get(step, 0) - 1
            if wrong and name == "short":
                raise torch.OutOfMemoryError("CUDA out of memory")
            mean = real(*arguments)
            return mean * float("nan") if wrong else mean

        loop.gradients = faulty
        found[name] = dataclasses.asdict(run(name, "still.yaml", []).progress)
    torch.save(found, f"found{rank}.pt")
    distributed.stop()


main()
