"""Ctrl-C and SIGTERM: a flag that the loops look at, so that a step is finished and saved before the process ends.

Python runs a signal's handler between two of its own instructions, so not within one long product of matrices or while
a tokenizer, written in Rust, is at work. A thread waits at a pipe instead, into which the interpreter writes every signal
the moment it comes: it answers the first at once, and at the second ends the process, wherever it is.

    SIGINT   0.0 s   from the terminal          the first: finish this step, save, exit
    SIGINT   0.0 s   passed on by make          the same request: signals that come together are one
    SIGINT   3.1 s   from the terminal again    the second: the process ends
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 1.0  # seconds: a terminal, make and torchrun each pass the same Ctrl-C on


class Interrupt:
    """Callable: whether a signal has come. `code` is the exit code it asks for (130, 143), or 0.

    A second request ends the process at once: the checkpoint protocol keeps the last checkpoint whole. `with Interrupt():`
    listens for the block, and gives the signals back to whoever had them.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.signal != 0

    @property
    def code(self) -> int:
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> "Interrupt":
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._woken = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *raised: object) -> None:
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._in, b"\0")  # no signal has this number: the thread ends
        self._watcher.join()
        os.close(self._in)
        os.close(self._out)

    def ignore(self) -> None:
        """What ends anyway, with its own exit code, is not to be ended by a signal: from here to the end of the process."""
        self._before = {}
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def _watch(self) -> None:
        first = None
        while True:
            for number in os.read(self._out, 64):
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                now = time.monotonic()
                if first is None:
                    first = now
                    self._note(number, None)
                    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
                        name = signal.Signals(number).name
                        print(f"\n{name}: finishing this step, then saving (once more ends at once)", file=sys.stderr, flush=True)
                elif now - first > TOGETHER:
                    os._exit(128 + number)
