"""Checkpoints: directories that are whole or not there.

    checkpoints/step-00000120/   to go on: weights, optimizer, state     checkpoints/best-00000100/   the best weights
        weights.safetensors      what trains, and the buffers but for quantised weights, which the base makes again
        optimizer.safetensors    AdamW's averages, by parameter name
        state.json               Progress, learning rates, scaler, the log's length
        manifest.json            sha256 and size of each file, written last

Protocol: write into a hidden directory, fsync every file, manifest last, fsync the directory, rename, fsync the parent;
only then is it a save, and only then may an older one go. A crash at any point leaves the new checkpoint or the one
before it. Loading checks every hash before it uses a byte, takes the newest that verifies, with the best weights that
it needs, and moves the others to quarantine/. Nothing is ever pickled.

Where a step is the best so far, its weights are written once, and the second name is a link to the same file: going on
needs both to verify anyway, and neither is ever written to again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from engine import disk
from engine.errors import RunError
from engine.fast import vocabulary
from engine.fast.weights import copy_down
from engine.freeze import ever_trains, moved
from engine.layers.quantized import quantized
from engine.models import sha256

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # as safetensors names them  # fmt: skip
SMALL = 1 << 20  # bytes allowed for headers, state.json and the manifest when free space is checked


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What a step can change: the parameters that train, now or later, in float32; buffers that are no quantised weights."""
    state = model.state_dict(keep_vars=True)
    codes = {f"{path}.{name}" for path, layer in quantized(model).items() for name, _ in layer.named_buffers()}
    changing = {n: t for n, t in state.items() if n not in codes and (not isinstance(t, nn.Parameter) or ever_trains(t))}
    return {n: moved(t).detach() if isinstance(t, nn.Parameter) else t.detach() for n, t in changing.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's tensors as PARAMETER/KEY."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def write(
    folder: Path, name: str, model: nn.Module, progress: Any, optimizer: Any = None, scaler: Any = None, log_bytes: int = 0
) -> Path:
    """Save checkpoints/NAME; with an optimizer it is one to go on from. Raises disk.DiskError when the disk refuses.

    When it returns, the checkpoint survives a power loss. `log_bytes` is the log's length that belongs to this step.
    """
    final = folder / name
    tensors = {WEIGHTS: _untied(weights(model))}
    state: dict[str, Any] = {"progress": asdict(progress), "log_bytes": log_bytes}
    if optimizer is not None:
        tensors["optimizer.safetensors"] = optimizer_state(optimizer)
        state["groups"] = [{k: g[k] for k in ("names", "lr", "initial_lr")} for g in optimizer.param_groups]
        state["scaler"] = scaler.state_dict() if scaler else {}
    needed = sum(t.nbytes for group in tensors.values() for t in group.values()) + SMALL
    with disk.refusing(final, needed):
        disk.make(folder)
        disk.require(folder, needed)
        with disk.whole(final) as hidden:
            twin = folder / f"best-{progress.best_step:08d}"
            same = optimizer is not None and progress.best_step == progress.step and (twin / MANIFEST).exists()
            linked = _link(twin, hidden) if same else {}
            rest = {file: group for file, group in tensors.items() if file not in linked}
            _write_files(hidden, _contents(rest, state), linked)
    return final


def _contents(tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Iterator[tuple[str, disk.Content]]:
    """File name and what it holds."""
    for file, group in tensors.items():
        yield file, safetensors(group)
    yield "state.json", json.dumps(state, indent=1).encode()


def safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, part by part: eight bytes for the header's length, the header in JSON, the tensors' own memory.

    The package makes the whole file in memory, and once more as bytes: for AdamW's averages that is four times the model.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    header, at = {}, 0
    for name, tensor in ordered:
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _link(twin: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Give the weights of another checkpoint a name in `folder`; their facts, or nothing if this disk has no links."""
    facts = _manifest(twin)[WEIGHTS]
    return {WEIGHTS: facts} if disk.link(twin / WEIGHTS, folder / WEIGHTS) else {}


def _write_files(folder: Path, contents: Iterator[tuple[str, disk.Content]], linked: dict[str, dict[str, Any]]) -> None:
    """Every file synced, then the manifest: where a manifest stands, all that it names was written before it."""
    manifest = dict(linked)
    for file, content in contents:
        manifest[file] = {"sha256": disk.write(folder / file, content), "bytes": (folder / file).stat().st_size}
    disk.write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once: tied weights are saved under their first name."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = _manifest(path)
        for file, facts in manifest.items():
            if "/" in file or not (path / file).is_file():
                return f"{file} is missing"
            if (path / file).stat().st_size != facts["bytes"]:
                return f"{file} is damaged: {(path / file).stat().st_size:,} bytes, not {facts['bytes']:,}"
            if (found := sha256(path / file)) != facts["sha256"]:
                return f"{file} is damaged: sha256 {found[:16]}..., not {facts['sha256'][:16]}..."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    missing = _parts(path) - manifest.keys()
    return f"{min(missing)} is missing from the manifest" if missing else None


def _parts(path: Path) -> set[str]:
    """The files that a checkpoint of this name has."""
    return {WEIGHTS, "state.json"} | ({"optimizer.safetensors"} if path.name.startswith("step-") else set())


def _manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / MANIFEST).read_bytes().decode("utf-8")))


def newest(folder: Path, quarantine: bool = False) -> Path | None:
    """The newest step-* that verifies, as do the best weights it needs; bad ones are moved to quarantine/ when asked."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        bad, problem = path, verify(path)
        if problem is None and (best := best_of(path)):
            bad, problem = best, verify(best)
        if problem is None:
            return path
        if quarantine:
            for one in dict.fromkeys((bad, path)):
                _set_aside(one, f"{bad.name}/{problem}" if one == bad else f"it needs {bad.name}")
    return None


def _set_aside(path: Path, problem: str) -> None:
    """Move a bad checkpoint to quarantine/ beside checkpoints/, and say so."""
    if not path.exists():  # best weights that several steps need, and that went with the first of them
        return
    target = path.parent.parent / "quarantine" / path.name
    with disk.refusing(target, 0):
        disk.make(target.parent)
        if target.exists():
            disk.remove(target)
        os.rename(path, target)
        disk.sync_directory(target.parent)
        disk.sync_directory(path.parent)
    print(f"warning: {path}: {problem}; moved to {target}")


def best_of(path: Path) -> Path | None:
    """The best-* whose weights a step-* would end with, if it watches a metric."""
    progress = read_state(path)["progress"]
    return None if progress["best"] is None else path.parent / f"best-{progress['best_step']:08d}"


def last_good(folder: Path) -> str:
    """The end of an error message: what a run can go on from."""
    path = newest(folder)
    if path is None:
        return "no checkpoint was saved yet"
    return f"the last good checkpoint is {path} (step {read_state(path)['progress']['step']}); go on with --resume"


def read_state(path: Path) -> dict[str, Any]:
    """state.json, if it is what was saved; RunError otherwise."""
    return dict(json.loads(_checked(path, "state.json")))


def _checked(path: Path, file: str) -> bytes:
    """A file's bytes, the very ones whose hash was compared."""
    content = (path / file).read_bytes() if (path / file).is_file() else b""
    try:
        expected = _manifest(path)[file]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: {MANIFEST} is damaged: {error}") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise RunError(f"{path}: {file} is damaged or missing")
    return content


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into the model; every tensor must have its place."""
    saved = load(_checked(path, WEIGHTS))
    expected = _untied(weights(model))
    if saved.keys() != expected.keys():
        odd = sorted(saved.keys() ^ expected.keys())
        raise RunError(f"{path}: it belongs to another model or method: {len(odd)} tensors differ, such as {odd[0]}")
    vocabulary.check(model, saved, path)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
    copy_down(model.parameters())


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Put AdamW's averages, learning rates and the scaler back."""
    saved = load(_checked(path, "optimizer.safetensors"))
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
    steps, best = (sorted(folder.glob(f"{kind}-*"), reverse=True) for kind in ("step", "best"))
    with disk.refusing(folder, 0):
        for path in steps[keep:]:
            disk.remove(path)
        needed = {_needs(path) for path in steps[:keep]} if best[1:] else set()
        for path in best[1:]:
            if path not in needed:
                disk.remove(path)


def _needs(path: Path) -> Path | None:
    try:
        return best_of(path)
    except RunError:  # damaged: it needs nothing, and goes into quarantine when a run would go on from it
        return None
