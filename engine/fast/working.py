"""The working model: what a model is while it trains, put together before the loop and taken apart after it.

    prepared model  ->  dropout's fast masks ->  compact vocabulary  ->  bfloat16 weights  ->  training, evaluation
    model/          <-                           the whole table     <-  float32 masters  <-

Each piece can be left out by its key and then changes nothing; the order is that of need: rows are dropped before they are
rounded, and come back after the others are float32 again. Names of parameters stay as they are throughout.
"""

from collections.abc import Mapping
from typing import Any

import torch

from engine import swap
from engine.data.encode import Encoded
from engine.fast import dropout, kernels, vocabulary, weights
from engine.models import eval_mode
from engine.optim import AdamW
from engine.schema import Train


class Working:
    """A model in its working form, until `restore`. `said`: piece -> what was done, for people and the log."""

    def __init__(self, model: Any, train: Train, encoded: Mapping[str, Encoded], tokenizer: Any, tokens: int):
        config = model.config.get_text_config()
        longest = max(int(split.lengths.max()) for split in encoded.values())
        widest = max(config.hidden_size, config.num_attention_heads * longest)  # of states, of attention
        self.dropout = dropout.Dropouts(model, train.dropout, tokens * widest, train.kernels)
        said = {"dropout": self.dropout.said}
        self.vocabulary = None
        if train.compact_vocabulary:
            special = (
                *tokenizer.all_special_ids,
                *(getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "decoder_start")),
            )
            self.vocabulary = vocabulary.Vocabulary(model, [split.ragged["input_ids"][0] for split in encoded.values()], special)
            said["vocabulary"] = self.vocabulary.said
        self.masters = weights.Masters(model, train.weights)
        said["weights"] = self.masters.said
        self.said = {piece: line for piece, line in said.items() if line}

    def prove(self, model: Any, probe: dict[str, torch.Tensor], where: str) -> None:
        """InputError if the model cannot compute with bfloat16 weights: a layer that mixes types, for instance."""
        if self.masters.working:
            with eval_mode(model):
                swap.probe(model, [], probe, where)

    def follow(self, optimizer: AdamW) -> None:
        """After each of its steps: note the decay of rows that are away, round the masters into the working weights."""
        if self.vocabulary:
            optimizer.after.append(self.vocabulary.note_decay)
        optimizer.after.append(self.masters.copy_down)

    def rest(self, optimizer: AdamW) -> None:
        """After the last step: give back what only training needs, so that scores, model/ and report fit where it was."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
                p.__dict__.pop("spare", None)
        optimizer.state.clear()
        kernels.give_back()

    def restore(self) -> None:
        """The prepared model's own layers and types, with what was learnt."""
        self.masters.restore()
        if self.vocabulary:
            self.vocabulary.restore()
        self.dropout.restore()
