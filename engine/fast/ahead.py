"""Windows made ahead: while a step runs, a thread makes the next window's micro-batches.

    thread     window 1 | window 2 |          window 3 |          ...
    loop                | step on 1           | step on 2         ...

Order, contents and errors are those of the windows themselves, one is made ahead and no more, and the thread ends with the
epoch, however the loop leaves it. A window that was cut before memory ran short is cut anew by the smaller budget. For a GPU
the thread puts what it made into pinned memory, from where the loop's copies run beside the computation.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from engine.data.windows import Window, Windows


class Ahead:
    """The same windows, one step earlier. Everything else is asked of the windows themselves."""

    def __init__(self, windows: Windows, device: torch.device):
        self.windows, self.pin = windows, device.type == "cuda"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.windows, name)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Window]:
        """The windows of one epoch from number `skip` on."""
        made = self.windows.epoch(epoch, skip)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="windows") as thread:
            coming = thread.submit(self._next, made)
            while (pair := coming.result()) is not None:
                window, tokens = pair
                coming = thread.submit(self._next, made)
                yield window if tokens == self.windows.tokens else self.windows.window(window.rows, window.epoch)

    def _next(self, made: Iterator[Window]) -> tuple[Window, int] | None:
        """The next window and the budget it was cut by; None after the last."""
        tokens = self.windows.tokens
        window = next(made, None)
        if window is None:
            return None
        if self.pin:
            window.micro_batches = [{k: v.pin_memory() for k, v in batch.items()} for batch in window.micro_batches]
        return window, tokens
