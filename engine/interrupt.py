"""Ctrl-C and SIGTERM: a flag that the loops look at, so that a step is finished and saved before the process ends."""

import os
import signal
import sys
from types import FrameType


class Interrupt:
    """Callable: whether a signal has come. `code` is the exit code it asks for (130, 143), or 0.

    A second signal ends the process at once: the checkpoint protocol keeps the last checkpoint whole.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        return self.signal != 0

    @property
    def code(self) -> int:
        return 128 + self.signal if self.signal else 0

    def install(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        return self

    def ignore(self) -> None:
        """What ends anyway, with its own exit code, is not to be ended by a signal."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"\n{name}: finishing this step, then saving (once more ends at once)", file=sys.stderr, flush=True)
