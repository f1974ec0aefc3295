"""What trains: by path, never by looking for letters in a name.

A model is a stack of blocks with something before it (embeddings) and something after it (a last norm, a pooler), and
a head on top. `layout` finds these four parts in any architecture of transformers by their order and their classes. An
encoder-decoder has two stacks, which count as one, the encoder's below the decoder's:

    shared | encoder.block.0 ... encoder.block.L-1 | encoder's norm | decoder.block.0 ... | decoder's norm | head
    before |                blocks                 |    between     |        blocks       |     after      | head
"""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from engine.errors import InputError, nearest
from engine.swap import Swapped, matches


@dataclass(frozen=True)
class Layout:
    """The parts of a model, as module paths from the model's root."""

    before: list[str]  # embeddings
    blocks: list[str]  # in order, lowest first
    after: list[str]  # last norm, pooler
    head: list[str]
    between: list[str] = field(default_factory=list)  # the encoder's last norm, where a decoder follows


def layout(model: Any, head: list[str]) -> Layout:
    """Find the stack: the longest ModuleList of blocks of one class, at the least depth; an encoder's and its decoder's."""
    body_name = getattr(model, "base_model_prefix", "")
    body = getattr(model, body_name, model) if body_name else model
    prefix = f"{body_name}." if body is not model else ""
    children = [name for name, _ in body.named_children()]
    if {"encoder", "decoder"} <= set(children):
        below, above = (_stack(getattr(body, name), f"{prefix}{name}.") for name in ("encoder", "decoder"))
        embeddings = [prefix + name for name in children[: children.index("encoder")]]
        before = [*embeddings, *below.before, *above.before]
        return Layout(before, below.blocks + above.blocks, above.after, head, between=below.after)
    parts = _stack(body, prefix)
    return Layout(parts.before, parts.blocks, parts.after, head)


def _stack(body: nn.Module, prefix: str) -> Layout:
    stacks = [
        (path, module)
        for path, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(m) for m in module}) == 1
    ]
    if not stacks:
        return Layout([], [], [], [])
    path, stack = max(stacks, key=lambda s: (len(s[1]), -s[0].count(".")))
    children = [name for name, _ in body.named_children()]
    at = children.index(path.split(".")[0])
    return Layout(
        [prefix + name for name in children[:at]],
        [f"{prefix}{path}.{i}" for i in range(len(stack))],
        [prefix + name for name in children[at + 1 :]],
        [],
    )


def train_only(model: nn.Module, paths: list[str]) -> None:
    """Freeze everything but the parameters under `paths`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name == p or name.startswith(p + ".") for p in paths))


def by_pattern(model: nn.Module, freeze: list[str], train: list[str]) -> None:
    """Freeze, then let train, the parameters whose paths match; a pattern that matches none is an error."""
    for key, patterns, trains in (("freeze", freeze, False), ("train", train, True)):
        for pattern in patterns:
            hits = [p for name, p in model.named_parameters() if matches(pattern, name)]
            if not hits:
                names = sorted({re.sub(r"\.\d+\.", ".*.", n) for n, _ in model.named_parameters()})
                raise InputError(
                    f"tune.{key}: '{pattern}' matches no parameter{nearest(pattern, names) if len(names) < 40 else ''}"
                )
            for parameter in hits:
                parameter.requires_grad_(trains)


def set_timetable(model: Any, head: list[str], unfreeze: Any, steps_per_epoch: int) -> str:
    """Gradual unfreezing (Howard & Ruder 2018, arXiv:1801.06146): what trains at all is frozen until its step has come.

    `unfreeze` is a list of {after (epochs), train (patterns)}, or E: the head (and what has no block) trains at once, then
    the blocks join from the top, one every E epochs, the embeddings last. The step is noted on the parameter (`thaws`),
    so which parameters train is a pure function of the step and a resumed run has nothing to remember.
    """
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(unfreeze, float):
        parts = layout(model, head)
        late = [[block] for block in reversed(parts.blocks)] + ([parts.before] if parts.before else [])
        stages = [((i + 1) * unfreeze, [f"{path}.**" for path in paths]) for i, paths in enumerate(late)]
    else:
        stages = [(one.after, one.train) for one in unfreeze]
    for after, patterns in stages:
        hits = [p for name, p in names.items() if any(matches(pattern, name) for pattern in patterns)]
        if not hits and not isinstance(unfreeze, float):
            raise InputError(f"tune.unfreeze: {', '.join(patterns)} matches nothing that this method lets train")
        for parameter in hits:
            parameter.thaws = round(after * steps_per_epoch)
    if not [p for p in names.values() if getattr(p, "thaws", 0) == 0]:
        raise InputError("tune.unfreeze: nothing trains at the first step; leave the head out of the timetable")
    when = sorted({p.thaws for p in names.values() if getattr(p, "thaws", 0)})
    return f"more unfreezes at the steps {', '.join(map(str, when))}"


def thaw(model: nn.Module, step: int) -> list[nn.Parameter]:
    """Freeze and unfreeze by the timetable; returns what the optimizer may move at this step (from 0)."""
    for parameter in model.parameters():
        if hasattr(parameter, "thaws"):
            parameter.requires_grad_(step >= parameter.thaws)
    return [moved(p) for p in model.parameters() if p.requires_grad]


def moved(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimizer moves: the float32 master of a parameter that computes in bfloat16 (fast/weights.py), else itself."""
    return getattr(parameter, "master", parameter)


def ever_trains(parameter: Tensor) -> bool:
    """Whether a parameter trains, now or later in the timetable."""
    return parameter.requires_grad or hasattr(parameter, "thaws")


def rates_by_pattern(model: nn.Module, rates: dict[str, float]) -> dict[str, float]:
    """Discriminative learning rates: parameter name -> the product of the factors of the patterns that match it."""
    factors = {name: 1.0 for name, p in model.named_parameters() if ever_trains(p)}
    for pattern, factor in rates.items():
        hits = [name for name in factors if matches(pattern, name)]
        if not hits:
            raise InputError(f"tune.rates: '{pattern}' matches no parameter that trains")
        for name in hits:
            factors[name] *= factor
    return factors


def layer_rates(model: Any, head: list[str], decay: float) -> dict[str, float]:
    """Layer-wise learning-rate decay (Clark et al. 2020, arXiv:2003.10555): parameter name -> factor.

    With L blocks the head and what follows the blocks learn at 1, block i (from 0) at decay^(L - i), the embeddings at
    decay^(L + 1). An encoder's last norm learns as the block below it.
    """
    parts = layout(model, head)
    depth = len(parts.blocks)
    factors = {path: decay ** (depth - i) for i, path in enumerate(parts.blocks)}
    for norm in parts.between:
        stack = norm.rpartition(".")[0] + "."
        factors[norm] = max(rate for path, rate in factors.items() if path.startswith(stack))
    factors |= dict.fromkeys(parts.before, decay ** (depth + 1))
    return {
        name: next((f for path, f in factors.items() if name.startswith(path + ".") or name == path), 1.0)
        for name, _ in model.named_parameters()
    }


def fresh_and_frozen(model: nn.Module, fresh: list[str], swapped: list[Swapped]) -> list[str]:
    """Parameters with random values that would never learn: always a mistake."""
    new = set(fresh) | {f"{s.path}.{name}" for s in swapped for name in s.fresh}
    return [name for name, p in model.named_parameters() if name in new and not ever_trains(p)]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm, RMSNorm or one of their kin, by its class."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def groups(
    model: nn.Module, learning_rate: float, weight_decay: float, rates: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weights with decay; biases, norms and other vectors without; `rates` (name -> factor) apart."""
    vectors = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    found: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if ever_trains(parameter):
            vector = parameter.ndim < 2 or id(parameter) in vectors
            key = ((rates or {}).get(name, 1.0), 0.0 if vector else weight_decay)
            found.setdefault(key, []).append((name, moved(parameter)))
    return [
        {"params": [p for _, p in named], "names": [n for n, _ in named], "lr": learning_rate * rate,
         "initial_lr": learning_rate * rate, "weight_decay": decay}
        for (rate, decay), named in found.items()
    ]  # fmt: skip
