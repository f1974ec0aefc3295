"""Replace modules of a pretrained model, by path.

    swap(model, ["**.attention.self.{query,value}"], lambda old, path: LoRALinear(old, r=8))

Patterns run over the paths of `named_modules()`: `*` is one segment, `**` any number, `{a,b}` either, `[0-3]` a range.
LoRA, adapters and a user's own layer all go in this way, and meet the same checks: every pattern matches something;
all layers are built before any is put in, so a failure leaves the model whole; tied weights are not untied by accident;
device, dtype and mode stay; what was kept, what is fresh and what was dropped is told.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import translate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import InputError, nearest
from engine.find import load_class

Build = Callable[[nn.Module, str], nn.Module]


@dataclass
class Swapped:
    """One replacement: paths of the tensors carried over, fresh, and dropped with the old module."""

    path: str
    old: str
    new: str
    kept: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def expand(pattern: str) -> list[str]:
    """`a.{b,c}.d` -> [`a.b.d`, `a.c.d`]."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    return [
        p for choice in match[1].split(",") for p in expand(pattern[: match.start()] + choice.strip() + pattern[match.end() :])
    ]


def _regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for segment in pattern.split("."):
        if segment == "**":
            parts.append(r"(?:[^.]+\.)*")
        else:
            parts.append(
                translate(segment).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z").replace(".*", "[^.]*") + r"\."
            )
    return re.compile("".join(parts))


def matches(pattern: str, path: str) -> bool:
    """Whether `path` fits `pattern`."""
    return any(_regex(p).fullmatch(path + ".") for p in expand(pattern))


def find(model: nn.Module, patterns: list[str], where: str = "swap.at") -> list[str]:
    """The paths that the patterns match, in the model's order; a pattern that matches nothing is an error."""
    paths = [path for path, _ in model.named_modules() if path]
    found: set[str] = set()
    for pattern in patterns:
        regexes = [_regex(p) for p in expand(pattern)]
        hits = {path for path in paths if any(r.fullmatch(path + ".") for r in regexes)}
        if not hits:
            raise InputError(f"{where}: '{pattern}' matches no module of this model{_nearest_paths(pattern, paths)}")
        found |= hits
    return [path for path in paths if path in found]


def _nearest_paths(pattern: str, paths: list[str]) -> str:
    """The three real paths nearest to a pattern, layers collapsed: encoder.layer.*.attention."""
    general = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", p) for p in paths})
    near: list[str] = []
    for one in expand(pattern):
        tail = one.replace("**.", "").rpartition(".")[2]
        ends = {p.rpartition(".")[2] for p in general}
        for leaf in get_close_matches(tail, sorted(ends), n=2, cutoff=0.5):
            near += [p for p in general if p.endswith("." + leaf) or p == leaf][:2]
        near += get_close_matches(one.replace("**.", ""), general, n=2, cutoff=0.4)
    near = list(dict.fromkeys(near))[:3]
    return f"; nearest are: {', '.join(near)} (`layers RECIPE` lists all)" if near else " (`layers RECIPE` lists all)"


def swap(
    model: nn.Module,
    patterns: list[str],
    build: Build,
    *,
    where: str = "swap.at",
    weights: str = "own",
    expect: int | None = None,
) -> list[Swapped]:
    """Replace every module that the patterns match by build(old, path); returns what was done, in the model's order.

    `weights`: "own" leaves the new module's tensors as `build` made them; "keep" then copies over each tensor of the
    old module that fits by name and shape. `expect`: how many modules must match.
    """
    paths = find(model, patterns, where)
    if expect is not None and len(paths) != expect:
        raise InputError(f"{where}: {len(paths)} modules match where {expect} are expected: {', '.join(paths[:4])} ...")
    for outer in paths:
        inner = next((p for p in paths if p.startswith(outer + ".")), None)
        if inner:
            raise InputError(f"{where}: {inner} lies inside {outer}, and both match; narrow the pattern")
    modules = dict(model.named_modules())
    built = [(path, modules[path], _built(build, modules[path], path, where)) for path in paths]
    _refuse_untying(model, built, where)
    done = []
    for path, old, new in built:
        like = next((p for p in old.parameters() if p.is_floating_point()), None)
        if like is not None:
            new.to(device=like.device, dtype=like.dtype)
        new.train(old.training)
        done.append(_account(path, old, new, weights))
        parent, _, leaf = path.rpartition(".")
        setattr(modules[parent] if parent else model, leaf, new)
    return done


def _built(build: Build, old: nn.Module, path: str, where: str) -> nn.Module:
    try:
        new = build(old, path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{where}: building the layer for {path} ({_short(old)}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(new, nn.Module):
        raise InputError(f"{where}: {path}: a {type(new).__name__} was built, which is no torch.nn.Module")
    return new


def _refuse_untying(model: nn.Module, built: list[tuple[str, nn.Module, nn.Module]], where: str) -> None:
    """A parameter that is used in two places must not be replaced in one of them."""
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    for path, old, new in built:
        staying = {id(p) for p in new.parameters()}
        for parameter in old.parameters():
            elsewhere = [h for h in homes[id(parameter)] if not h.startswith(path + ".")]
            if elsewhere and id(parameter) not in staying:
                raise InputError(
                    f"{where}: {path} shares its weight with {elsewhere[0]}; swapping one alone would untie them."
                    " Match both places, or keep the old parameter in the new layer."
                )


def _account(path: str, old: nn.Module, new: nn.Module, weights: str) -> Swapped:
    before = old.state_dict(keep_vars=True)
    after = new.state_dict(keep_vars=True)
    same = {id(t) for t in before.values()}
    kept = [name for name, t in after.items() if id(t) in same]
    if weights == "keep":
        for name, tensor in after.items():
            if name not in kept and name in before and before[name].shape == tensor.shape:
                with torch.no_grad():
                    tensor.copy_(before[name])
                kept.append(name)
    used = {id(after[name]) for name in kept}
    dropped = [name for name, t in before.items() if name not in kept and id(t) not in used]
    return Swapped(path, _short(old), _short(new), kept, [n for n in after if n not in kept], dropped)


def _short(module: nn.Module) -> str:
    shape = next((tuple(p.shape) for p in module.parameters()), None)
    return f"{type(module).__name__}{list(shape) if shape else ''}"


# -- a recipe's own layers --------------------------------------------------------------------------------------------

# constructor arguments that are filled in from the old module's attributes of the same name; `_filled` says which others are
SIZES = ("in_features", "out_features", "normalized_shape", "num_embeddings", "embedding_dim", "hidden_size", "eps")


def apply_rules(model: nn.Module, rules: list[Any], where: Callable[[str], str], folders: tuple[Path, ...] = ()) -> list[Swapped]:
    """Put a recipe's `swap:` entries into the model, in order."""
    done = []
    for i, rule in enumerate(rules):
        key = f"{where(f'swap.{i}')}: swap.{i}"
        layer = load_class(rule.with_, f"{key}.with", folders)
        if not issubclass(layer, nn.Module):
            raise InputError(f"{key}.with: {rule.with_} is no torch.nn.Module; derive the class from it")
        build = _builder(layer, rule.options, key, getattr(model, "config", None))
        done += swap(
            model, rule.at, build, where=f"{key}.at", weights="keep" if rule.weights == "keep" else "own", expect=rule.expect
        )
    readers = [path for path, m in model.named_modules() if hasattr(type(m), "READS")]
    if readers:
        for called in (model, *getattr(model, "heads", {}).values()):  # several heads on one body are called by themselves
            called.register_forward_pre_hook(_hand_over(model, readers), with_kwargs=True)
    return done


def _hand_over(root: nn.Module, readers: list[str]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A layer whose class says READS = "attention_mask" finds the model's input of that name as an attribute of its own."""

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for path in readers:
            layer = root.get_submodule(path)
            setattr(layer, str(layer.READS), kwargs.get(str(layer.READS)))

    return hook


def outputs_of(made: Any) -> torch.Tensor:
    """What a head gave, as one tensor: its logits, or the start and end of a span (B, T, 2)."""
    return made.logits if hasattr(made, "logits") else torch.stack([made.start_logits, made.end_logits], dim=-1)


def probe(model: nn.Module, swapped: list[Swapped], batch: dict[str, torch.Tensor], where: str) -> None:
    """One forward pass; where it fails, an InputError that names the module, and the swapped layer whose output led there."""
    running: list[str] = []
    gave: dict[str, str] = {}
    new = {s.path: s for s in swapped}

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: running.append(path)

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            if path in new:
                gave[path] = str(tuple(output.shape)) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"

        return hook

    hooks = [h for path, m in model.named_modules()
             for h in (m.register_forward_pre_hook(enter(path)), m.register_forward_hook(leave(path)))]  # fmt: skip
    try:
        with torch.inference_mode():
            made = model(**batch)
        if not torch.isfinite(outputs_of(made)).all():
            raise InputError(f"{where}: on a probe batch the model's outputs are not all finite numbers")
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        at = next((p for p in reversed(running) if p), "the model")
        inside = next((p for p in new if at == p or at.startswith(p + ".")), None)
        if inside or not gave:
            raise InputError(f"{where}: {at} failed on a probe batch: {reason}") from error
        last = list(gave)[-1]
        raise InputError(
            f"{where}: {at} failed on a probe batch: {reason}. Before it, {last} ({new[last].new}) gave {gave[last]};"
            f" a layer in its place must give the shape that {new[last].old} gave."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _builder(layer: type, options: dict[str, Any], key: str, config: Any = None) -> Build:
    """from_old(old, **options) where the class has it; else the constructor, with what `_filled` finds for its arguments."""
    own = hasattr(layer, "from_old")
    if own and not isinstance(inspect.getattr_static(layer, "from_old"), classmethod | staticmethod):
        raise InputError(f"{key}.with: {layer.__name__}.from_old is called on the class: write @classmethod above its def")
    maker = layer.from_old if own else layer  # type: ignore[attr-defined]
    name = f"{layer.__name__}.from_old" if own else layer.__name__
    takes = list(inspect.signature(maker).parameters.values())[1 if own else 0 :]
    named = {p.name: p for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for option in options:
        if option not in named and not any(p.kind is p.VAR_KEYWORD for p in takes):
            raise InputError(f"{key}.options.{option}: {layer.__name__} takes no '{option}'{nearest(option, named)}")

    def build(old: nn.Module, path: str) -> nn.Module:
        found = {} if own else _filled(named, old, config)
        lacking = [n for n, p in named.items() if p.default is p.empty and n not in found and n not in options]
        if lacking:
            given = ", ".join(f"{n}: ..." for n in [*options, *lacking])
            why = "" if own else f": neither {path} (a {type(old).__name__}) nor the model's config has one of that name"
            cure = f"give it in the recipe: options: {{{given}}}"
            other = "" if own else f"; or give {layer.__name__} a classmethod from_old(cls, old) that makes it out of the old module"
            raise InputError(f"{key}.options: {name} needs '{lacking[0]}'{why}; {cure}{other}")
        args = (old,) if own else ()
        return maker(*args, **{**found, **options})  # type: ignore[no-any-return]

    return build


def _filled(named: dict[str, inspect.Parameter], old: nn.Module, config: Any) -> dict[str, Any]:
    """Arguments of a constructor by their names: `old`, `config`, sizes of the old module, then of the model's config.

    A module without sizes of its own has those of its first (in_features) and last (out_features) linear layer. What has a
    default is filled in only where it is a size or `eps`: a rate of dropout, for instance, is the class's own choice.
    """
    linear = [m for m in old.modules() if isinstance(m, nn.Linear)]
    inside = {"in_features": linear[0].in_features, "out_features": linear[-1].out_features} if linear else {}
    made: dict[str, Any] = {}
    for name, parameter in named.items():
        required = parameter.default is parameter.empty
        if name in ("old", "config") and required:
            made |= {"old": {"old": old}, "config": {"config": config} if config is not None else {}}[name]
        elif name in SIZES and hasattr(old, name):
            made[name] = getattr(old, name)
        elif name in inside:
            made[name] = inside[name]
        elif required or name.endswith("_size"):
            value = getattr(config, name, None)
            if isinstance(value, int | float | str):
                made[name] = value
    return made
