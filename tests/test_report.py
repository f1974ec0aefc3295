"""What a report shows: labels of any script as characters, right and wrong in their colours, nothing twice."""

import base64
import json
import re
from pathlib import Path

import pytest
from conftest import MakeRecipe, make_rows, write_jsonl
from matplotlib import font_manager

from engine import report
from engine.blocks import Matrix
from engine.finetune import finetune
from engine.tasks import multilabel, regression
from engine.tasks._base import shown_columns

GOOD, BAD = "\u597d\u8bc4", "\u5dee\u8bc4"  # Chinese for a favourable and an unfavourable review
OWN = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu Sans", "Last Resort"))]  # matplotlib's


@pytest.fixture
def no_other_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has only the fonts that come with matplotlib; one of them draws boxes for all there is."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(OWN))
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


@pytest.mark.usefixtures("no_other_fonts", "draws")
def test_labels_of_any_script_are_characters_on_the_page(recipe: MakeRecipe) -> None:
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        rows = [{**row, "label": GOOD if row["label"] == "positive" else BAD} for row in make_rows(24, seed)]
        write_jsonl(Path(f"{split}.jsonl"), rows)
    finetune(recipe("train.epochs=1"), "run", say=lambda line: None)
    page = Path("run/report.html").read_text("utf-8")
    drawn = {
        name: base64.b64decode(data).decode()
        for name, data in re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page)
    }
    svg = drawn["Confusion matrix"]
    for label in (GOOD, BAD):
        assert re.search(rf"<text[^>]*>{label}</text>", svg), "a label in the plot is text, which the browser has a font for"
        assert f"<td>{label}</td>" in page, "the table has it too"
    assert "<text" in drawn["loss over the steps"]
    assert Path("run/plots/confusion.svg").read_text("utf-8") == svg, "beside a PNG that no font could write the labels into"
    assert Path("run/plots/confusion.png").stat().st_size > 1000
    assert not Path("run/plots/loss.svg").exists()
    json.loads(Path("run/metrics.json").read_text())


@pytest.mark.usefixtures("no_other_fonts")
def test_what_no_font_can_write_gets_a_number_in_the_png() -> None:
    block = Matrix("confusion", "Confusion matrix", ["one", GOOD, "na\u00efve", BAD], [[1] * 4] * 4)
    made = report._drawable(block)
    assert made.labels == ["one", "#2", "na\u00efve", "#4"]
    assert "confusion.svg" in made.title
    plain = Matrix("confusion", "Confusion matrix", ["a", "\u00e9t\u00e9", "\u0434\u0430"], [[1] * 3] * 3)
    assert report._drawable(plain) is plain


def test_a_font_that_has_the_characters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = [*OWN, font_manager.FontEntry(fname="/fonts/han.ttf", name="Han"), font_manager.FontEntry(fname="/fonts/gone.ttf")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    real = report._glyphs

    def glyphs(path: str) -> frozenset[int]:
        if path == "/fonts/han.ttf":
            return frozenset(map(ord, GOOD + BAD))
        return real(path)

    monkeypatch.setattr(report, "_glyphs", glyphs)
    monkeypatch.setitem(report.matplotlib.rcParams, "font.family", ["DejaVu Sans"])
    block = Matrix("confusion", "t", [GOOD, BAD], [[1, 0], [0, 1]])
    assert report._drawable(block) is block
    assert report.matplotlib.rcParams["font.family"] == ["DejaVu Sans", "Han"]
    assert report._drawable(Matrix("c", "t", ["\u0e01"], [[1]])).labels == ["#1"]


def test_each_label_of_several_is_right_missed_or_wrong_by_itself() -> None:
    line = {"text": "it made me jump, then laugh", "labels": ["joy", "fear"], "label": ["fear", "joy"], "prediction": ["joy", "love"], "loss": 1.0,
            "probabilities": {}}  # fmt: skip
    example = multilabel.Task.example(line)
    truth, predicted = ([(span.text, span.kind) for span in cell if span.text.strip()] for cell in example.cells)
    assert truth == [("fear", "missed"), ("joy", "good")]
    assert predicted == [("joy", "good"), ("love", "bad")]
    assert not example.right
    assert example.other == {}, "the truth is not told twice"
    assert [span.text for span in multilabel.Task.example({**line, "prediction": []}).cells[1]] == ["(none)"]


def test_both_texts_of_a_pair_are_shown_as_texts_however_short() -> None:
    line = {
        "text": "He has no money at all.",
        "text_pair": "He is broke.",
        "score": 4.8,
        "label": 4.8,
        "prediction": 3.5,
        "loss": 1.0,
    }
    example = regression.Task.example(line)
    assert example.texts == {"text": line["text"], "text_pair": line["text_pair"]}
    assert example.other == {}
    assert shown_columns({"review": "\u5f88\u597d\u5403", "n": 3, "kind": "app", "label": 1})[0] == {
        "review": "\u5f88\u597d\u5403"
    }
    assert shown_columns({"text": "fine", "label": "fine"}) == ({"text": "fine"}, {}), "a short text alone is still shown"


def test_a_share_beside_a_large_number_has_its_own_scale() -> None:
    told = [{"event": "evaluation", "step": i, "loss": 1.0, "perplexity": 700.0 / i, "accuracy": 0.1 * i} for i in (1, 2, 3)]
    left, right = report._metrics(told, 3).axes
    assert right.get_ylim()[1] < 1 < left.get_ylim()[0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["perplexity", "accuracy"]
    (alone,) = report._metrics([{**one, "perplexity": 0.5} for one in told], 3).axes
    assert len(alone.get_legend().get_texts()) == 2
