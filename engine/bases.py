"""A finished run opened as base model + adapter: to merge it, and to hold several adapters on one base.

    run A: base weights ---.            adapter A, head A
    run B:                 |-- shared   adapter B, head B      a prediction goes through the one that is asked for
    run C:                 '            adapter C, head C

`model/` of a run holds its weights merged. Here they are taken apart again: the pretrained model, found as in training and
held to the sha256 that was noted then; the layers of `swap`; the method; and the tensors of adapter/. What is bit-equal
to a base that is already open is not kept twice.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import adapters, disk, models, prepare, runs, swap
from engine.errors import InputError, RunError

WORDS = ("the", "a fine day", "no", "it was not what they had been told, and nobody said why", "42", "yes; and more")


def open_unmerged(run: str, shared: dict[str, nn.Parameter] | None = None, *, allow_code: bool = False) -> tuple[runs.Run, Any]:
    """(the run with its adapter beside its base weights, its method).

    `shared` is a table of base parameters by path: filled by the first run that is opened with it, used by the others.
    """
    folder = runs.locate(run)
    recipe = runs.recipe_of(folder, [], allow_code)
    method = runs.method_of(folder, recipe)
    if not (folder / "adapter" / adapters.CONFIG).exists():
        raise InputError(f"{folder}: no adapter/: {recipe.tune.method} changes the model's own weights, and model/ holds them")
    where = f"{folder}/recipe.yaml: model.name"
    task = runs.task_of(folder, recipe)
    loaded = prepare.base(recipe, task, (folder,), list, None, folder)
    noted = base_of(folder)[0]
    if loaded.sha256 != noted:
        raise InputError(
            f"{where}: {loaded.source.folder} is not the base of this run: sha256 {loaded.sha256[:12]}..., not {noted[:12]}..."
        )
    model = loaded.model
    head = models.head_of(model, loaded.fresh)
    if recipe.swap:
        swap.apply_rules(model, runs.stored_rules(folder, recipe), recipe.where)
    adapters.put_in(model, method, recipe.tune, head)
    adapters.load(model, method, recipe.tune, adapters.read(folder / "adapter", str(folder)), head, str(folder))
    if shared is not None:
        share(model, shared)
    return runs.Run(folder, recipe, task, model.eval(), loaded.tokenizer, {}), method


def base_of(folder: Path) -> tuple[str, str]:
    """(sha256, name) of the model that a run was trained on, as noted then."""
    about = json.loads((folder / "environment.json").read_text("utf-8"))["model"]
    return about["sha256"], str(about["name"])


def share(model: nn.Module, table: dict[str, nn.Parameter]) -> None:
    """Let parameters that are bit-equal to the table's be the table's; add the others to it."""
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = f"{path}.{leaf}".replace(".base.", ".")  # a wrapped layer keeps its own path in the table
            known = table.setdefault(name, parameter)
            if known is not parameter and known.shape == parameter.shape and torch.equal(known, parameter):
                module._parameters[leaf] = known


def probe(tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """A padded batch of a few texts."""
    return {k: v.to(device) for k, v in tokenizer(list(WORDS), padding=True, return_tensors="pt").items()}


def merge_run(run: str, out: str | None, *, allow_code: bool = False) -> None:
    """Write the merged model of a run to `out` (RUN/merged by default), checked before and after it was written."""
    one, method = open_unmerged(run, allow_code=allow_code)
    if not hasattr(method, "merge"):
        raise InputError(
            f"{one.folder}: the layers of {one.recipe.tune.method} do not fold into plain weights; they stay in model/"
        )
    folder = Path(out) if out else one.folder / "merged"
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: it exists and is not empty")
    batch = probe(one.tokenizer, torch.device("cpu"))
    apart = adapters.merge(one.model, method, batch)
    needed = sum(tensor.nbytes for tensor in one.model.state_dict().values())
    with disk.refusing(folder, needed), disk.whole(folder) as hidden:
        one.model.save_pretrained(hidden)
        for name, *_ in one.task.heads(one.model):
            one.tokenizer.save_pretrained(hidden / name)

        def written(auto: Any, place: str) -> Any:
            return auto.from_pretrained(hidden / place, local_files_only=True, dtype=torch.float32)

        again = runs.model_of(one.task, written).eval()
        with torch.inference_mode():
            if not torch.equal(swap.outputs_of(again(**batch)), swap.outputs_of(one.model(**batch))):
                raise RunError(f"{folder}: the written model computes something else than the one in memory; nothing was kept")
        disk.sync_tree(hidden)
    print(f"{folder}: merged and unmerged outputs are {apart:.1e} apart on a probe batch; read back, it computes the same")
