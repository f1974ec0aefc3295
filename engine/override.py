"""Keys in the place of others: those of the command line, and those of a recipe's `offline:` block.

    train.epochs=1                    one key
    offline: {train: {epochs: 1}}     the same, as a group; what the block does not name stays

Some keys cannot stand beside each other: the options of one tuning method beside another, a model's name beside a model
from scratch. The one that comes later takes the place of the other, and of what belongs to it.
"""

from typing import Any

from engine import yaml12
from engine.errors import InputError, listing, quoted
from engine.schema import Tune


def override(raw: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(a copy of `raw` with the KEY=VALUEs of the command line in it, their keys). Raises InputError."""
    raw, problems = merged(raw, {}), []
    keys: list[str] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key or any(not part for part in key.split(".")) or key.count(".") >= yaml12.DEEPEST:
            problems.append(f"command line: {quoted(item)} is no override; write KEY=VALUE, such as train.epochs=1")
            continue
        try:
            value = yaml12.scalar(text)
        except InputError as error:
            problems.append(f"command line: {quoted(key)[1:-1]}: {error}")
            continue
        *groups, last = key.split(".")
        at = raw
        for group in groups:
            inner = at.get(group)
            at[group] = dict(inner) if isinstance(inner, dict) else {}
            at = at[group]
        at[last] = value
        keys.append(key)
        drop_rivals(raw, key, keys)
    if problems:
        raise InputError(listing(problems))
    return raw, keys


def drop_rivals(raw: dict[str, Any], key: str, given: list[str]) -> None:
    """Take away what `key` takes the place of, unless it is `given` beside it.

    Options of the old method mean nothing to a new one. A model is named or made from scratch, and its tokenizer goes with it.
    """
    group, *rest = key.split(".")
    held, named = raw.get(group), {k.split(".")[1] for k in given if k.startswith(f"{group}.")}
    if not isinstance(held, dict):
        return
    if key == "tune.method":
        raw[group] = {k: v for k, v in held.items() if k in Tune.model_fields or k in named}
    elif group == "model" and rest and rest[0] in ("name", "from_scratch") and held.get(rest[0]) is not None:
        rivals = {"name": {"from_scratch", "tokenizer"}, "from_scratch": {"name", "revision"}}[rest[0]]
        raw[group] = {k: v for k, v in held.items() if k not in rivals or k in named}


def leaves(block: dict[str, Any], before: str = "") -> list[str]:
    """The dotted keys of nested groups: {model: {name: x}, seed: 1} -> model.name, seed."""
    found = []
    for key, value in block.items():
        inner = leaves(value, f"{before}{key}.") if isinstance(value, dict) else []
        found += inner or [f"{before}{key}"]
    return found


def shown(block: dict[str, Any]) -> str:
    """What a block replaces, in short: group.key of each, without what lies deeper."""
    return ", ".join(dict.fromkeys(".".join(key.split(".")[:2]) for key in leaves(block)))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which `over` replaces, group by group."""
    out = {k: merged(v, {}) if isinstance(v, dict) else v for k, v in base.items()}
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
