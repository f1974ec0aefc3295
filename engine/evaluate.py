"""Model and examples to predictions, predictions to scores. Training is left as it was: modes, random states, gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import distributed, faults, metrics, seeds
from engine.data.encode import Encoded
from engine.data.windows import fitting, in_order
from engine.models import eval_mode


@dataclass
class Scored:
    """A split's outputs in the file's order, and what they are worth."""

    outputs: np.ndarray  # (N, K) logits
    losses: np.ndarray  # (N,)
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
) -> np.ndarray:
    """The task's raw outputs for every example, in the examples' order. Raises KeyboardInterrupt once `interrupted` says so.

    Of several processes each computes its share, and all get the whole; a signal at one of them stops all. The batches are
    the same for any number of processes, and so are the outputs to the bit; they are dealt to the ranks in turn.

    A batch that does not fit into memory is done again in parts, as are those after it; `shrunk` is told the new `tokens`.
    RunError names the example (by `places`) that does not fit alone.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # (row numbers, outputs) of this rank's batches
    todo, budget, stopped = in_order(encoded, tokens)[distributed.rank() :: distributed.world()], tokens, False
    with seeds.untouched(), eval_mode(model), torch.inference_mode():
        while todo and not (stopped := interrupted()):
            rows = todo[0]
            with faults.Memory(alone=True) as memory:
                batch = {k: v.to(device, non_blocking=True) for k, v in encoded.batch(rows).items()}
                with autocast():
                    part = task.forward(model, batch)
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
    made = np.empty((len(encoded), *everyone[0][1].shape[1:]), dtype=everyone[0][1].dtype)
    for rows, part in everyone:
        made[rows] = part
    return made


def score(task: Any, made: np.ndarray, labels: np.ndarray, names: list[str]) -> Scored:
    """Mean loss and the named metrics of outputs (N, K) against labels (N,)."""
    losses = task.losses(made, labels)
    probabilities = task.probabilities(made)
    scores = {"loss": float(losses.astype(np.float64).mean())}
    scores |= metrics.compute(names, labels, probabilities.argmax(axis=1), probabilities)
    return Scored(made, losses, scores)


def report(task: Any, scored: Scored, labels: np.ndarray, names: list[str], resamples: int) -> dict[str, Any]:
    """The long form of a final score: every metric, intervals of the headline ones, confusion matrix, per class."""
    probabilities = task.probabilities(scored.outputs)
    predicted = probabilities.argmax(axis=1)
    every = [n for n in metrics.CLASSIFICATION if len(task.labels) == 2 or n not in ("precision", "recall", "f1")]
    return {
        "scores": scored.scores | metrics.compute(every, labels, predicted, probabilities),
        "intervals": metrics.intervals(names, labels, predicted, probabilities, resamples) if resamples else {},
        "detail": metrics.detail(task.labels, labels, predicted),
    }
