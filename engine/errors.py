"""The two errors people meet.

Every message says what is wrong, where (file:line or recipe key) and how to mend it. The command line prints the
message alone; a traceback appears only with --debug. Anything else that escapes is a bug in the engine.

Messages quote what stands in files, and files are written by anyone: a label may hold ESC [ 2 J, which clears the screen,
or U+202E, which turns the line around. `plain` makes such characters visible, so none reaches a terminal raw.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 1000  # characters of one line of a message, which may quote a name of any length


class EngineError(Exception):
    """Base of the errors that are written for people; `code` is the exit code of the process."""

    code = 1

    def __init__(self, message: str):
        super().__init__(
            "\n".join(line if len(line) <= LONGEST else line[:LONGEST] + " ..." for line in plain(message).split("\n"))
        )


class InputError(EngineError):
    """The recipe, the data or the arguments are wrong: nothing was started, nothing was written."""

    code = 2


class RowError(InputError):
    """A row that shows only when it is tokenised that it cannot be used; `row` counts from 0 among those that were given."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row

    def at(self, places: list[str]) -> InputError:
        """The same with file:line, from where each row stands."""
        return InputError(f"{places[self.row]}: {self}")


class RunError(EngineError):
    """A run that had begun cannot go on; the message says where its last good checkpoint is."""

    code = 1


# C0 but tab and newline, DEL, C1; line and paragraph separators; marks that turn the writing direction; lone surrogates
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with every character that steers a terminal written as an escape: ESC becomes \\x1b."""
    return _UNSAFE.sub(lambda m: m[0].encode("unicode_escape", "surrogatepass").decode(), text)


def quoted(value: object, most: int = 60) -> str:
    """A value from a file as a message shows it: on one line, in quotes where it is a text, at most `most` characters."""
    text = f"'{value[: most + 1]}'" if isinstance(value, str) else "null" if value is None else str(value)
    text = plain(text.replace("\n", "\\n").replace("\t", "\\t"))
    return text if len(text) < most else text[: most - 3] + "..."


def nearest(name: str, known: Iterable[str], most: int = 20) -> str:
    """The hint of an unknown name: "; did you mean 'x'?", or the choice (`most` of it) where nothing is near."""
    known = sorted(set(map(str, known)))
    some = known if len(known) <= 300 else [k for k in known if k[:3] == str(name)[:3]][:300]  # a comparison takes 0.1 ms
    close = get_close_matches(str(name), some, n=1, cutoff=0.6) if len(str(name)) < 200 else []
    if close:
        return f"; did you mean {quoted(close[0])}?"
    rest = f" and {len(known) - most:,} more" if len(known) > most else ""
    return f"; known are: {', '.join(quoted(k)[1:-1] for k in known[:most])}{rest}" if known else ""


def listing(problems: list[str], most: int = 20) -> str:
    """Up to `most` problems, a line each, then how many were left out."""
    rest = len(problems) - most
    return "\n".join(problems[:most] + ([f"... and {rest} more"] if rest > 0 else []))
