"""The two errors people meet.

Every message says what is wrong, where (file:line or recipe key) and how to mend it. The command line prints the
message alone; a traceback appears only with --debug. Anything else that escapes is a bug in the engine.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class EngineError(Exception):
    """Base of the errors that are written for people; `code` is the exit code of the process."""

    code = 1


class InputError(EngineError):
    """The recipe, the data or the arguments are wrong: nothing was started, nothing was written."""

    code = 2


class RunError(EngineError):
    """A run that had begun cannot go on; the message says where its last good checkpoint is."""

    code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint of an unknown name: "; did you mean 'x'?", or the whole choice where nothing is near."""
    known = sorted(set(map(str, known)))
    close = get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known are: {', '.join(known)}" if known else ""


def listing(problems: list[str], most: int = 20) -> str:
    """Up to `most` problems, a line each, then how many were left out."""
    rest = len(problems) - most
    return "\n".join(problems[:most] + ([f"... and {rest} more"] if rest > 0 else []))
