"""The training loop. Read it from top to bottom: nothing is hidden behind it.

The story. Fine-tuning repeats one *step* until the model is good: show it some examples, measure how wrong it is, and
move every weight a little in the direction that makes it less wrong.

    window         what one step sees: `batch_size` examples, in an order that depends on (seed, epoch) alone
    micro-batch    the part of a window that goes through the model at once; only memory decides its size
    items          what the loss is a mean over: examples, or labelled tokens
    step           forward and backward over all micro-batches of a window, then one move of the optimizer
    epoch          all windows once

Exactness. A mean of the micro-batches' means is not the mean of the window as soon as they differ in size. So a task's
loss is a SUM over its items, and each part is divided by the items of the whole window, counted before the first
forward pass. The gradient is then that of one big batch, however the window is cut and on however many processes.

Going on. Order, learning rate, unfreezing and randomness are pure functions of the place (epoch, window, step,
micro-batch, rank), so a run is resumed by starting further in: `Progress`, the weights, the optimizer and the scaler
are its whole state.

When it goes wrong. No update is made of numbers that are not finite: the window is replayed, then left out, then it is an
error. Where memory runs out the window is cut smaller and its step done anew. Both are told in faults.py.

Who decides. Everything that steers a run (the learning rate, skipping, stopping, saving) is a line of this file.
`evaluate`, `save` and `write` do as they are told; nothing that watches can interfere.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from engine import distributed, faults, optim, seeds
from engine.progress import Progress, Settings, due, judge

Evaluate = Callable[[], dict[str, float] | None]  # the scores; None if a signal came on the way
Save = Callable[[str], None]  # "step": all it takes to go on; "best": the weights
Write = Callable[[dict[str, Any]], None]
Poll = Callable[[], bool]


def train(
    model: nn.Module,
    task: Any,  # task.loss(model, micro_batch) -> the SUM of the losses of its items
    windows: Any,  # .epoch(n, skip) -> windows with .rows, .micro_batches, .items, .tokens; .smaller(window); .where(rows)
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,  # of float16; does nothing for the other types
    schedule: Callable[[int], float],  # step -> factor of the learning rate
    thaw: Callable[[int], list[nn.Parameter]],  # step -> what trains at it; freezes and unfreezes by the recipe's timetable
    settings: Settings,
    progress: Progress,
    *,
    device: torch.device,
    autocast: Callable[[], Any],  # the context that computes in the recipe's precision
    evaluate: Evaluate,
    save: Save,
    write: Write,
    interrupted: Poll,
) -> Progress:
    """Train until the epochs are over, patience has run out or someone interrupts; returns the progress."""
    model.train()
    scaler.scale(torch.zeros((), device=device))  # makes its tensors, before anything can fail
    run = partial(gradients, model, task, scaler, device, autocast)

    if progress.unjudged:
        decide(progress, settings, windows.per_epoch, evaluate, save, write, interrupted)
    while progress.step < settings.steps and not progress.stopped:
        for window in windows.epoch(progress.epoch, skip=progress.window):
            trainable, factor, place = thaw(progress.step), schedule(progress.step), (settings.seed, progress.step)
            items, replayed = distributed.total(window.items), False
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            while True:  # the same window from clean gradients, until it is used or given up
                # 1. Gradients: the sum over all micro-batches, divided once by the items of the whole window.
                with faults.Memory() as memory:
                    mean = run(window, items, place)

                # 2. Update, unless a number is not finite.
                if not memory.short:
                    distributed.sum_gradients(trainable, mean)  # over all processes; nothing where there is one
                    with faults.Memory(optimizer) as memory:
                        scaler.unscale_(optimizer)  # clip the true gradients
                        norm = float(optim.clip(optimizer, trainable, settings.clip))
                        loss = float(mean)
                        finite = math.isfinite(norm) and math.isfinite(loss)
                        if finite:
                            scaler.step(optimizer)
                if memory.short:
                    window = faults.smaller(windows, window, progress, write)
                elif finite or replayed:
                    break
                elif math.isfinite(loss) and scaler.get_scale() > 1:  # float16 overflowed: its scale goes down, to 1 at the least
                    scaler.update(max(1.0, scaler.get_scale() / 2))
                else:
                    replayed = True  # with the same seeds: what is not finite again is not chance
                faults.clean(optimizer, scaler)

            progress.step += 1
            progress.window += 1
            if finite:
                scaler.update()
                progress.skipped_in_row = 0
                progress.items += int(items)
                progress.loss_sum += loss * items
            else:
                faults.clean(optimizer, scaler)
                progress.skipped += 1
                progress.skipped_in_row += 1
            optimizer.zero_grad(set_to_none=True)
            rate = optimizer.defaults["lr"] * factor
            if finite and replayed:
                write({"event": "replayed", "step": progress.step})
            write({
                "event": "step" if finite else "skipped", "step": progress.step, "epoch": progress.epoch, "loss": loss,
                "grad_norm": norm, "learning_rate": rate, "items": items, "tokens": window.tokens,
            })  # fmt: skip
            if not finite and faults.hopeless(progress, settings, model):
                began = faults.first_not_finite(model, partial(run, window, items, place))
                raise faults.diverged(progress, loss, norm, rate, began, windows.where(window.rows))

            # 3. Decisions: evaluate, stop, save.
            decide(progress, settings, windows.per_epoch, evaluate, save, write, interrupted)
            if progress.stopped:
                break
    return progress


def gradients(
    model: nn.Module,
    task: Any,
    scaler: Any,
    device: torch.device,
    autocast: Any,
    window: Any,
    items: float,
    place: tuple[int, int],
) -> torch.Tensor:
    """Leave this rank's part of the (scaled) gradient of the window's mean loss in .grad; returns its part of that loss, a scalar."""
    loss = torch.zeros((), device=device)
    for i, micro_batch in enumerate(window.micro_batches):
        seeds.seed_all(*place, i, distributed.rank())  # dropout depends on the place alone
        micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
        with autocast():
            part = task.loss(model, micro_batch) / items
        scaler.scale(part).backward()
        loss += part.detach()
    return loss


def decide(
    progress: Progress, settings: Settings, per_epoch: int, evaluate: Evaluate, save: Save, write: Write, interrupted: Poll
) -> None:
    """What follows a step, all of it, in the open: evaluate, judge, stop, turn the epoch, save."""
    last, end_of_epoch, best = progress.step == settings.steps, progress.window == per_epoch, False
    if due(settings.evaluate_every, progress.step, end_of_epoch, last):
        scores = evaluate()
        progress.unjudged = scores is None
        if scores is None:
            progress.stopped = "interrupted"
            save("step")
            return
        best = judge(progress, settings, scores)
        write({"event": "evaluation", "step": progress.step, "epoch": progress.epoch, "best": best, **scores})
    if best:
        save("best")
    if last:
        progress.stopped = "finished"
    elif settings.patience is not None and progress.stale >= settings.patience:
        progress.stopped = "early"
    elif interrupted():
        progress.stopped = "interrupted"
    if end_of_epoch:
        progress.epoch, progress.window = progress.epoch + 1, 0
    if progress.stopped or due(settings.save_every, progress.step, end_of_epoch, last):
        save("step")
        if not progress.stopped and interrupted():  # it came during the save: nothing is left to be done
            progress.stopped = "interrupted"
