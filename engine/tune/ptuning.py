"""P-tuning: a prompt that comes out of a small network (Liu et al. 2021, arXiv:2103.10385).

    vectors E (P, C)  ->  [ network ]  ->  prompt (P, C)  ->  before the text, as in prompt.py

      mlp    W3 relu(W2 relu(W1 e))                each vector for itself
      lstm   W2 relu(W1 [h-> ; <-h])               a bidirectional LSTM lets each vector know its neighbours

A prompt's vectors trained one by one are slow to find each other; a network makes them move together, which the paper found
steadier and better. Once trained, only the prompt counts: on disk, in the peft package's layout, the network is folded away,
and such a file opens as `prompt`. The prompt stands before the text (the paper lets a template place it).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.schema import Tune
from engine.tune import prompt

STAYS = True  # the saved model keeps its prompt and the network
PEFT_TYPE = "P_TUNING"


class Options(Tune):
    """Length of the prompt and shape of the network."""

    length: int = Field(16, ge=1, le=4096, description="Vectors before the text; they take this many positions of the model's.")
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="The network that makes the prompt.")
    encoder_size: int | None = Field(None, ge=1, description="Its inner width; by default that of the embeddings.")
    encoder_layers: int = Field(2, ge=1, description="Layers of the LSTM.")
    encoder_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout between the layers of the LSTM.")


takes = prompt.takes


class Encoder(nn.Module):
    """The network between the trained vectors and the prompt; the layers are named as peft's PromptEncoder names them."""

    def __init__(self, width: int, hidden: int, kind: str, layers: int, dropout: float):
        super().__init__()
        self.lstm_head: nn.LSTM | None = None
        if kind == "lstm":
            between = dropout if layers > 1 else 0.0
            self.lstm_head = nn.LSTM(width, hidden, num_layers=layers, dropout=between, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            parts = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)]
            self.mlp_head = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """(P, C) -> (P, C)."""
        h = x if self.lstm_head is None else self.lstm_head(x[None])[0][0]
        return self.mlp_head(h)  # type: ignore[no-any-return]


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Put the prompt and its network in, freeze the rest but the head; returns the coverage line."""
    width = prompt.embeddings(model).shape[1]
    hidden = options.encoder_size or width
    network = Encoder(width, hidden, options.encoder, options.encoder_layers, options.encoder_dropout)
    prompt.attach(model, torch.randn(options.length, width), network, head)
    return f"ptuning: {options.length} vectors of {width} before the text, made by an {options.encoder} of width {hidden}"


def peft(model: Any, options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json's keys, and prompt_embeddings (P, E): what the network makes."""
    config = {
        "peft_type": PEFT_TYPE, "encoder_reparameterization_type": options.encoder.upper(),
        "encoder_hidden_size": options.encoder_size or prompt.found(model).embedding.shape[1],
        "encoder_num_layers": options.encoder_layers, "encoder_dropout": options.encoder_dropout,
    }  # fmt: skip
    return prompt.shared_config(model) | config, {"prompt_embeddings": prompt.folded(model)}


from_peft = prompt.from_peft  # the file holds no network, so it opens as `prompt`
load_peft = prompt.load_peft
