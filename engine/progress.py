"""Where a run is, and what steers it: the two plain records that the loop reads and writes; when things are due."""

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run is. With the weights, the optimizer and the scaler it is all it takes to go on."""

    epoch: int = 0
    window: int = 0  # of this epoch, done
    step: int = 0
    items: int = 0
    loss_sum: float = 0.0  # over all items so far, for the mean training loss
    skipped: int = 0  # steps left out because numbers were not finite
    skipped_in_row: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations without gain
    unjudged: bool = False  # a signal cut this step's evaluation short; it comes first when the run goes on
    evaluations: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""  # why: "finished", "early", "interrupted"


@dataclass(frozen=True)
class Settings:
    """What the loop itself needs to know; the recipe's groups `train`, `evaluate`, `early_stopping`, `checkpoint`."""

    steps: int  # in all
    seed: int
    clip: float | None
    max_skipped: int  # in a row
    evaluate_every: int | str | None  # a number of steps, "epoch", or None
    save_every: int | str
    monitor: str | None = None
    lower_is_better: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    max_skipped_in_run: int = 10


def due(every: int | str | None, step: int, end_of_epoch: bool, last: bool) -> bool:
    """Whether something that happens `every` epoch or number of steps happens after this step; always after the last."""
    if every is None:
        return False
    return last or (end_of_epoch if every == "epoch" else step % int(every) == 0)


def judge(progress: Progress, settings: Settings, scores: dict[str, float]) -> bool:
    """Take note of an evaluation; True if it is the best so far. A metric that is not a number is never best."""
    progress.evaluations.append({"step": progress.step, **scores})
    if settings.monitor is None:
        return False
    value = scores[settings.monitor] * (-1 if settings.lower_is_better else 1)
    gained = math.isfinite(value) and (progress.best is None or value > progress.best + settings.min_delta)
    if gained:
        progress.best, progress.best_step, progress.stale = value, progress.step, 0
    else:
        progress.stale += 1
    return gained
