"""Model and examples to predictions, predictions to scores. Training is left as it was: modes, random states, gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import distributed, faults, metrics, seeds
from engine.data.encode import Encoded
from engine.data.read import Row
from engine.data.several import Joined
from engine.data.windows import fitting, in_order
from engine.models import eval_mode


@dataclass
class Scored:
    """A split's outputs in the file's order, and what they are worth."""

    outputs: Any  # (N, ...), or a list of N arrays (T, K): the task's
    judged: Any  # engine.tasks._base.Judged
    scores: dict[str, float]


def outputs(
    model: nn.Module,
    task: Any,
    encoded: Encoded,
    *,
    tokens: int,
    device: torch.device,
    autocast: Any,
    interrupted: Callable[[], bool] = lambda: False,
    shrunk: Callable[[int], None] = lambda tokens: None,
    places: list[str] | None = None,
) -> Any:
    """The task's raw outputs for every example, in the examples' order. Raises KeyboardInterrupt once `interrupted` says so.

    One array (N, ...); or, of a task with an output for each token, a list of N arrays (T, ...), each as long as its example.

    Of several processes each computes its share, and all get the whole; a signal at one of them stops all. The batches are
    the same for any number of processes, and so are the outputs to the bit; they are dealt to the ranks in turn.

    A batch that does not fit into memory is done again in parts, as are those after it; `shrunk` is told the new `tokens`.
    RunError names the example (by `places`) that does not fit alone. Of several data sets a list: each task's own, by its head.
    """
    if isinstance(encoded, Joined):
        with eval_mode(model):
            return _of_each(
                model,
                task,
                encoded,
                places,
                tokens=tokens,
                device=device,
                autocast=autocast,
                interrupted=interrupted,
                shrunk=shrunk,
            )
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # (row numbers, outputs) of this rank's batches
    todo, budget, stopped = in_order(encoded, tokens)[distributed.rank() :: distributed.world()], tokens, False
    with seeds.untouched(), eval_mode(model), torch.inference_mode():
        while todo and not (stopped := interrupted()):
            rows = todo[0]
            with faults.Memory(alone=True) as memory:
                batch = {k: v.to(device, non_blocking=True) for k, v in encoded.batch(rows).items()}
                with autocast():
                    part = task.output(model, batch)
                parts.append((rows, part.float().cpu().numpy()))
            if memory.short:
                faults.release()
                if len(rows) == 1:
                    raise faults.too_large(places[rows[0]] if places else f"example {rows[0]}", "evaluation")
                budget = len(rows) * int(encoded.lengths[rows].max()) // 2
                todo = [part for rows in todo for part in fitting(rows, encoded.lengths, budget)]
            else:
                del todo[0]
    if distributed.largest(int(stopped)):
        raise KeyboardInterrupt
    if (least := -int(distributed.largest(-budget))) < tokens:
        shrunk(least)
    everyone = [part for of_rank in distributed.gather(parts) for part in of_rank]
    assert everyone, "an empty split reached evaluation"
    if task.per_token:
        trimmed = {i: one[: encoded.lengths[i]] for rows, part in everyone for i, one in zip(rows.tolist(), part, strict=True)}
        return [trimmed[i] for i in range(len(encoded))]
    made = np.empty((len(encoded), *everyone[0][1].shape[1:]), dtype=everyone[0][1].dtype)
    for rows, part in everyone:
        made[rows] = part
    return made


def _of_each(model: Any, task: Any, encoded: Joined, places: list[str] | None, **how: Any) -> list[Any]:
    """Each data set by its own task and head; what was learnt about memory holds for those that follow."""
    told, made = how["shrunk"], []

    def shrunk(tokens: int) -> None:
        how["tokens"] = tokens
        told(tokens)

    for (name, part), first in zip(encoded.parts.items(), encoded.first.tolist(), strict=False):
        own = places[first : first + len(part)] if places else None
        made.append(outputs(model.heads[name], task.parts[name], part, places=own, **how | {"shrunk": shrunk}))
    return made


def score(task: Any, made: Any, encoded: Encoded, rows: list[Row], names: list[str], aim: str | None = None) -> Scored:
    """Mean loss and the named metrics of outputs. With `aim`, a metric, the task first chooses by these rows what it chooses."""
    judged = task.judge(made, encoded, rows)
    if aim and task.calibrate(judged, aim):
        judged = task.judge(made, encoded, rows)
    return Scored(made, judged, {"loss": judged.loss, **task.compute(names, judged)})


def report(task: Any, scored: Scored, names: list[str], resamples: int) -> dict[str, Any]:
    """The long form of a final score: every metric, intervals of the headline ones, and the task's details."""
    judged = scored.judged

    def compute(index: np.ndarray) -> dict[str, float]:
        return dict(task.compute(names, judged, index))

    return {
        "scores": scored.scores | task.compute(task.every_metric(), judged),
        "intervals": metrics.intervals(compute, names, len(judged.losses), resamples) if resamples else {},
        "detail": task.detail(judged),
    }


def lines(task: Any, scored: Scored, encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
    """One object a row, in the file's order: its columns, the truth, the prediction, its loss."""
    return list(task.lines(scored.outputs, scored.judged, encoded, rows))
