"""Multitask: several tasks, each with its own data and head, on one shared encoder.

    texts of sentiment   ->  \\             / -> head of sentiment   (B, 2)
    texts of topics      ->   one encoder  --> head of topics       (B, 5)
    pairs of similarity  ->  /             \\ -> head of similarity  (B, 1)

Every window is drawn from one task (data.mixing, engine/data/several.py). Loss: that task's own sum, times its weight; items
are its own. The parts are the tasks of this folder, each as it is alone: this file asks the one that a batch belongs to, and
puts a task's name before its scores. So a single task through here is the same run, bit for bit, as without.

Scores are NAME.METRIC, and `mean`: the mean over the tasks of the first metric of each, on a scale of 0 to 1 (question
answering counts to 100, and is divided by it). `loss` is the mean of the tasks' losses by their weights. A head that a window
does not use has no gradient in it, and the optimizer leaves it as it is.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from engine import find
from engine.blocks import Block, Examples, Matrix, Points, Table
from engine.data.read import Row
from engine.errors import InputError, nearest
from engine.metrics import Metric
from engine.schema import Data, Files
from engine.tasks._base import Base, Judged

MEAN = "mean"


class Options(Data):
    """Defaults of all tasks, and how they are mixed."""

    train: Files | None = Field(None, description="The rows to learn from, of tasks that name none themselves.")  # type: ignore[assignment]
    mixing: Literal["proportional", "temperature", "round_robin"] = Field(
        "proportional", description="Windows of an epoch: by size, by size to the power 1 / temperature, or each task in turn."
    )
    temperature: float = Field(2.0, ge=1, description="Of `mixing: temperature`: 1 is proportional, the larger the more equal.")


@dataclass
class Several(Judged):
    """The rows of all tasks, and each task's own."""

    parts: dict[str, Judged] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean of the tasks' losses, by their weights."""
        total = sum(self.weights[name] for name in self.parts)
        return sum(self.weights[name] * one.loss for name, one in self.parts.items()) / total


class Task(Base):
    """The tasks `parts` by name, and the weight and the headline metrics of each."""

    roles: ClassVar[dict[str, str]] = {}
    auto_class: ClassVar[str] = "AutoModel"  # of the encoder; a head's is its task's own
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    pipeline_tag: ClassVar[str] = "feature-extraction"
    default_metrics: ClassVar[list[str]] = [MEAN]
    metrics: ClassVar[dict[str, Metric]] = {}
    answer: ClassVar[str] = "answers"

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        super().__init__({}, None, options)  # columns and labels are defaults of the parts
        self.parts: dict[str, Base] = {}
        self.weights: dict[str, float] = {}
        self.headline: dict[str, list[str]] = {}

    def hold(self, parts: dict[str, Any], said: dict[str, Any]) -> None:
        """Take the tasks in; `said` is what the recipe says of each (schema.Part)."""
        self.parts, self.weights = parts, {name: said[name].weight for name in parts}
        self.headline = {name: said[name].metrics or part.default_metrics[:1] for name, part in parts.items()}
        self.default_metrics = [MEAN, *(f"{name}.{one}" for name, of in self.headline.items() for one in of)]  # type: ignore[misc]

    def only(self, name: str) -> None:
        """Leave out all tasks but one."""
        self.parts = {name: self.parts[name]}
        self.default_metrics = [m for m in self.default_metrics if m.startswith(name + ".")]  # type: ignore[misc]

    # -- rows: each task sees its own ---------------------------------------------------------------------------------

    def problem(self, row: Row, target: bool = True) -> tuple[str, str] | None:
        """A row to predict may be for any of the tasks: what is wrong with it for all of them."""
        if self.readers(row):
            return None
        found = {name: part.problem(row, target) for name, part in self.parts.items()}  # type: ignore[attr-defined]
        return "no task", "no task can read it: " + "; ".join(
            f"{name}: {problem[1]}" for name, problem in found.items() if problem
        )

    def readers(self, row: Row) -> list[str]:
        """The tasks that answer a row: all that can read it, or the one that its column "task" names."""
        named = row.get("task")
        those = [named] if isinstance(named, str) and named in self.parts else list(self.parts)
        return [name for name in those if self.parts[name].problem(row, target=False) is None]  # type: ignore[attr-defined]

    def asked(self) -> str:
        return "; ".join(f"{name}: {part.asked() or kind(part)}" for name, part in self.parts.items())

    @classmethod
    def summary(cls, fact: dict[str, Any]) -> str:
        told = {name: find.module("tasks", one["task"], name).Task.summary(one) for name, one in fact.get("tasks", {}).items()}
        return "; ".join(
            f"{name} {fact['tasks'][name]['rows_used']:,}" + (f" ({said})" if said else "") for name, said in told.items()
        )

    # -- model --------------------------------------------------------------------------------------------------------

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        raise AssertionError("each task encodes its own rows (engine/data/several.py)")

    def heads(self, model: Any) -> list[tuple[str, Any, Any]]:
        return [(name, part, model.heads[name]) for name, part in self.parts.items()]

    def of(self, model: Any, batch: dict[str, Tensor]) -> tuple[str, Base, Any]:
        """(name, task, its head on the shared encoder) of a batch."""
        name = list(self.parts)[int(batch["task"][0])]
        return name, self.parts[name], model.heads[name]

    def items(self, batch: dict[str, Tensor]) -> int:
        part: Any = list(self.parts.values())[int(batch["task"][0])]
        return int(part.items(batch))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the losses of the batch's task, times its weight."""
        name, part, head = self.of(model, batch)
        made: Tensor = part.loss(head, batch)  # type: ignore[attr-defined]
        return made if self.weights[name] == 1 else self.weights[name] * made

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        _, part, head = self.of(model, batch)
        return part.forward(head, batch)

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        _, part, head = self.of(model, batch)
        return part.output(head, batch)

    # -- judgement: `outputs` is a list of the tasks' own ---------------------------------------------------------------

    def judge(self, outputs: list[Any], encoded: Any, rows: list[Row]) -> Several:
        judged: dict[str, Judged] = {}
        for (name, part), made, at in zip(encoded.parts.items(), outputs, encoded.rows, strict=True):
            judged[name] = self.parts[name].judge(made, part, rows[at])  # type: ignore[attr-defined]
        losses, items = (np.concatenate([getattr(one, what) for one in judged.values()]) for what in ("losses", "items"))
        return Several((), losses, items, judged, self.weights)

    def check(self, names: list[str], where: str) -> None:
        for name in names:
            part, _, metric = name.partition(".")
            if name == MEAN or (part in self.parts and metric == "loss"):
                continue
            if part not in self.parts or not metric:
                known = [MEAN, *(f"{n}.{m}" for n, one in self.parts.items() for m in one.metrics)]
                raise InputError(f"{where}: evaluate.metrics: no metric '{name}'{nearest(name, known)}")
            self.parts[part].check([metric], where)

    def every_metric(self) -> list[str]:
        return [MEAN, *(f"{name}.{one}" for name, part in self.parts.items() for one in ("loss", *part.every_metric()))]

    def lower_is_better(self, name: str) -> bool:
        part, _, metric = name.partition(".")
        return name == "loss" or metric == "loss" or (part in self.parts and self.parts[part].lower_is_better(metric))

    def compute(self, names: list[str], judged: Any, index: np.ndarray | None = None) -> dict[str, float]:
        found: dict[str, float] = {}
        mean, start = [], 0
        for name, one in judged.parts.items():
            count = len(one.losses)
            own = None if index is None else index[(index >= start) & (index < start + count)] - start
            first = self.headline[name][0]
            asked = {n.partition(".")[2] for n in names if n.startswith(name + ".")} | ({first} if MEAN in names else set())
            if own is not None and not len(own):
                scores = dict.fromkeys(asked, float("nan"))
            else:
                scores = self.parts[name].compute(sorted(asked - {"loss"}), one, own)
                losses, items = (one.losses, one.items) if own is None else (one.losses[own], one.items[own])
                scores["loss"] = float(losses.astype(np.float64).sum() / max(1, items.sum()))
            found |= {f"{name}.{metric}": value for metric, value in scores.items()}
            mean.append(scores.get(first, float("nan")) / self.parts[name].full_marks)
            start += count
        found[MEAN] = float(np.mean(mean))
        return {name: found[name] for name in names}

    def calibrate(self, judged: Any, aim: str) -> bool:
        """Each task chooses by its own rows: for `aim` where that is a metric of its own, else for its first one."""
        aims = {name: aim.partition(".")[2] if aim.startswith(name + ".") else self.headline[name][0] for name in judged.parts}
        changed = [self.parts[name].calibrate(one, aims[name]) for name, one in judged.parts.items()]  # each of them
        return any(changed)

    def lines(self, outputs: list[Any], judged: Any, encoded: Any, rows: list[Row]) -> list[dict[str, Any]]:
        out = []
        for (name, part), made, at in zip(encoded.parts.items(), outputs, encoded.rows, strict=True):
            own = self.parts[name].lines(made, judged.parts[name], part, rows[at])
            out += [{**line, "task": name} for line in own]
        return out

    def predictions(self, outputs: list[Any], encoded: Any, rows: list[Row]) -> list[dict[str, Any]]:
        out = []
        for (name, part), made, at in zip(encoded.parts.items(), outputs, encoded.rows, strict=True):
            out += self.parts[name].predictions(made, part, rows[at])  # type: ignore[attr-defined]
        return out

    # -- what is shown ------------------------------------------------------------------------------------------------

    def detail(self, judged: Any) -> dict[str, Any]:
        return {
            name: {
                "task": kind(self.parts[name]), "rows": len(one.losses), "loss": one.loss,
                "scores": self.parts[name].compute(self.headline[name], one), "detail": self.parts[name].detail(one),
            }
            for name, one in judged.parts.items()
        }  # fmt: skip

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        """A line for each task, then what each has to show, under its name."""
        header = ["task", "kind", "rows", "loss", "metric", "score"]
        rows = [[name, one["task"], one["rows"], one["loss"], metric, score]
                for name, one in detail.items() for metric, score in one["scores"].items()]  # fmt: skip
        out: list[Block] = [Table("Each task", header, rows)]
        for name, one in detail.items():
            task = find.module("tasks", one["task"], name).Task
            own = [{k: v for k, v in line.items() if k != "task"} for line in lines if line["task"] == name]
            blocks = [*task.sections(one["detail"], own), task.mistakes(own)]
            out += [named(block, name) for block in blocks if block is not None]
        return out

    @classmethod
    def wrong(cls, line: dict[str, Any]) -> bool | None:
        return None  # it depends on the task

    @classmethod
    def mistakes(cls, lines: list[dict[str, Any]]) -> Examples | None:
        return None  # each task's stand among the sections

    # -- kept with the model ------------------------------------------------------------------------------------------

    def finish(self, model: Any) -> None:
        for _, part, head in self.heads(model):
            part.finish(head)

    def state(self) -> dict[str, Any]:
        return {name: kept for name, part in self.parts.items() if (kept := part.state())}


def kind(task: Base) -> str:
    """A task's name in the recipe: classification, ..."""
    return type(task).__module__.rpartition(".")[2]


def named(block: Block, name: str) -> Block:
    """A task's block under its name."""
    if isinstance(block, Matrix | Points):
        return replace(block, name=f"{name}-{block.name}", title=f"{name}: {block.title}")
    return replace(block, title=f"{name}: {block.title}")
