"""World and totals: what the loop asks of several processes. In one process they cost nothing."""

import torch.distributed as dist


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if active() else 1


def total(value: float) -> float:
    """The sum of `value` over all processes."""
    if not active():
        return value
    gathered: list[float | None] = [None] * world()
    dist.all_gather_object(gathered, value)
    return sum(v for v in gathered if v is not None)
