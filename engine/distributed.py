"""Several processes, one run: data parallel training, and what only one of them does. In one process it costs nothing.

Each process (*rank*) holds the whole model and takes its share of every window. The loss is divided by the items of the
whole window, over all ranks, before the backward pass; so the gradients are SUMMED, not averaged, and the sum is the
gradient of one process, however uneven the shares are:

    window of 5    rank 0: 3 examples   sum of losses / 5  -> backward -> g0  \
                   rank 1: 2 examples   sum of losses / 5  -> backward -> g1  /  g0 + g1 on both, then the same update

A rank without an example adds zeros. The model is not wrapped, so names, layers and checkpoints are those of one process.
Every rank calls each function here at the same place of the program; whatever decides (stop, skip, best) is computed from
sums that are equal to the bit on all ranks, so no rank ever goes its own way.

Launchers such as torchrun start the processes; `start` joins them. Numbers of the host go through gloo, gradients on GPUs
through NCCL. Nothing of torch.distributed is touched in one process. Li et al. 2020, arXiv:2006.15704, has the usual design.
"""

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from engine.errors import EngineError, InputError, RunError

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = datetime.timedelta(days=1)  # one rank may tokenise for long; a dead one is noticed by its closed connection
BUCKET = 1 << 24  # numbers that are summed at a time: 64 MB of float32

_rank, _world, _store = 0, 1, None


class RankLostError(RunError):
    """Another process of the run is gone; the last good checkpoint stays."""


def rank() -> int:
    """The number of this process, from 0; rank 0 alone writes and speaks."""
    return _rank


def world() -> int:
    """How many processes train together."""
    return _world


def start() -> None:
    """Join the processes that a launcher started; does nothing where there is one. InputError if they cannot work together."""
    global _rank, _world, _store
    if any(name not in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1" or _world > 1:
        return
    import torch
    import torch.distributed as dist

    backend, place = "gloo", int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and _here() <= torch.cuda.device_count():
        torch.cuda.set_device(place)  # from here on "cuda" is this one
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error
    _rank, _world, _store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()


def stop() -> None:
    """Wait for all, then part."""
    global _rank, _world, _store
    if _world > 1:
        import torch.distributed as dist

        barrier()
        dist.destroy_process_group()
        _rank, _world, _store = 0, 1, None


def first_failure(code: int) -> tuple[bool, int]:
    """Called by a rank that fails: (whether it is the first, which then says why; the exit code of the first)."""
    if _store is None:
        return True, code
    mine = f"{_rank} {code}"
    try:
        first = _store.compare_set("engine/failure", "", mine).decode()
    except RuntimeError:  # the store went with the launcher: there is no one to ask
        return True, code
    return first == mine, int(first.split()[1])


def share_devices(kind: str, where: str) -> None:
    """InputError if the ranks of this machine cannot each have a device of this kind."""
    if _world > 1 and kind != "cpu":
        import torch

        devices = torch.cuda.device_count() if kind == "cuda" else 1
        if _here() > devices:
            raise InputError(f"{where}: {_here()} processes and {devices} {kind} devices; NPROC={devices}, or train.device=cpu")


def _here() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def total(value: float) -> float:
    """The sum of `value` over all ranks; whole numbers stay whole."""
    return _reduced(value, "SUM")


def largest(value: float) -> float:
    """The largest `value` of all ranks."""
    return _reduced(value, "MAX")


def barrier() -> None:
    """Wait until all ranks are here."""
    total(0)


def gather(value: T) -> list[T]:
    """The `value` of every rank, in the order of the ranks, on all of them."""
    if _world == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _world
    _together(lambda: dist.all_gather_object(found, value))
    return found


def from_first(value: T | None) -> T:
    """Rank 0's `value`, on all ranks; what the others give is not looked at."""
    return gather(value if _rank == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 goes through the block first, the others after it: they find what it has put into a cache."""
    if _rank != 0:
        barrier()
    yield
    if _rank == 0:
        barrier()


def sum_gradients(parameters: Iterable[Any], loss: Any) -> None:
    """Add up the gradients of all ranks, and the loss, in place; every rank then holds the same bits.

    A parameter that has no gradient on any rank keeps None: an optimizer leaves it alone, where zeros would decay it. The
    gradients go through flat buffers of at most BUCKET numbers, or one parameter.
    """
    if _world == 1:
        return
    import torch
    import torch.distributed as dist

    parameters = list(parameters)
    flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64, device=loss.device)
    small = torch.cat([loss.double().reshape(1), flags])  # (1 + P,)
    _together(lambda: dist.all_reduce(small))
    loss.copy_(small[0])
    with_gradient = [p for p, ranks in zip(parameters, small[1:].tolist(), strict=True) if ranks]
    for bucket in _buckets(with_gradient):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        _together(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
        for p, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(summed.view(p.shape))


def _buckets(parameters: list[Any]) -> Iterator[list[Any]]:
    """In order; each of one type, on one device, and of at most BUCKET numbers, or one parameter."""
    bucket: list[Any] = []
    for p in parameters:
        full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
        if bucket and (full or (p.dtype, p.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def _reduced(value: float, operation: str) -> float:
    if _world == 1:
        return value
    import torch
    import torch.distributed as dist

    held = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    _together(lambda: dist.all_reduce(held, getattr(dist.ReduceOp, operation)))
    return held.item()


def _together(exchange: Callable[[], Any]) -> None:
    """One exchange; a rank that is gone is an error for people. What it died of, it has said itself, unless it was killed."""
    try:
        exchange()
    except EngineError:
        raise
    except RuntimeError as error:
        cause = "" if "peer" in str(error) else f" ({str(error).splitlines()[0]})"
        raise RankLostError(f"another process of this run ended without a word: killed, or out of memory?{cause}") from error
