"""Checkpoints: directories that are whole or not there.

    checkpoints/step-00000120/   to go on: weights, optimizer, state     checkpoints/best-00000100/   the best weights
        weights.safetensors      what trains, and the buffers but for quantised weights, which the base makes again
        optimizer.safetensors    AdamW's averages, by parameter name
        state.json               Progress, learning rates, scaler
        manifest.json            sha256 and size of each file, written last

Protocol: write into a hidden directory, fsync every file, manifest last, fsync the directory, rename, fsync the parent.
A crash at any point leaves either the new checkpoint or the one before it. Loading checks every hash before it uses
a byte, takes the newest that verifies and moves the others to quarantine/. Nothing is ever pickled.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from engine.errors import RunError
from engine.freeze import ever_trains
from engine.layers.quantized import quantized
from engine.models import sha256

MANIFEST = "manifest.json"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What a step can change: the parameters that train, now or later, and the buffers that are no quantised weights."""
    state = model.state_dict(keep_vars=True)
    codes = {f"{path}.{name}" for path, layer in quantized(model).items() for name, _ in layer.named_buffers()}
    return {n: t.detach() for n, t in state.items() if n not in codes and (not isinstance(t, nn.Parameter) or ever_trains(t))}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's tensors as PARAMETER/KEY."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def write(folder: Path, name: str, model: nn.Module, progress: Any, optimizer: Any = None, scaler: Any = None) -> Path:
    """Save checkpoints/NAME; with an optimizer it is one to go on from. Raises RunError when the disk refuses."""
    final, hidden = folder / name, folder / f".{name}.{os.getpid()}"
    state: dict[str, Any] = {"progress": asdict(progress)}
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        files = {"weights.safetensors": save({k: v.cpu().contiguous() for k, v in _untied(weights(model)).items()})}
        if optimizer is not None:
            files["optimizer.safetensors"] = save({k: v.cpu().contiguous() for k, v in optimizer_state(optimizer).items()})
            state["groups"] = [{k: g[k] for k in ("names", "lr", "initial_lr")} for g in optimizer.param_groups]
            state["scaler"] = scaler.state_dict() if scaler else {}
        files["state.json"] = json.dumps(state, indent=1).encode()
        for file, content in files.items():
            _write_synced(hidden / file, content)
        manifest = {file: {"sha256": sha256(hidden / file), "bytes": len(content)} for file, content in files.items()}
        _write_synced(hidden / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_directory(hidden)
        if final.exists():
            shutil.rmtree(final)
        hidden.rename(final)
        _sync_directory(folder)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        last = newest(folder)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise RunError(f"{final}: saving at step {progress.step} failed: {error.strerror or error}; {kept}") from error
    return final


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once: tied weights are saved under their first name."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        for file, facts in manifest.items():
            if "/" in file or not (path / file).is_file():
                return f"{file} is missing"
            if (path / file).stat().st_size != facts["bytes"] or sha256(path / file) != facts["sha256"]:
                return f"{file} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    return None if "weights.safetensors" in manifest and "state.json" in manifest else "files are missing from the manifest"


def newest(folder: Path, quarantine: bool = False) -> Path | None:
    """The newest step-* that verifies; bad ones are moved to quarantine/ beside it when asked."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = verify(path)
        if problem is None:
            return path
        if quarantine:
            target = folder.parent / "quarantine" / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            print(f"warning: {path}: {problem}; moved to {target}")
    return None


def read_state(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "state.json").read_text("utf-8")))


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into the model; every tensor must have its place."""
    problem = verify(path)
    if problem:
        raise RunError(f"{path}: {problem}")
    saved = load((path / "weights.safetensors").read_bytes())
    expected = _untied(weights(model))
    if saved.keys() != expected.keys():
        odd = sorted(saved.keys() ^ expected.keys())
        raise RunError(f"{path}: it belongs to another model or method: {len(odd)} tensors differ, such as {odd[0]}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(saved[name])


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Put AdamW's averages, learning rates and the scaler back."""
    saved = load((path / "optimizer.safetensors").read_bytes())
    state = read_state(path)
    for group, was in zip(optimizer.param_groups, state["groups"], strict=True):
        if group["names"] != was["names"]:
            raise RunError(f"{path}: its optimizer trains other parameters than this recipe")
        group["lr"], group["initial_lr"] = was["lr"], was["initial_lr"]
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = [k for k in saved if k.rpartition("/")[0] == name]
            optimizer.state[parameter] = {
                k.rpartition("/")[2]: saved[k].to(parameter.device if saved[k].ndim else "cpu") for k in keys
            }
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest step-* and the best-* that they or the newest best need."""
    steps = sorted(folder.glob("step-*"), reverse=True)
    for path in steps[keep:]:
        shutil.rmtree(path)
    needed = {f"best-{read_state(p)['progress']['best_step']:08d}" for p in steps[:keep]}
    for path in sorted(folder.glob("best-*"), reverse=True)[1:]:
        if path.name not in needed:
            shutil.rmtree(path)
