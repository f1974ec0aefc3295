"""A process that has imported and warmed up everything once, and forks a run of the command line for each job.

    python forkserver.py FOLDER     jobs as JSON lines on stdin, results as JSON lines on stdout

A job: {"arguments": [...], "out": folder, "plan": {"at": [what, n], "do": ...} or {"after": seconds}}. `what` is
"operation" (the n-th storage operation in `out`), "evaluate" (the n-th batch of evaluations), "forward" (the n-th of training), "encode" (the n-th look of
the tokeniser) or a kind of operation on a path, such as "write:weights.safetensors". The result: the exit status as subprocess has it,
what the run said, the operations it made.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def warm(recipe: str) -> None:
    """Import and touch all that a run needs, so that a fork starts at once; the report's plots are left out."""
    import torch
    import tqdm

    from engine import __main__, disk, report

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread of its own
    report.write = lambda folder: disk.replace(folder / "report.html", b"report")  # type: ignore[assignment]
    __main__.main(["finetune", recipe, "--out", "warm"])
    threads = [Path(f"/proc/self/task/{number}/comm").read_text().strip() for number in os.listdir("/proc/self/task")]
    others = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # pyarrow's allocator looks after itself in a fork
    assert not others, f"threads {others}: a fork would not be whole"


def child(job: dict[str, Any], said: int, seen: Path) -> None:
    """One run, in a forked process; ends it."""
    import torch
    from storage import Operation, Watch, do

    from engine import __main__
    from engine.tasks import classification

    os.dup2(said, 1)
    os.dup2(said, 2)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    plan = job.get("plan") or {}
    what, n = plan.get("at", ("", 0))
    counts: dict[str, int] = {}
    log = seen.open("w", buffering=1)

    def happens(event: str, operation: Operation | None = None) -> None:
        counts[event] = counts.get(event, 0) + 1
        if event == "evaluate":
            log.write("evaluate batch\n")
        if event == what and counts[event] == n + 1:
            do(plan["do"], operation)

    def before(operation: Operation) -> None:
        log.write(f"{operation.kind} {operation.path}\n")
        happens("operation", operation)
        happens(f"{operation.kind}:{Path(operation.path).name}", operation)
        if operation.kind == "write":
            happens("write", operation)
        if ".trash." in operation.path or ".trash." in operation.to:
            happens("prune", operation)

    def noticed(name: str, original: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            happens("evaluate" if torch.is_inference_mode_enabled() else name)
            return original(*given, **more)

        return call

    for name in ("forward", "encode"):
        setattr(classification.Task, name, noticed(name, getattr(classification.Task, name)))
    Watch(Path(job["out"]), before).install()
    code = __main__.main(job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork, perhaps kill, wait."""
    text, seen = folder / "said", folder / "seen"
    said = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(job, said, seen)
    os.close(said)
    began = time.perf_counter()
    if "after" in (job.get("plan") or {}):
        time.sleep(job["plan"]["after"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    lines = seen.read_text().splitlines() if seen.exists() else []
    return {
        "code": os.waitstatus_to_exitcode(status),
        "said": text.read_text(errors="replace"),
        "operations": [line for line in lines if not line.startswith("evaluate")],
        "evaluations": sum(line.startswith("evaluate") for line in lines),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(folder / "warm.txt", os.O_WRONLY | os.O_CREAT, 0o600), 1)
    os.dup2(1, 2)
    os.chdir(folder)
    warm(sys.argv[2])
    gc.collect()
    gc.freeze()  # a child's collector then leaves the shared pages alone
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line), folder)) + "\n")


if __name__ == "__main__":
    main()
