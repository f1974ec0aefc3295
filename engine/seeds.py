"""Every random number, as a pure function of (seed, place): there is almost no random state to save.

Data order comes from (seed, epoch), in engine/data/windows.py; dropout from (seed, step, micro-batch, rank), by
re-seeding torch's generators before each forward pass. A resumed run therefore draws what the uninterrupted one would have drawn.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

place: tuple[int, ...] = ()  # the last one that `seed_all` was given


def derive(*place: int) -> int:
    """A 63-bit seed from a tuple of whole numbers; near places give unrelated seeds (numpy's SeedSequence)."""
    words = np.random.SeedSequence(list(place)).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def seed_all(*where: int) -> None:
    """Seed torch (all devices), numpy and random from a place, such as (seed, step, micro_batch)."""
    global place
    place, seed = where, derive(*where)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # asking every kind of device that is not there takes longer than all the rest
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def untouched() -> Iterator[None]:
    """Leave every generator after the block as it was before."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(array)
