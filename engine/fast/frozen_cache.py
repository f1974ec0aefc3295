"""The frozen-prefix cache: what is frozen is computed once, not once an epoch.

With the embeddings and the first k of L blocks frozen, what enters block k depends on an example's tokens alone. So the
states of all tokens are computed once, in eval mode, and kept in a file (engine/fast/frozen_file.py). Training begins there:

    tokens -> embeddings -> block 0 ... block k-1 -> [ file ]       once, 2 H or 4 H bytes a token
                                                        |
                                    [ file ] -> block k ... block L-1 -> head       every epoch

At k = L - 1 this leaves one block of L and the head to compute.

The seam. The module whose output enters block 0 (the embeddings) gives the states instead, packed where rows are packed, and
the k frozen blocks hand on what they get. An example is found by its tokens, so neither windows nor tasks need to know; a
batch with an example that is not in the file is computed plainly. Examples of one length are computed together, so no state
depends on padding.

Exactness. It computes what the same model computes whose frozen part is in eval mode: float32 up to rounding, bfloat16 with
each state rounded to 8 bits. The frozen part loses its dropout, which costs a little regularisation (0.7 to 0.9 points on
SST-2 with 6,920 rows, within a standard error): that is why it is asked for by name (`train.cache_frozen`). Where there is no
room the frozen part is computed each time, in eval mode too, so that the numbers do not depend on the disk.

How far "frozen" goes is not read off names: a block counts while nothing that ever trains has a gradient through its output
on an example. So adapters, prompts, prefixes and timetables are seen. Three examples are then compared with and without it.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import disk, distributed, faults, seeds
from engine.data.encode import Encoded
from engine.fast import frozen_file
from engine.fast.frozen_places import INPUTS, Places
from engine.fast.packing import Packing
from engine.freeze import ever_trains, layout
from engine.models import eval_mode

VERSION = 1  # of how the states are computed: part of the hash
BUDGET = {"cpu": 4096}  # tokens computed at once
LARGE = 65536  # on a GPU
APART = {"float32": 1e-4, "bfloat16": 5e-2}  # of the probe's outputs, relative to the largest


@dataclass
class Seam:
    """The frozen beginning of a model and where the states come in."""

    body: nn.Module
    before: list[nn.Module]  # embeddings
    entry: nn.Module  # gives what enters block 0
    blocks: list[nn.Module]  # the k frozen ones
    depth: int  # L
    hidden: int  # H
    dtype: torch.dtype  # of what enters block k
    rest: int | None  # how many None follow the states in what a block returns; None: it returns the states alone
    tensors: dict[str, Tensor]  # what they are computed from


class _Reached(Exception):  # noqa: N818 (no error: a way out)
    """Carries the states out of a forward pass that need go no further."""


def seam(model: Any, head: list[str], probe: dict[str, Tensor]) -> Seam | str:
    """The longest frozen beginning, or why there is none. `probe` holds padded inputs; its first example is used."""
    parts = layout(model, head)
    if parts.between:
        return "an encoder-decoder has two stacks of blocks"
    blocks = [model.get_submodule(path) for path in parts.blocks]
    given: dict[int, tuple[nn.Module, Tensor]] = {}  # every tensor is kept, so that no other gets its id
    entered: list[tuple[nn.Module, Tensor]] = []
    left: list[tuple[Tensor, int | None]] = []

    def gives(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not entered:
            given[id(output)] = (module, output)

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((module, args[0] if args else kwargs["hidden_states"]))

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        states, *rest = output if isinstance(output, tuple) else (output,)
        plain = all(one is None for one in rest)
        left.append((states if plain else torch.empty(0), len(rest) if isinstance(output, tuple) else None))

    outside = [m for m in model.modules() if not any(m is b for block in blocks for b in block.modules())]
    hooks = [m.register_forward_hook(gives) for m in outside]
    hooks += [b.register_forward_pre_hook(enters, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(leaves) for b in blocks]
    try:
        n = int(probe["attention_mask"][0].sum())
        with _all_that_trains(model), eval_mode(model), torch.enable_grad():
            model(**{name: tensor[:1, :n] for name, tensor in probe.items()})
    finally:
        for hook in hooks:
            hook.remove()
    if [id(m) for m, _ in entered] != [id(b) for b in blocks]:
        return f"{model.config.model_type} does not run its blocks once each, in order"
    start = entered[0][1]
    frozen = [s.shape == start.shape and not s.requires_grad and rest == left[0][1] for s, rest in left]
    k = len(list(itertools.takewhile(bool, frozen)))
    if k == 0:
        return "no block is frozen below all that trains"
    if id(start) not in given:
        return f"{model.config.model_type} makes what enters its first block outside of any module"
    apart = [*parts.blocks[k:], *parts.head]
    tensors = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not any(name.startswith(f"{path}.") for path in apart) and not ever_trains(tensor)
    }
    before = [model.get_submodule(path) for path in parts.before]
    body = getattr(model, model.base_model_prefix, model)
    return Seam(
        body, before, given[id(start)][0], blocks[:k], len(blocks), start.shape[-1], left[k - 1][0].dtype, left[0][1], tensors
    )


@contextlib.contextmanager
def _all_that_trains(model: nn.Module) -> Iterator[None]:
    """Within the block all parameters that train at any time of the run require gradients."""
    before = {p: p.requires_grad for p in model.parameters()}
    for p in before:
        p.requires_grad_(ever_trains(p))
    try:
        yield
    finally:
        for p, required in before.items():
            p.requires_grad_(required)


class FrozenCache:
    """Supplies the states of a model's frozen beginning. `active` turns it off and on; without a file it computes them."""

    def __init__(self, seam: Seam, places: Places, device: torch.device, packing: Packing | None = None):
        self.seam, self.places, self.device, self.packing = seam, places, device, packing
        self.active = True
        self.used = 0  # batches whose examples were found
        self.states: Tensor | None = None  # (1 + tokens, H)
        self.now: Tensor | None = None  # what the batch that is being computed gets, (B, T, H)
        self.arguments = list(inspect.signature(seam.body.forward).parameters)
        self.hooks = [
            seam.body.register_forward_pre_hook(self._look, with_kwargs=True, prepend=True),
            seam.body.register_forward_hook(self._forget, always_call=True),
        ]
        self.undo = [_put(seam.entry, "forward", functools.partial(self._enter, seam.entry.forward))]
        self.undo += [_put(b, "forward", functools.partial(self._through, b.forward)) for b in seam.blocks]
        for module in (m for top in (*seam.before, seam.entry, *seam.blocks) for m in top.modules()):
            self.undo.append(_put(module, "train", functools.partial(_stay, module)))
            module.training = False

    def open(self, states: Tensor) -> None:
        """Supply from `states`, (1 + tokens, H); they move to a GPU that has four times their room."""
        if self.device.type == "cuda" and states.nbytes * 4 <= torch.cuda.mem_get_info(self.device)[0]:
            states = states.to(self.device)
        self.states = states

    def remove(self) -> None:
        """Leave the model as it was found."""
        for hook in self.hooks:
            hook.remove()
        for undo in reversed(self.undo):
            undo()
        for module in (*self.seam.before, self.seam.entry, *self.seam.blocks):
            module.train(self.seam.body.training)

    def _look(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now = None
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        examples = self.places.find(given) if self.active else None
        if examples is not None:
            self.used += 1
            self.now = None if self.states is None else self.gather(examples, given["input_ids"].shape[1])

    def _forget(self, body: nn.Module, args: Any, output: Any) -> None:
        self.now = None

    def gather(self, examples: Tensor, t: int) -> Tensor:
        """The states of examples (B,), padded to t tokens with zeros: (B, t, H)."""
        assert self.states is not None
        places = self.places.places(examples, t).to(self.states.device)
        states = self.states.index_select(0, places.flatten()).to(self.device, self.seam.dtype)
        return states.view(*places.shape, -1)

    def _enter(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.now is None:
            return inner(*args, **kwargs)
        plan = self.packing.plan if self.packing else None
        return self.now if plan is None else plan.pack(self.now)

    def _through(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.now is None:
            return inner(*args, **kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        return states if self.seam.rest is None else (states, *[None] * self.seam.rest)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of module.train: it stays in eval mode."""
    return module


def _put(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of this object alone; returns what takes it back."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value

    def undo() -> None:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before

    return undo


def install(
    model: Any,
    task: Any,
    splits: list[Encoded],
    head: list[str],
    *,
    kind: str,  # float32 or bfloat16: how the states are kept
    folder: Path,
    limit: float,  # GiB that the folder may hold
    device: torch.device,
    autocast: Callable[[], Any],
    packing: Packing | None = None,  # the piece that packs this model's rows, if it is in
    about: Any,  # what else the states depend on, such as the code of custom layers
    interrupted: Callable[[], bool],
) -> tuple[FrozenCache | None, str]:
    """Find the frozen beginning, make or find its states, prove them on a probe; (the cache, what to say).

    Where there is no room for the file, the cache that is returned has none and keeps the frozen part in eval mode. Raises
    KeyboardInterrupt on all ranks once `interrupted` says so on rank 0, which alone makes the file.
    """
    by_length = np.argsort(splits[0].lengths, kind="stable")
    rows = by_length[[0, min(1, len(by_length) - 1), -1]]
    batch = {name: tensor.to(device) for name, tensor in splits[0].batch(rows).items()}
    found = seam(model, head, {name: tensor for name, tensor in batch.items() if name in INPUTS})
    if isinstance(found, str):
        return None, f"frozen cache: not used: {found}"
    places = Places(splits)
    cache = FrozenCache(found, places, device, packing)
    with seeds.untouched(), eval_mode(model), torch.inference_mode(), autocast():
        plain = task.forward(model, batch).float()
    if not cache.used:
        cache.remove()
        return None, "frozen cache: not used: the task does not hand its tokens to the model as they are"
    path = folder / f"{key(found, places, model.config, kind, device, about)}{frozen_file.ENDING}"
    said = ""
    if distributed.rank() == 0:
        said = _make_or_find(model, cache, path, kind, limit, autocast, interrupted)
    said = distributed.from_first(said)
    if said == "stopped":
        cache.remove()
        raise KeyboardInterrupt
    blocks = f"frozen cache: {len(found.blocks)} of {found.depth} blocks"
    if said not in ("made", "found"):
        return cache, f"{blocks}, computed each time in eval mode: {said}"
    states = frozen_file.find(path, places.total, found.hidden, kind, check=False)
    if distributed.largest(int(states is None)):
        return cache, f"{blocks}, computed each time in eval mode: not every process can open {path}"
    assert states is not None
    cache.open(states)
    problem = _prove(model, task, cache, batch, plain, kind, autocast)
    if distributed.largest(int(bool(problem))):
        cache.remove()
        path.unlink(missing_ok=True)
        return None, f"frozen cache: not used: {problem or 'another process found it to differ'}"
    return cache, f"{blocks}, {frozen_file.size(places.total, found.hidden, kind) / 1e6:,.0f} MB, {said}"


def key(seam: Seam, places: Places, config: Any, kind: str, device: torch.device, about: Any) -> str:
    """sha256 of all that the states depend on: frozen tensors, tokens, k, types, architecture, versions, custom code."""
    import transformers

    settings = [
        VERSION, kind, len(seam.blocks), config.to_dict(), torch.__version__, transformers.__version__, device.type, about,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in seam.tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(frozen_file.content(tensor))
    for split in places.splits:
        for name in places.columns:
            flat, offsets = split.ragged[name]
            digest.update(np.ascontiguousarray(offsets, dtype=np.int64).data)
            digest.update(np.ascontiguousarray(flat, dtype=np.int32).data)
    return digest.hexdigest()[:40]


def _make_or_find(
    model: Any,
    cache: FrozenCache,
    path: Path,
    kind: str,
    limit: float,
    autocast: Callable[[], Any],
    interrupted: Callable[[], bool],
) -> str:
    """ "found", "made", "stopped", or why there is no file."""
    total, hidden = cache.places.total, cache.seam.hidden
    if frozen_file.find(path, total, hidden, kind) is not None:
        return "found"
    cache.active = False  # while the states are computed none are looked for
    try:
        reason = frozen_file.make_room(path.parent, frozen_file.size(total, hidden, kind), int(limit * 2**30))
        if reason:
            return reason
        frozen_file.write(path, total, hidden, kind, _states(model, cache, autocast, interrupted))
    except disk.DiskError as error:
        return str(error)
    except KeyboardInterrupt:
        return "stopped"
    finally:
        cache.active = True
    return "made"


def _states(model: Any, cache: FrozenCache, autocast: Callable[[], Any], interrupted: Callable[[], bool]) -> Iterator[Tensor]:
    """The zeros of padding, then the states of all examples in the file's order, (n, H) each."""
    import sys

    from tqdm import tqdm

    seam, places, device = cache.seam, cache.places, cache.device
    yield torch.zeros(1, seam.hidden)
    with tqdm(total=places.total - 1, disable=not sys.stderr.isatty(), unit="token", desc="frozen cache", leave=False) as bar:
        for split, rows in places.batches(BUDGET.get(device.type, LARGE)):
            todo = [rows]
            while todo:
                if interrupted():
                    raise KeyboardInterrupt
                with faults.Memory(alone=True) as memory:
                    batch = {k: v.to(device) for k, v in split.batch(todo[0]).items() if k in INPUTS}
                    states = beginning(model, seam, batch, autocast)
                if memory.short:
                    faults.release()
                    if len(todo[0]) == 1:
                        raise faults.too_large(f"of {int(split.lengths[todo[0]][0])} tokens", "frozen cache")
                    todo[:1] = np.array_split(todo[0], 2)
                else:
                    yield states.flatten(0, 1)
                    bar.update(states.shape[0] * states.shape[1])
                    del todo[0]


def beginning(model: Any, seam: Seam, inputs: dict[str, Tensor], autocast: Callable[[], Any]) -> Tensor:
    """What the last frozen block gives, (B, T, H), in eval mode. Nothing above it is computed."""

    def reached(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output if isinstance(output, Tensor) else output[0])

    hook = seam.blocks[-1].register_forward_hook(reached)
    try:
        with seeds.untouched(), eval_mode(model), torch.inference_mode(), autocast():
            model(**inputs)
    except _Reached as stop:
        states: Tensor = stop.args[0]
    finally:
        hook.remove()
    if states.shape[:2] != inputs["input_ids"].shape:
        raise AssertionError(f"{tuple(states.shape)} states of {tuple(inputs['input_ids'].shape)} tokens")
    return states


def _prove(model: Any, task: Any, cache: FrozenCache, batch: dict[str, Tensor], plain: Tensor, kind: str, autocast: Any) -> str:
    """Compare the task's outputs on a padded probe with `plain`, those without the file; what is wrong, or ""."""
    with seeds.untouched(), eval_mode(model), torch.inference_mode(), autocast():
        rounds = torch.is_autocast_enabled(cache.device.type) or cache.seam.dtype == torch.bfloat16
        try:
            made = task.forward(model, batch).float()
        except RuntimeError as error:  # the states do not fit where they are put
            return f"with it a probe batch fails: {str(error).splitlines()[0]}"
    real = plain > torch.finfo(torch.float32).min  # a task may write the least number where nothing is asked
    distance = float((made[real] - plain[real]).abs().max() / plain[real].abs().max().clamp(min=1.0))
    if not distance <= APART["bfloat16" if rounds else kind]:
        return f"with it a probe batch differs by {distance:.1e}"
    return ""
