"""python -m engine.launch N VERB ...: torchrun with N processes on this machine, and the exit code and silence of one.

torchrun starts the processes, tells each its rank, passes signals on, and ends the others when one fails. By itself it
answers every failure with a traceback and exit code 1; here the ranks have said what was wrong, once, so its exit code
is that of the rank that failed first: 1 failed, 2 wrong input, 130 / 143 stopped by a signal after saving.
"""

import logging
import os
import sys
import tempfile

LONGEST = 300  # seconds that a rank may take to finish its step and save after a signal, or to notice that another has failed


def main(arguments: list[str]) -> int:
    """Run `python -m engine` in `arguments[0]` processes; returns the exit code."""
    if not arguments or not arguments[0].isascii() or not arguments[0].isdigit() or not 0 < int(arguments[0]) <= 1024:
        print("error: python -m engine.launch N VERB ...: N is the number of processes, from 1", file=sys.stderr)
        return 2
    count = int(arguments[0])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with tempfile.TemporaryDirectory(prefix="engine-ranks-") as folder:  # torchrun's own would stay where a rank fails
        return launched(count, arguments[1:], folder)


def launched(count: int, arguments: list[str], folder: str) -> int:
    """Run the ranks, whose notes to torchrun go into `folder`; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for name in ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.launcher"):
        for logger in [name, *(n for n in logging.root.manager.loggerDict if n.startswith(name + "."))]:
            logging.getLogger(logger).setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc-per-node={count}", f"--shutdown-timeout={LONGEST}", "--monitor-interval=0.1"]
    try:
        run(parse_args([*options, "--log-dir", folder, "-m", "engine", *arguments]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
