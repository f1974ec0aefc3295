"""The run folder: made when a run begins, opened again when someone uses it.

    recipe.yaml  environment.json  log.jsonl  metrics.json  predictions/  checkpoints/  model/  adapter/  layers/
    report.html  plots/  .lock (its owner, engine/lock.py)  quarantine/ (damaged checkpoints, if there ever were any)

`layers/` holds a copy of the source of every custom layer. Opening a run rebuilds them, which runs that code; so it is
run only when it is, byte for byte, the file that the recipe names on this machine, or with --allow-code.
"""

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import disk, find, yaml12
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


def write_start(folder: Path, recipe: Recipe, environment: dict[str, Any]) -> None:
    """The source of custom layers, environment.json, and recipe.yaml last: with it the run has begun."""
    table = []
    for rule in recipe.swap:
        source = _layer_source(rule, recipe)
        with disk.refusing(folder, 0):
            disk.make(folder / "layers")
        disk.replace(folder / "layers" / source.name, source.read_bytes())
        table.append({"at": rule.at, "with": rule.with_, "file": source.name, "sha256": _sha256(source)})
    if table:
        write_json(folder / "layers" / "swap.json", table)
    write_json(folder / "environment.json", environment)
    disk.replace(folder / "recipe.yaml", yaml12.dump(recipe.resolved()).encode())


def _layer_source(rule: Any, recipe: Recipe) -> Path:
    source = _source(rule.with_, (recipe.path.parent,))
    if source is None:
        raise InputError(f"swap: no source file for {rule.with_}")
    return source


def layer_sha256(recipe: Recipe) -> dict[str, str]:
    """What a swap rule names -> sha256 of the file that defines it."""
    return {rule.with_: _sha256(_layer_source(rule, recipe)) for rule in recipe.swap}


def environment(recipe: Recipe, device: str, sources: dict[str, str], model: dict[str, Any]) -> dict[str, Any]:
    """What a second run would need to be the same."""
    import importlib.metadata as metadata

    import torch

    packages = ("torch", "transformers", "tokenizers", "datasets", "scikit-learn", "numpy", "safetensors")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "recipe": recipe.name, "python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu(),
        "versions": versions, "device": device,
        "threads": torch.get_num_threads(), "seed": recipe.seed, "data_sha256": sources,
        "model": model, "layers": layer_sha256(recipe),
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


def _source(spec: str, folders: tuple[Path, ...]) -> Path | None:
    """The file that defines a custom layer here, found without running it."""
    source = spec.rpartition(":")[0]
    if source.endswith(".py"):
        return find.locate(source, folders)
    try:
        found = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    recipe = load(str(folder / "recipe.yaml"), overrides)
    if not (folder / "model" / "config.json").exists():
        raise InputError(f"{folder}: this run has no model/ yet; finish it with --resume")
    task_class = find.module("tasks", recipe.task, str(folder / "recipe.yaml")).Task
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    auto = getattr(transformers, task_class.auto_class)
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    method = find.module("tune", recipe.tune.method, str(folder / "recipe.yaml"))
    if recipe.swap or getattr(method, "STAYS", False):
        model = _rebuild(folder, recipe, method, auto, allow_code)
    else:
        model = auto.from_pretrained(folder / "model", **options)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    task = task_class(recipe.data.columns, labels)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8")) if (folder / "metrics.json").exists() else {}
    return Run(folder, recipe, task, model.eval(), tokenizer, metrics)


def _rebuild(folder: Path, recipe: Recipe, method: Any, auto: Any, allow_code: bool) -> Any:
    """A model with layers of its own: the plain architecture, the layers put in again as in training, then the weights."""
    import transformers
    from safetensors.torch import load_file

    from engine import models, swap

    config = transformers.AutoConfig.from_pretrained(folder / "model", local_files_only=True)
    model = auto.from_config(config)
    if recipe.swap:
        swap.apply_rules(model, _stored_rules(folder, recipe, allow_code), recipe.where)
    if getattr(method, "STAYS", False):
        method.apply(model, recipe.tune, models.head_of(model, []))
    state = {name: t for file in sorted((folder / "model").glob("*.safetensors")) for name, t in load_file(file).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(f"{folder}: model/ does not fit its recipe: {(list(missing) + list(unexpected))[:3]}")
    return model


def _stored_rules(folder: Path, recipe: Recipe, allow_code: bool) -> list[Any]:
    """The recipe's swap entries, pointing at the run's own copies of the code, if that code may run."""
    table = json.loads((folder / "layers" / "swap.json").read_text("utf-8"))
    if [(r["at"], r["with"]) for r in table] != [(r.at, r.with_) for r in recipe.swap]:
        raise InputError(f"{folder}: the recipe's swap table is not the one that this run was trained with")
    rules = []
    for entry, rule in zip(table, recipe.swap, strict=True):
        copy = folder / "layers" / Path(entry["file"]).name
        if _sha256(copy) != entry["sha256"]:
            raise InputError(f"{copy}: its sha256 is not the one noted at training; the file was changed")
        name = rule.with_.rpartition(":")[2]
        own = _source(rule.with_, (recipe.path.parent,))
        if not allow_code and (own is None or _sha256(own) != entry["sha256"]):
            raise InputError(
                f"{folder}: this run would execute the code of {copy} ({name}, sha256 {entry['sha256'][:12]}...)."
                " Read it first; then add --allow-code."
            )
        rules.append(rule.model_copy(update={"with_": f"{copy}:{name}"}))
    return rules
