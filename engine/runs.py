"""The run folder: made when a run begins, opened again when someone uses it.

    recipe.yaml  environment.json  log.jsonl  metrics.json  predictions/  checkpoints/  model/  adapter/  layers/
    report.html  plots/  tokenizer.json (if it was trained)  .lock (its owner, engine/lock.py)  quarantine/ (damaged checkpoints)

`layers/` holds a copy of the source of every custom layer. Opening a run rebuilds them, which runs that code: unasked only
where engine/trust.py lets it, else with --allow-code.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import disk, distributed, find, trust, vet, yaml12
from engine.errors import InputError
from engine.recipe import Recipe, load


def create(recipe: Recipe) -> Path:
    """A new folder runs/RECIPE/STAMP, with runs/RECIPE/latest pointing at it."""
    parent = Path("runs") / recipe.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    link, temporary = parent / "latest", parent / f".latest.{os.getpid()}"
    with disk.refusing(parent, 0):
        disk.make(parent)
        for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
            folder = parent / (stamp + suffix)
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
        temporary.symlink_to(folder.name)
        temporary.replace(link)
        disk.sync_directory(parent)
    return folder


def locate(run: str) -> Path:
    """The folder of a finished or stopped run."""
    folder = Path(run)
    if not folder.exists() and (Path("runs") / run).exists():
        folder = Path("runs") / run
    if not (folder / "recipe.yaml").exists() and (folder / "latest" / "recipe.yaml").exists():
        folder = folder / "latest"
    if not (folder / "recipe.yaml").exists():
        known = [str(p.parent) for p in Path("runs").glob("*/*/recipe.yaml")]
        raise InputError(
            f"{run}: no run folder (no recipe.yaml in it){'; there are: ' + ', '.join(sorted(known)[-3:]) if known else ''}"
        )
    return folder


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and lasting."""
    disk.replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_start(folder: Path, recipe: Recipe, environment: dict[str, Any], tokenizer: str | None = None) -> None:
    """A tokenizer trained for it, the source of custom code, environment.json, recipe.yaml last: with it the run has begun."""
    if tokenizer is not None:
        disk.replace(folder / "tokenizer.json", tokenizer.encode())
    code = {}
    for spec in _specs(recipe):
        code[spec] = _copied(spec, recipe, folder / "layers")
    if code:
        table = [{"at": rule.at, "with": rule.with_} for rule in recipe.swap]
        write_json(folder / "layers" / "swap.json", {"swap": table, "code": code})
    write_json(folder / "environment.json", environment)
    disk.replace(folder / "recipe.yaml", yaml12.dump(recipe.record()).encode())


def _specs(recipe: Recipe) -> list[str]:
    """All "file.py:Class" that a recipe names: its layers, and a method of the user's own."""
    return [rule.with_ for rule in recipe.swap] + ([recipe.tune.method] if ":" in recipe.tune.method else [])


def _copied(spec: str, recipe: Recipe, folder: Path) -> dict[str, str]:
    """Copy the source of a class into the run; two files of one name get two names."""
    source = _code_file(spec, recipe)
    with disk.refusing(folder, 0):
        disk.make(folder)
    digest = trust.sha256(source)
    copy = folder / source.name
    if copy.exists() and trust.sha256(copy) != digest:
        copy = folder / f"{source.stem}-{digest[:8]}.py"
    disk.replace(copy, source.read_bytes())
    return {"file": copy.name, "sha256": digest, "path": str(source.resolve())}


def _code_file(spec: str, recipe: Recipe) -> Path:
    source = trust.source(recipe.code(spec), recipe.folders)
    if source is None:
        raise InputError(f"no source file for {spec}")
    return source


def code_sha256(recipe: Recipe) -> dict[str, str]:
    """What the recipe names as code -> sha256 of the file that defines it."""
    return {spec: trust.sha256(_code_file(spec, recipe)) for spec in _specs(recipe)}


def environment(recipe: Recipe, device: str, sources: dict[str, str], model: dict[str, Any]) -> dict[str, Any]:
    """What a second run would need to be the same."""
    import importlib.metadata as metadata

    import torch

    packages = ("torch", "transformers", "tokenizers", "datasets", "scikit-learn", "numpy", "safetensors")
    versions = {name: metadata.version(name) for name in packages}
    return {
        **recipe.home.noted, "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu(),
        "versions": versions, "device": device, "ranks": distributed.world(),
        "threads": torch.get_num_threads(), "seed": recipe.seed, "data_sha256": sources,
        "model": model, "layers": code_sha256(recipe),
        "git_commit": _git_commit(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def _cpu() -> str:
    """The processor's name: another kind may round otherwise."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8", "replace").splitlines() if about.exists() else []
    named = [line for line in lines if line.startswith("model name")]
    return named[0].partition(":")[2].strip() if named else platform.processor()


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(find.PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@dataclass
class Run:
    """A run, ready to be used."""

    folder: Path
    recipe: Recipe
    task: Any
    model: Any
    tokenizer: Any
    metrics: dict[str, Any]


def open_run(run: str, overrides: list[str] | None = None, *, allow_code: bool = False) -> Run:
    """Load the model of a finished run, its task and its recipe (with `overrides`, such as other columns)."""
    import torch
    import transformers

    folder = locate(run)
    recipe = recipe_of(folder, overrides, allow_code)
    task = task_of(folder, recipe)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder / "model" / next(iter(task.parts), ""), local_files_only=True
        )
    except Exception as error:  # the kinds that a damaged tokenizer raises are many
        raise InputError(f"{folder / 'model'}: the tokenizer cannot be loaded: {str(error).strip()[:200]}") from error
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    method = method_of(folder, recipe)
    if recipe.swap or getattr(method, "STAYS", False):
        model = _rebuild(folder, recipe, method, task)
    else:
        model = model_of(task, lambda auto, place: auto.from_pretrained(folder / "model" / place, **options))
    metrics = json.loads((folder / "metrics.json").read_text("utf-8")) if (folder / "metrics.json").exists() else {}
    return Run(folder, recipe, task, model.eval(), tokenizer, metrics)


def task_of(folder: Path, recipe: Recipe, place: str = "") -> Any:
    """The run's task with all that it learnt beside the weights (labels, scale, threshold), from the saved model's config.

    InputError where model/ is not there yet, or holds what is not opened (engine/vet.py).
    """
    task = find.module("tasks", recipe.task, str(folder / "recipe.yaml")).Task(recipe.data.columns, options=recipe.data)
    if recipe.tasks:
        task.hold({name: task_of(folder, recipe.part(name), name) for name in recipe.tasks}, recipe.tasks)
    else:
        model = folder / "model" / place
        if not (model / "config.json").exists():
            raise InputError(f"{folder}: this run has no {model.relative_to(folder)}/ yet; finish it with --resume")
        task.restore(vet.folder(model, str(folder)))
    return task


def model_of(task: Any, make: Callable[[Any, str], Any]) -> Any:
    """make(auto class, folder in model/), or what it makes for each of several tasks, on one body."""
    import transformers

    from engine.together import Together

    if not task.parts:
        return make(getattr(transformers, task.auto_class), "")
    return Together({name: make(getattr(transformers, part.auto_class), name) for name, part in task.parts.items()})


def _rebuild(folder: Path, recipe: Recipe, method: Any, task: Any) -> Any:
    """A model with layers of its own: the plain architecture, the layers put in again as in training, then the weights."""
    import transformers
    from safetensors.torch import load_file

    from engine import models, swap

    def plain(auto: Any, place: str) -> Any:
        return auto.from_config(transformers.AutoConfig.from_pretrained(folder / "model" / place, local_files_only=True))

    model = model_of(task, plain)
    if recipe.swap:
        swap.apply_rules(model, stored_rules(folder, recipe), recipe.where)
    if getattr(method, "STAYS", False):
        getattr(method, "rebuild", method.apply)(model, recipe.tune, models.head_of(model, []))
    state = {
        model.path_in(place, name) if place else name: t
        for place in task.parts or [""]
        for file in sorted((folder / "model" / place).glob("*.safetensors"))
        for name, t in load_file(file).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(f"{folder}: model/ does not fit its recipe: {(list(missing) + list(unexpected))[:3]}")
    return model


def recipe_of(folder: Path, overrides: list[str] | None, allow_code: bool) -> Recipe:
    """The run's own recipe. The code that it names is the copy in the run, if it may run."""
    return load(str(folder / "recipe.yaml"), overrides, code=trust.code_of(folder, allow=allow_code))


def method_of(folder: Path, recipe: Recipe) -> Any:
    """The run's tuning method; a class of the user's own comes from the copy in the run."""
    return find.method(recipe.code(recipe.tune.method), str(folder / "recipe.yaml"))


def stored_rules(folder: Path, recipe: Recipe) -> list[Any]:
    """The recipe's swap entries, pointing at the run's own copies of the code, if that code may run."""
    table = trust.table(folder)["swap"]
    if [(r["at"], r["with"]) for r in table] != [(r.at, r.with_) for r in recipe.swap]:
        raise InputError(f"{folder}: the recipe's swap table is not the one that this run was trained with")
    return recipe.rules()
