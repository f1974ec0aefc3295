"""The pieces of speed that live inside a model: put in one after the other, each proven before the next.

    attention    a few rows at a time, on a CPU             train.kernels        engine/fast/attention.py
    packing      no padding                                 train.packing        engine/fast/packing.py
    last layer   only the positions that the head reads     train.last_layer     engine/fast/last_layer.py

A piece that the architecture, a tuning method or a swapped layer makes impossible stays out, and `said` has the reason: it is
told at the start of a run, by `check`, and in the log. A model that only predicts is compared by its outputs alone. Long
examples are cut for the proof, so that it costs about as much as one step however long the texts are.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.fast import attention, last_layer, packing
from engine.fast.last_layer import LastLayer
from engine.fast.packing import Packing
from engine.fast.proof import Proof
from engine.recipe import Recipe

LONGEST = 32  # tokens of the probe's examples


@dataclass
class Pieces:
    """What is on, and what was found, a clause for each piece."""

    packing: Packing | None = None
    last_layer: LastLayer | None = None
    said: list[str] = field(default_factory=list)


def install(model: Any, recipe: Recipe, probe: dict[str, Tensor], *, trains: bool = True) -> Pieces:
    """Put in what the recipe asks for and what proves itself on `probe`, the inputs of a few examples of unlike lengths."""
    pieces, asked = Pieces(), recipe.train
    cpu = probe["input_ids"].device.type == "cpu"
    ours = cpu and (asked.kernels or asked.dropout == "pool") and attention.possible(model)
    possible = ours or (asked.packing and not packing.refusal(model)) or (asked.last_layer and not last_layer.refusal(model))
    probe = cut(probe)
    proof = Proof(model, probe, gradients=trains) if possible else None
    if ours and proof:
        pieces.said += attention.install(model, proof)
    if asked.packing:
        pieces.packing, found = packing.install(model, probe, proof)
    else:
        found = "rows are not packed: train.packing is false"
    pieces.said.append(found)
    if asked.last_layer:
        pieces.last_layer, found = last_layer.install(model, probe, pieces.packing, proof)
    else:
        found = "the last layer is whole: train.last_layer is false"
    pieces.said.append(found)
    return pieces


def cut(probe: dict[str, Tensor]) -> dict[str, Tensor]:
    """The probe, (B, T), with at most LONGEST tokens an example; the two shortest keep room for each other."""
    both = int(probe["attention_mask"].sum(1).sort().values[:2].sum())
    return {name: tensor[:, : max(LONGEST, both)] for name, tensor in probe.items()}
