"""report.html: one self-contained page about a run, made from the run folder alone. And plots/*.png."""

import base64
import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from engine import disk, find
from engine.blocks import Examples, Matrix, Points, Table
from engine.blocks import shown as shown_text
from engine.errors import plain
from engine.watch import read_log

TEMPLATE = Path(__file__).with_name("report.html.j2")
INK, SOFT, BLUE, ORANGE, GREEN = "#1d2733", "#9aa7b4", "#2563a8", "#d9730d", "#2e7d4f"
matplotlib.rcParams.update({
    "font.size": 9.5, "font.family": ["DejaVu Sans"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": SOFT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#e6eaee",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 140,
    "svg.fonttype": "none",  # text stays text: the browser has fonts for more scripts than matplotlib finds
})  # fmt: skip
matplotlib.set_loglevel("ERROR")  # a font that is absent is no news


def write(folder: Path) -> Path:
    """Write plots/*.png and report.html into the run folder; returns the page's path."""
    log = read_log(folder / "log.jsonl")
    results = json.loads((folder / "metrics.json").read_text("utf-8"))
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    by_event: dict[str, list[dict[str, Any]]] = {}
    for record in log:
        by_event.setdefault(record["event"], []).append(record)
    plots = folder / "plots"
    with disk.refusing(plots, 0):
        disk.make(plots)
    figures = {"loss": _loss(by_event, results["best_step"])}
    if len(by_event.get("evaluation", [])) > 0:
        figures["metrics"] = _metrics(by_event["evaluation"], results["best_step"])
    figures["schedule"] = _schedule(by_event.get("step", []))
    final = "test" if "test" in results else "validation" if "validation" in results else None
    recipe, rows = _recipe(folder), _predictions(folder, final)
    task = find.module("tasks", recipe["task"], str(folder)).Task
    shown = task.sections(results["detail"][final], rows) if final else []
    drawn = [block for block in shown if isinstance(block, Matrix | Points)]
    numbered = {block.name: made for block in drawn if isinstance(block, Matrix) and (made := _drawable(block)) is not block}
    figures |= {block.name: _DRAW[type(block)](block) for block in drawn}
    images = {}
    for name, figure in figures.items():
        svg = _saved(figure, "svg", {"Date": None})
        images[name] = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
        if name in numbered:  # the PNG cannot show its labels; this file can
            disk.replace(plots / f"{name}.svg", svg)
            figure = _matrix(numbered[name])
        disk.replace(plots / f"{name}.png", _saved(figure, "png", {"Software": None}))
    judged = [task.wrong(row) for row in rows]
    data = {}
    for name, fact in by_event["data"][0]["splits"].items():
        data[name] = fact | {"summary": "all tasks" if fact.get("tasks") else task.summary(fact)}
        for part, one in fact.get("tasks", {}).items():
            summary = find.module("tasks", one["task"], str(folder)).Task.summary(one)
            data[f"{name}: {part}"] = one | {"summary": summary}
    page = _template().render(
        folder=folder.name, recipe_text=(folder / "recipe.yaml").read_text("utf-8"), recipe=recipe, results=results,
        environment=environment, final=final, images=images, rows=len(rows), wrong=None if None in judged else sum(judged),
        plots=[(block.name, block.title) for block in drawn], tables=[block for block in shown if isinstance(block, Table)],
        examples=[block for block in [*shown, task.mistakes(rows)] if isinstance(block, Examples)], cell=shown_text,
        data=data, model=by_event["model"][0], plan=by_event["plan"][0],
        notes=[n["note"] for n in by_event.get("note", [])], kernels=[k["found"] for k in by_event.get("kernels", [])],
        seconds=by_event.get("finished", [{}])[-1].get("seconds"), headline=by_event["plan"][0]["metrics"] if final else [],
        skipped=by_event.get("skipped", []),
        command=" ".join(environment["command"]), resumed=environment.get("resumed", []),
    )  # fmt: skip
    path = folder / "report.html"
    disk.replace(path, page.encode())
    return path


def _template() -> jinja2.Template:
    made = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return made.from_string(TEMPLATE.read_text("utf-8"))


def _saved(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of text that the browser draws, or that is numbered
        figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)
    return buffer.getvalue()


@cache
def _glyphs(path: str) -> frozenset[int]:
    """The characters that a font file has."""
    return frozenset(FT2Font(path).get_charmap())


def _has_font(text: str) -> bool:
    """Whether a font that can be found has every character of `text`; such a font joins those that are drawn with."""
    missing = {ord(c) for c in text} - _glyphs(font_manager.findfont("DejaVu Sans"))
    return not missing or any(_joins(font, missing) for fonts in (_known, _new) for font in fonts())


def _joins(font: Any, missing: set[int]) -> bool:
    try:
        found = not font.name.startswith("Last Resort") and missing <= _glyphs(font.fname)  # that one has a box for everything
    except (OSError, RuntimeError):  # it is listed and cannot be read
        return False
    family = matplotlib.rcParams["font.family"]
    if found and font.name not in family:
        matplotlib.rcParams["font.family"] = [*family, font.name]
    return found


def _known() -> list[Any]:
    """The fonts in matplotlib's list."""
    return list(font_manager.fontManager.ttflist)


def _new() -> list[Any]:
    """Fonts installed since matplotlib wrote that list down."""
    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    before = len(manager.ttflist)
    for path in font_manager.findSystemFonts():
        if path not in known:
            with contextlib.suppress(Exception):  # whatever is wrong with somebody's font file, a report needs it not
                manager.addfont(path)
    return list(manager.ttflist[before:])


def _drawable(block: Matrix) -> Matrix:
    """The block itself; or, where no font has a label's characters, with numbers for such labels instead of empty boxes."""
    labels = [label if _has_font(_tick(label)) else f"#{i}" for i, label in enumerate(block.labels, 1)]
    if labels == block.labels:
        return block
    return replace(block, labels=labels, title=f"{block.title} (the names: {block.name}.svg)")


def _recipe(folder: Path) -> Any:
    from engine.yaml12 import parse

    return parse((folder / "recipe.yaml").read_text("utf-8"), "recipe.yaml")[0]


def _predictions(folder: Path, split: str | None) -> list[dict[str, Any]]:
    if split is None:
        return []
    return [json.loads(line) for line in (folder / "predictions" / f"{split}.jsonl").read_text("utf-8").split("\n") if line]


def _axes(title: str, width: float = 6.4, height: float = 2.9) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    return figure, axes


def _mark_best(axes: Any, step: int) -> None:
    axes.axvline(step, color=GREEN, linewidth=1.2, linestyle=(0, (4, 3)))
    low, high = axes.get_xlim()
    right = step > (low + high) / 2
    axes.annotate(f"best: step {step} ", (step, 1.0), xycoords=("data", "axes fraction"), ha="right" if right else "left", va="top", color=GREEN,
                  xytext=(-3 if right else 4, -2), textcoords="offset points", fontsize=8.5)  # fmt: skip


def _loss(events: dict[str, list[dict[str, Any]]], best: int) -> Figure:
    figure, axes = _axes("Loss")
    points = [(r["step"], r["loss"]) for r in events.get("step", []) if r["loss"] is not None]
    if points:
        steps, losses = zip(*points, strict=True)
        smooth, average, weight = [], 0.0, 0.0
        for loss in losses:  # exponential moving average without the start's bias
            average, weight = 0.92 * average + 0.08 * loss, 0.92 * weight + 0.08
            smooth.append(average / weight)
        axes.plot(steps, losses, color=BLUE, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="train (smoothed)")
    evaluations = events.get("evaluation", [])
    if evaluations:
        axes.plot(
            [r["step"] for r in evaluations],
            [r["loss"] for r in evaluations],
            color=ORANGE,
            marker="o",
            markersize=4,
            label="validation",
        )
        _mark_best(axes, best)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    return figure


def _metrics(evaluations: list[dict[str, Any]], best: int) -> Figure:
    figure, axes = _axes("Validation metrics")
    names = [k for k, v in evaluations[0].items() if k not in ("event", "step", "epoch", "best", "loss", "time")]
    highest = {name: max((abs(r[name]) for r in evaluations if r[name] is not None), default=0.0) for name in names}
    large = max(highest.values(), default=0.0) > 20  # perplexity, say: beside it a share would be a flat line
    apart = [name for name in names if large and highest[name] <= 1]  # these have their scale on the right
    right = axes.twinx() if apart else axes
    for name, color, style in zip(
        names, (BLUE, ORANGE, INK, SOFT, GREEN, "#8e44ad"), ("-", "--", "-.", ":", "-", "--"), strict=False
    ):
        values = [r[name] for r in evaluations]
        side = right if name in apart else axes
        side.plot([r["step"] for r in evaluations], values, color=color, linestyle=style, marker="o", markersize=4, label=name)
    _mark_best(axes, best)
    axes.set_xlabel("step")
    axes.margins(y=0.15)
    lines = list(axes.get_lines())
    if apart:
        right.grid(False)
        right.margins(y=0.15)
        lines += right.get_lines()
    lines = [line for line in lines if line.get_label() in names]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    return figure


def _schedule(steps: list[dict[str, Any]]) -> Figure:
    figure, axes = _axes("Learning rate and gradient norm")
    axes.plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], color=BLUE, label="learning rate")
    axes.set_xlabel("step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    twin = axes.twinx()
    twin.grid(False)
    twin.plot(
        [r["step"] for r in steps],
        [r["grad_norm"] for r in steps],
        color=ORANGE,
        alpha=0.55,
        linewidth=0.9,
        label="gradient norm",
    )
    lines = [*axes.get_lines(), *twin.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    return figure


def _tick(label: str) -> str:
    """A label as a plot shows it: short, on one line, and no formula where a $ stands in it."""
    label = plain(label).replace("\n", " ").replace("$", r"\$")
    return label if len(label) <= 40 else label[:37] + "..."


def _matrix(block: Matrix) -> Figure:
    labels, counts = [_tick(label) for label in block.labels], block.counts
    size = 2.2 + 0.55 * len(labels)
    figure, axes = _axes(block.title, min(9.0, size + 1), min(8.0, size))
    axes.grid(False)
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 20:
        for i, row in enumerate(counts):
            for j, n in enumerate(row):
                text, color = f"{n}\n{shares[i][j]:.0%}", "white" if shares[i][j] > 0.55 else INK
                axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color=color)
    many = len(labels) > 3
    axes.set_xticks(range(len(labels)), labels, rotation=30 if many else 0, ha="right" if many else "center")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    return figure


def _points(block: Points) -> Figure:
    figure, axes = _axes(block.title, 4.2, 3.2)
    if block.line:
        axes.plot(*zip(*block.line, strict=True), color=SOFT, linewidth=1, linestyle="--", label=block.said or None)
    if block.sizes:
        axes.scatter(block.x, block.y, s=[18 + 300 * share for share in block.sizes], color=BLUE, alpha=0.75, linewidths=0)
    else:
        axes.scatter(block.x, block.y, s=14, color=BLUE, alpha=min(0.75, max(0.15, 200 / max(1, len(block.x)))), linewidths=0)
    axes.set_xlabel(block.across)
    axes.set_ylabel(block.up)
    if block.limits:
        axes.set_ylim(*block.limits)
    if block.said:
        axes.legend(loc="best")
    return figure


_DRAW: dict[type, Callable[[Any], Figure]] = {Matrix: _matrix, Points: _points}
