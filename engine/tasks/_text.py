"""A text, or a pair of texts, as the input of a task: columns, what can be wrong with them, tokens.

text  ->  [CLS] a b c [SEP]            text, text_pair  ->  [CLS] a b c [SEP] d e [SEP]
"""

from typing import Any, ClassVar

from engine.data.read import Row
from engine.tasks._base import Base


class TextTask(Base):
    """The half of a task that reads its texts; the class that derives from it adds target, loss and judgement."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    pipeline_tag: ClassVar[str] = "text-classification"

    def problem(self, row: Row, target: bool = True) -> tuple[str, str] | None:
        """(reason, detail) of what makes a row unusable, or None."""
        for role in ("text", "text_pair"):
            if role in self.columns and (found := text_problem(row, role, self.columns[role])):
                return found
        return self.target_problem(row) if target else None

    def target_problem(self, row: Row) -> tuple[str, str] | None:
        """The same for what the row says is true."""
        raise AssertionError("a task says what is wrong with its target")

    def text_of(self, row: Row) -> str:
        """The whole input of a row as one text, to find duplicates by."""
        return "\x1f".join(str(row.get(self.columns[r], "")) for r in ("text", "text_pair") if r in self.columns)

    def tokens(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Ragged input_ids (and token_type_ids of pairs), and what was cut."""
        texts = [row[self.columns["text"]] for row in rows]
        pairs = [row[self.columns["text_pair"]] for row in rows] if "text_pair" in self.columns else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        out = {"input_ids": encoded["input_ids"], "truncated": [bool(e.overflowing) for e in encoded.encodings]}
        if pairs and "token_type_ids" in encoded:
            out["token_type_ids"] = encoded["token_type_ids"]
        return out


def text_problem(row: Row, role: str, name: str) -> tuple[str, str] | None:
    """(reason, detail) if column `name` holds no text that a tokenizer takes."""
    text = row.get(name)
    if text is None:
        return f"missing {role}", f"column '{name}' is missing or null"
    if not isinstance(text, str):
        return f"{role} is no text", f"column '{name}' holds a {type(text).__name__} ({text!r:.40}), not a text"
    if not text.strip():
        return f"empty {role}", f"column '{name}' is empty"
    if not text.isascii() and broken(text):
        return f"{role} is no text", f"column '{name}' holds half of a surrogate pair, which is no character"
    return None


def broken(text: str) -> bool:
    """Whether a lone surrogate stands in `text`, as the bytes of a command line that are not UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
