"""Signals, in a process of its own that imports next to nothing: at once, also within C code; together they are one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine import find
from engine.interrupt import TOGETHER, Interrupt

LASTS = {  # one call each, of ten seconds and more
    "an own sum": "import hashlib; busy = lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "a tokenizer": (
        "from tokenizers import Tokenizer, models; t = Tokenizer(models.BPE({'a': 0, 'aa': 1}, [('a', 'a')]));"
        " busy = lambda: t.encode_batch(['a' * 100_000] * 150)"
    ),
}
PROGRAM = """
from engine.interrupt import Interrupt
{what}
with Interrupt() as interrupt:
    print("ready", flush=True)
    busy()
    print("done", interrupt.code, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", LASTS)
def test_the_first_is_answered_and_the_second_ends_at_once_within_c_code(what: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(what=LASTS[what])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(find.PROJECT)},
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # into the call
    process.send_signal(number)
    process.send_signal(signal.SIGINT)  # with it, as make does
    assert process.stderr.readline() == "\n"
    assert f"{number.name}: finishing this step" in process.stderr.readline() or number == signal.SIGTERM  # either may be first
    time.sleep(TOGETHER + 0.1)
    assert process.poll() is None
    process.send_signal(number)
    began = time.monotonic()
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "")
    assert time.monotonic() - began < 5


def test_a_block_gives_the_signals_back_and_leaves_no_thread_and_no_file() -> None:
    import threading

    before, handlers = sorted(os.listdir("/proc/self/fd")), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(3):
        with Interrupt() as interrupt:
            assert not interrupt()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt()
            assert interrupt.code == 143
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.code == 143  # together: one request, the first names it
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]
