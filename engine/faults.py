"""What goes wrong in the arithmetic: too little memory, numbers that are not finite. What train.py does about it.

Memory. A window may be cut into micro-batches of any size, for its gradient is a sum. So when memory does not suffice,
the same window is cut smaller and its step is done anew from clean gradients:

    forward, backward   nothing but .grad was changed, and .grad is emptied
    optimizer's step    AdamW's averages, the only large tensors it makes, are made before the first weight moves
                        (engine/optim.py); memory that runs out while weights move leaves some of them old and some
                        new, which nothing can mend but the last checkpoint: that is an error

The gradient is the same up to rounding (float32: 1e-6 relative) where dropout is 0. With dropout it is another draw: the
masks depend on (seed, step, micro-batch), and there are more micro-batches now. Buffers that a forward pass changes by
itself (the means of a BatchNorm) see the rows of the failed pass twice.

Numbers. One NaN in a gradient becomes, through the norm by which all are clipped, NaN in every weight: the run is lost
though it goes on. So nothing is updated unless loss and norm are finite. A window whose numbers are not is replayed with
the same seeds: if they are finite now it was chance (a bit flipped in memory, a race), else it is the rows, the learning rate or
the weights, and the window is left out. Where it began is found by one more forward pass under hooks, which costs nothing as
long as nothing is wrong.
"""

import gc
import math
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed
from engine.errors import RunError
from engine.progress import Progress, Settings

# How the allocators that raise a plain RuntimeError say it: torch on a CPU (Linux; Windows), on MPS, cuBLAS's workspace.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class FaultError(RunError):
    """Numbers or memory end the run; the last good checkpoint stays."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory did not suffice, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def clean(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """As before the step: no gradients, and a scaler that has unscaled none and keeps its scale."""
    optimizer.zero_grad(set_to_none=True)
    scaler.update(scaler.get_scale())


class Memory:
    """A context that ends early when memory runs out: afterwards `short` tells, the same on all ranks. Other errors pass.

    The error is let go with the block, and with it the activations that its frames hold. With an `optimizer` the block
    moves weights: FaultError if some have moved, here or on another rank. `alone` asks no other rank.
    """

    def __init__(self, optimizer: Any = None, alone: bool = False):
        self.optimizer, self.alone, self.short = optimizer, alone, False

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        short = out_of_memory(error)
        if error is not None and not short:
            return False
        if short and self.optimizer is not None and (getattr(self.optimizer, "moving", False) or distributed.world() > 1):
            raise FaultError(
                "memory ran out while the optimizer moved the weights: some have moved, others have not. Go on from the last"
                " checkpoint with --resume and a smaller train.micro_batch_tokens."
            ) from error
        self.short = short if self.alone or self.optimizer is not None else distributed.largest(int(short)) > 0
        return short


def release() -> None:
    """Free what only cycles hold, and give the device the blocks that torch keeps: other sizes are needed from now on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(row: str, where: str) -> FaultError:
    """Not even one example fits."""
    return FaultError(
        f"{where}: memory does not suffice for a single example, {row}. Cures: a smaller data.max_length, a tune.method that"
        " trains fewer parameters (lora), train.precision=bfloat16, a smaller model."
    )


def smaller(windows: Any, window: Any, progress: Progress, write: Callable[[dict[str, Any]], None]) -> Any:
    """The window in smaller micro-batches, for memory ran out. The smaller budget stays; a resumed run begins with the recipe's."""
    release()
    halved = windows.smaller(window)
    if halved is None:
        raise too_large(windows.where(window.rows)[0], f"step {progress.step + 1}")
    write({"event": "memory", "step": progress.step + 1, "during": "training", "tokens": windows.tokens})
    return halved


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of the tensors is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def hopeless(progress: Progress, settings: Settings, model: nn.Module) -> bool:
    """Whether leaving out windows does not help: too many were, or a weight itself is not finite."""
    often = progress.skipped_in_row > settings.max_skipped or progress.skipped > settings.max_skipped_in_run
    return often or not finite(model.parameters())


def first_not_finite(model: nn.Module, again: Callable[[], Any]) -> str:
    """Where numbers stop being finite, found by calling `again`, which does the window's forward and backward pass anew.

    In this order: a weight; the first module, in the order of computing, whose output is not finite; the loss; the
    gradient of the parameter nearest to the loss.
    """
    bad = next((name for name, p in model.named_parameters() if not finite([p])), None)
    if bad:
        return f"the weight {bad}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not finite(_tensors(output)):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        loss = again()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if not math.isfinite(float(loss)):
        return "the loss; what the model gives is finite"
    moved = {name: getattr(p, "master", p) for name, p in model.named_parameters()}  # see fast/weights.py
    grads = {name: p.grad for name, p in moved.items() if p.grad is not None}
    bad = next((name for name in reversed(grads) if not finite([grads[name]])), None)
    if bad:
        return f"the gradient of {bad}"
    if not math.isfinite(float(torch.nn.utils.get_total_norm(list(grads.values())))):
        return "the norm of the gradient; each of its numbers is finite"
    return "nothing, when it was computed once more"


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what a module returns: a tensor, or tuples, lists and mappings of them."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [t for part in parts for t in _tensors(part)]


def diverged(progress: Progress, loss: float, norm: float, rate: float, began: str, rows: list[str]) -> FaultError:
    """The end of a run whose numbers do not become finite again."""
    most = 20
    rest = f" and {len(rows) - most} more" if len(rows) > most else ""
    return FaultError(
        f"step {progress.step}: loss {loss} and gradient norm {norm} are not finite, {progress.skipped_in_row} times in a row,"
        f" at learning rate {rate:.2e}, and {progress.skipped} times in this run. Cures: a lower train.learning_rate, more"
        " train.warmup, train.precision=float32 or bfloat16, or a look at the rows of these windows.\n"
        f"first not finite: {began}\n"
        f"rows of this step: {', '.join(rows[:most])}{rest}"
    )
