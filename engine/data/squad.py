"""SQuAD's JSON to rows: one row a question, with its context.

    {"version": "v2.0", "data": [
      {"title": "...", "paragraphs": [
        {"context": "...", "qas": [
          {"id": "...", "question": "...", "answers": [{"text": "...", "answer_start": 34}], "is_impossible": false}]}]}]}

      ->  {"id", "title", "question", "context", "answers", "is_impossible"}

v1.1 has no is_impossible. v2.0 marks questions that the context does not answer with it, their answers are []; the answers
that look right but are not (plausible_answers) are left out. Whatever else a question, its paragraph and its article hold
stays in its row.

These files are often one long line, so a place is more than a line: "dev.json:1, article 3, paragraph 2, question 56be".
To know the lines at all, the outer four levels are walked here and only what they hold is left to the JSON decoder.
(Rajpurkar et al. 2016, arXiv:1606.05250; Rajpurkar, Jia, Liang 2018, arXiv:1806.03822)
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from engine.data.read import _DECODER, DIGITS, Bad, Row, _NotARowError, _object
from engine.errors import InputError, quoted

BLANK = re.compile(r"[ \t\r\n]*")
SIMPLE = re.compile(r"[\w.-]{1,60}")  # an id that a place may hold as it is
Read = Callable[[int], tuple[Any, int]]  # where a value begins -> the value, where it ends


def questions(text: str, name: str, bad: Bad) -> Iterator[tuple[str, Row]]:
    """(place, row) of each question. InputError where the file is no JSON, or JSON of another shape."""
    walk = _Walk(text, name, bad)
    try:
        top, end = walk.mapping(walk.skip(0), {"data": walk.articles})
        if (after := walk.skip(end)) < len(text):
            raise json.JSONDecodeError("something stands after the end, and would be lost", text, after)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}:{error.colno}: this is not SQuAD's JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # where this value ends is not known, so the others cannot be read
        deep = "nested too deep" if isinstance(error, RecursionError) else DIGITS
        said = str(error) if isinstance(error, _NotARowError) else deep
        raise InputError(f"{name}:{walk.line(walk.at)}: this is not SQuAD's JSON: {said}") from error
    if "data" not in top:
        raise InputError(f'{name}:1: a SQuAD file is an object {{"data": [articles]}}; there is no "data"')
    yield from walk.rows


class _Walk:
    """The way down: data, articles, paragraphs, questions. Positions only grow."""

    def __init__(self, text: str, name: str, bad: Bad):
        self.text, self.name, self.bad = text, name, bad
        self.rows: list[tuple[str, Row]] = []
        self.article = self.paragraph = 0
        self.found: list[tuple[int, Row, str]] = []  # (line, question, its source) of one paragraph
        self.broken = ""  # what is wrong with the paragraph's context
        self.of_article: list[tuple[str, Row]] = []
        self.at = self._counted = 0
        self._line = 1

    def line(self, at: int) -> int:
        self._line, self._counted = self._line + self.text.count("\n", self._counted, at), at
        return self._line

    def skip(self, at: int) -> int:
        return BLANK.match(self.text, at).end()  # type: ignore[union-attr]

    def expect(self, mark: str, at: int, what: str) -> int:
        if self.text[at : at + 1] != mark:
            raise json.JSONDecodeError(f"{what} must begin with {mark} here", self.text, at)
        return at + 1

    def value(self, at: int) -> tuple[Any, int]:
        self.at = at
        made: tuple[Any, int] = _DECODER.raw_decode(self.text, at)
        return made

    def mapping(self, at: int, inside: dict[str, Read], what: str = "the file") -> tuple[Row, int]:
        """An object whose keys in `inside` are read by functions of their own."""
        out: Row = {}
        at = self.skip(self.expect("{", at, what))
        while self.text[at : at + 1] != "}":
            if self.text[at : at + 1] != '"':
                raise json.JSONDecodeError("a key in double quotes is missing", self.text, at)
            key, at = self.value(at)
            if key in out:
                raise _NotARowError(f"the key {quoted(key)} stands twice in one object")
            at = self.skip(at)
            if self.text[at : at + 1] != ":":
                raise json.JSONDecodeError("a : is missing", self.text, at)
            out[key], at = inside.get(key, self.value)(self.skip(at + 1))
            at = self.next(at, "}")
        return out, at + 1

    def next(self, at: int, close: str) -> int:
        """Where the next member begins, or the closing mark stands."""
        at = self.skip(at)
        if self.text[at : at + 1] == ",":
            at = self.skip(at + 1)
            if self.text[at : at + 1] == close:
                raise json.JSONDecodeError(f"a comma stands before the {close}", self.text, at)
        elif self.text[at : at + 1] != close:
            raise json.JSONDecodeError(f"a comma or {close} is missing", self.text, at)
        return at

    def listed(self, at: int, what: str, each: Read) -> tuple[int, int]:
        """A list read one by one: (how many, where it ends)."""
        at, count = self.skip(self.expect("[", at, what)), 0
        while self.text[at : at + 1] != "]":
            count += 1
            at = self.next(each(at)[1], "]")
        return count, at + 1

    # -- the four levels ----------------------------------------------------------------------------------------------

    def articles(self, at: int) -> tuple[int, int]:
        return self.listed(at, "the list of articles", self.one_article)

    def one_article(self, at: int) -> tuple[None, int]:
        self.article, self.paragraph, self.of_article, line = self.article + 1, 0, [], self.line(at)
        article, end = self.mapping(at, {"paragraphs": self.paragraphs}, "an article")
        if "paragraphs" not in article:
            self.bad(f"{self.name}:{line}, article {self.article}", "no row", 'this article has no "paragraphs"')
        self.rows += [(place, {k: v for k, v in article.items() if k != "paragraphs"} | row) for place, row in self.of_article]
        return None, end

    def paragraphs(self, at: int) -> tuple[int, int]:
        return self.listed(at, "an article's paragraphs", self.one_paragraph)

    def one_paragraph(self, at: int) -> tuple[None, int]:
        self.paragraph, self.found, self.broken, line = self.paragraph + 1, [], "", self.line(at)
        paragraph, end = self.mapping(at, {"qas": self.qas, "context": self.context}, "a paragraph")
        where = f"article {self.article}, paragraph {self.paragraph}"
        if "qas" not in paragraph:
            self.bad(f"{self.name}:{line}, {where}", "no row", 'this paragraph has no "qas"')
        about = {k: v for k, v in paragraph.items() if k != "qas"}
        for number, (at_line, qa, source) in enumerate(self.found, 1):
            known = qa.get("id") if isinstance(qa, dict) else None
            which = known if isinstance(known, str) and SIMPLE.fullmatch(known) else number
            place = f"{at_line}, {where}, question {which}"
            try:
                made = _object(qa, source)
                if self.broken:
                    raise _NotARowError(f"in the context, {self.broken}")
            except _NotARowError as error:
                self.bad(f"{self.name}:{place}", "no row", str(error))
                continue
            self.of_article.append((place, about | {k: v for k, v in made.items() if k != "plausible_answers"}))
        return None, end

    def context(self, at: int) -> tuple[Any, int]:
        context, end = self.value(at)
        try:
            _object({"context": context}, self.text[at:end])
        except _NotARowError as error:
            self.broken = str(error)
        return context, end

    def qas(self, at: int) -> tuple[int, int]:
        return self.listed(at, "a paragraph's questions", self.one_question)

    def one_question(self, at: int) -> tuple[None, int]:
        line = self.line(at)
        qa, end = self.value(at)
        self.found.append((line, qa, self.text[at:end]))
        return None, end
