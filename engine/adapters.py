"""The adapter folder: what a method has learnt, apart from the model that it was learnt on.

    adapter/adapter_config.json        the method and its options, the base model's name, the head's paths
    adapter/adapter_model.safetensors  the learnt tensors and the head

Where the peft package has the method the folder is in its layout, so either side opens what the other has trained:
tensors are named base_model.model.PATH.lora_A.weight and the like. For the other methods it is our own layout, the
parameters by their paths. A method tells peft's names by `peft` and takes them back by `load_peft`. Read besides:
adapter-hub's layout, for bottleneck adapters. Nothing here is ever unpickled.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import find, swap, vet
from engine.errors import InputError, RunError, nearest
from engine.models import eval_mode
from engine.recipe import Recipe
from engine.schema import Tune

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPTS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}  # peft names the head of these without ".model"
APART = 1e-3  # how far merged outputs may be from unmerged ones, relative to the largest


@dataclass
class Adapter:
    """A trained adapter as it was read: options for `tune:` and tensors by the layout's names."""

    folder: Path
    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    base: str  # the model's name that it was trained on
    own_names: bool  # tensors are named by our parameters' paths
    revision: str | None = None  # of the base


def put_in(model: nn.Module, method: Any, options: Any, head: list[str]) -> tuple[str, list[str]]:
    """Apply a method; returns its coverage line and the names of the parameters that it added."""
    before = {id(p) for p in model.parameters()}
    line = method.apply(model, options, head)
    return line, [name for name, p in model.named_parameters() if id(p) not in before]


def save(model: Any, folder: Path, method: Any, options: Any, head: list[str], own: list[str], base: dict[str, Any]) -> None:
    """Write the folder; `own` are the parameters that the method added, `base` holds name, revision and task_type.

    What `tune.train` lets train besides, such as norms, goes in as whole modules, as the head does.
    """
    try:
        made = method.peft(model, options) if hasattr(method, "peft") else None
    except InputError:  # peft has the method, but cannot run it on this architecture: our own layout then
        made = None
    beside = {n for n, p in model.named_parameters() if p.requires_grad and n not in own and not _under(n, head)}
    modules = head + sorted({name.rpartition(".")[0] for name in beside})
    whole = {  # each parameter at its first path: a decoder that is tied to the embeddings is the base's, not the head's
        n: p for n, p in model.named_parameters() if n not in own and (_under(n, head) or n.rpartition(".")[0] in modules)
    }
    common = {
        "base_model_name_or_path": base["name"], "revision": base["revision"], "task_type": base["task_type"],
        "modules_to_save": modules, "inference_mode": True,
    }  # fmt: skip
    if made is None:
        given = options.model_dump(mode="json", exclude=set(Tune.model_fields))
        config, tensors = {"engine_method": options.method, "options": given}, {n: model.get_parameter(n) for n in own}
        prefix, head_prefix = "", ""
    else:
        config, tensors = made
        prefix = "" if config["peft_type"] in PROMPTS else "base_model.model."
        head_prefix = "base_model." if config["peft_type"] in PROMPTS else prefix
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**config, **common}, indent=2) + "\n", "utf-8")
    named = {prefix + n: t for n, t in tensors.items()} | {head_prefix + n: t for n, t in whole.items()}
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in named.items()}, folder / WEIGHTS, {"format": "pt"})


def locate(name: str, where: str, folders: tuple[Path, ...] = ()) -> Path:
    """The adapter folder that `name` means: itself, or the adapter/ of a run."""
    found = find.locate(name, folders)
    for folder in (found, found / "adapter", found / "latest" / "adapter") if found else ():
        if (folder / CONFIG).is_file():
            return folder
    raise InputError(f"{where}: {name} holds no {CONFIG}, nor is it a run with an adapter/")


def read(folder: Path, where: str) -> Adapter:
    """Any of the three layouts. Raises InputError where the folder is damaged or its method unknown."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no mapping of keys")
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {folder / CONFIG} cannot be read: {error}") from error
    base, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if "engine_method" in config:
        method, options = config["engine_method"], config.get("options")
        if not isinstance(method, str) or not isinstance(options, dict):
            raise InputError(f"{where}: {folder / CONFIG} is damaged: engine_method or options is missing")
        return Adapter(folder, method, options, _tensors(folder, where), base, True, revision)
    if "peft_type" in config:
        kinds = {m.PEFT_TYPE: name for name in find.names("tune") if hasattr(m := find.module("tune", name, where), "PEFT_TYPE")}
        kind = str(config["peft_type"])
        if kind not in kinds:
            raise InputError(f"{where}: {folder}: peft's {kind} is not among what is read here: {', '.join(sorted(kinds))}")
        tensors = {_plain(name): t for name, t in _tensors(folder, where).items()}
        try:
            options = find.module("tune", kinds[kind], where).from_peft(config, tensors)
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"{where}: {folder / CONFIG} is damaged: {type(error).__name__} {error}") from error
        return Adapter(folder, options.pop("method"), options, tensors, base, False, revision)
    from engine.tune import _hub_layout

    if _hub_layout.recognised(folder):
        try:
            options, tensors, head = _hub_layout.read(folder)
            options.pop("method", None)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return Adapter(folder, "adapter", options, {**tensors, **head}, base, True)
    raise InputError(f"{where}: {folder / CONFIG} is in no layout that is known here: it has no peft_type")


def _plain(name: str) -> str:
    """peft's name of a tensor -> its path in the model."""
    for prefix in ("base_model.model.", "base_model."):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def _tensors(folder: Path, where: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [p.name for p in folder.glob("*.bin")]
        why = f"; {pickled[0]} is a pickle, which can run code when opened, and is refused" if pickled else ""
        raise InputError(f"{where}: {folder} has no {WEIGHTS}{why}")
    vet.header(path, where)
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where}: {path} is damaged: {error}") from error


def started(recipe: Recipe) -> Recipe:
    """The recipe with the method and options of the adapter that `tune.start` names; another value for one is an error.

    A run's own recipe has every option written out, so the folder is not needed to go on or to open the run.
    """
    given = (recipe.raw.get("tune") or {}) if recipe.tune.start else {}
    if not recipe.tune.start or set(type(recipe.tune).model_fields) <= set(given):
        return recipe
    where = f"{recipe.where('tune.start')}: tune.start"
    adapter = read(locate(recipe.tune.start, where, recipe.folders), where)
    for key, value in {"method": adapter.method, **adapter.options}.items():
        if key in given and given[key] != value:
            raise recipe.error(f"tune.{key}", f"{given[key]} here, but {value} in the adapter {adapter.folder}; leave it out")
    made = recipe.with_tune({"method": adapter.method, **adapter.options})
    return made.with_tune(made.resolved()["tune"])


@torch.no_grad()
def load(model: Any, method: Any, options: Any, adapter: Adapter, head: list[str], where: str) -> str:
    """Put the tensors into a model on which the method was applied; returns a line about what came in.

    A head of another size, that is for other labels, stays fresh. Whatever else does not fit is an error.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied one may be named by either of its places
    tied = parameters.keys() - dict(model.named_parameters()).keys()
    left, taken, fresh = {}, 0, []
    for name, tensor in adapter.tensors.items():
        if name in tied and not parameters[name].requires_grad and not torch.equal(parameters[name], tensor):
            left[name] = tensor  # it would change the base
        elif name in parameters and parameters[name].shape == tensor.shape:
            parameters[name].copy_(tensor)
            taken += 1
        elif name in parameters and _under(name, head):
            fresh.append(name)
        else:
            left[name] = tensor
    if left and (adapter.own_names or not hasattr(method, "load_peft")):
        name = next(iter(left))
        raise InputError(
            f"{where}: {adapter.folder}: {name} {tuple(left[name].shape)} has no place in this model{nearest(name, parameters)}"
        )
    if left:
        try:
            method.load_peft(model, options, left)
        except InputError as error:
            raise InputError(f"{where}: {adapter.folder}: {error}") from error
    note = f"{adapter.folder}: {taken + len(left)} tensors read"
    return note + (f"; the head is fresh: {fresh[0]} has another shape there" if fresh else "")


@torch.no_grad()
def merge(model: Any, method: Any, probe: dict[str, Tensor]) -> float:
    """Fold the updates into the weights and compare the outputs on a probe batch; returns how far they are apart.

    The distance is relative to the largest output. Raises RunError where it is more than rounding, or no number.
    """
    with eval_mode(model):
        before = swap.outputs_of(model(**probe)).float()
        method.merge(model)
        after = swap.outputs_of(model(**probe)).float()
    apart = float((after - before).abs().max() / before.abs().max().clamp_min(1e-6))
    if not apart <= APART:
        what = "are no numbers" if apart != apart else f"differ by {apart:.1e} of the largest"
        raise RunError(
            f"merging failed its check: on a probe batch the merged model's outputs {what}; adapter/ holds the unmerged weights"
        )
    return apart


def _under(name: str, paths: list[str]) -> bool:
    return any(name.startswith(path + ".") for path in paths)
