"""One encoder under several heads: multitask's model, made of ordinary models of transformers that share their body.

    heads.sentiment   classifier (H, 2)  ---.
    heads.topics      classifier (H, 5)  ---+---  bert          one body, once in memory, in checkpoints, in the optimizer
    heads.similarity  classifier (H, 1)  ---'

Each head stays the model that it was (BertForSequenceClassification, BertForTokenClassification, ...), and finds the shared
body where it had its own. Only the container holds the body as a part, so every parameter has one path: `bert.encoder...`,
`heads.topics.classifier.weight`. Tuning methods, swapped layers and the pieces of speed work on these paths as on any other.

Saved, every head gets a folder of its own with a copy of the body: AutoModelForSequenceClassification.from_pretrained(
"RUN/model/topics") needs nothing of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.models import Loaded


class Answers(dict[str, Tensor]):
    """What all heads say of one batch: "NAME.logits" -> logits."""

    @property
    def logits(self) -> Tensor:
        """All of them as one vector."""
        return torch.cat([made.flatten() for made in self.values()])


class Together(nn.Module):
    """The shared body under its own name (`bert`, `transformer`, ...), and `heads`, by the tasks' names."""

    def __init__(self, models: dict[str, Any]):
        super().__init__()
        first = next(iter(models.values()))
        self.base_model_prefix = prefix = first.base_model_prefix
        bodies = {name: model._modules.get(prefix) for name, model in models.items()}
        if None in bodies.values():
            raise InputError(f"tasks: {first.config.model_type} has no body of its own that heads could share")
        # a pooler comes with some heads and not with others: the largest body serves all
        body: Any = max(bodies.values(), key=lambda one: sum(1 for _ in one.parameters()))  # type: ignore[union-attr]
        self.add_module(prefix, body)
        self.config, self.heads, self.without = body.config, nn.ModuleDict(), {}
        for name, model in models.items():
            if hasattr(self.heads, name):
                raise InputError(f"tasks.{name}: torch's modules have something else of this name; take another one")
            own: Any = bodies[name]
            self.without[name] = {f"{prefix}.{key}" for key in body.state_dict().keys() - own.state_dict().keys()}
            tied = {id(p): key for key, p in own.named_parameters()}
            del model._modules[prefix]
            vars(model)[prefix] = body
            for module in model.modules():  # a masked language model's head ends in the word embeddings
                for leaf, parameter in module._parameters.items():
                    if id(parameter) in tied:
                        module._parameters[leaf] = body.get_parameter(tied[id(parameter)])
            self.heads[name] = model

        self.all_tied_weights_keys = {  # as transformers' models have them
            self.path_in(name, key): self.path_in(name, str(source))
            for name, model in models.items() for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        }  # fmt: skip

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any) -> Answers:
        """Every head's answers: for probes. Training and evaluation call the head whose examples a batch holds."""
        said = {name: head(input_ids=input_ids, attention_mask=attention_mask, **more) for name, head in self.heads.items()}
        return Answers({f"{name}.{key}": made for name, one in said.items() for key, made in one.items()
                        if isinstance(made, Tensor) and key.endswith("logits")})  # fmt: skip

    def get_input_embeddings(self) -> Any:
        return getattr(self, self.base_model_prefix).get_input_embeddings()

    @contextmanager
    def alone(self, name: str) -> Iterator[Any]:
        """The head with the body as a part of it, an ordinary model again."""
        head: Any = self.heads[name]
        body, parts = vars(head).pop(self.base_model_prefix), head._modules
        head._modules = {self.base_model_prefix: body, **parts}
        try:
            yield head
        finally:
            head._modules = parts
            vars(head)[self.base_model_prefix] = body

    def save_pretrained(self, folder: Path) -> None:
        """A folder for each head."""
        for name in self.heads:
            with self.alone(name) as head:
                state = {key: tensor for key, tensor in head.state_dict().items() if key not in self.without[name]}
                head.save_pretrained(Path(folder) / name, state_dict=state)

    def path_in(self, name: str, key: str) -> str:
        """A head's own name of a parameter -> its path here."""
        return key if key.startswith(self.base_model_prefix + ".") else f"heads.{name}.{key}"


def together(loaded: dict[str, Loaded]) -> Loaded:
    """Models that begin with the same weights, as one."""
    first = next(iter(loaded.values()))
    model = Together({name: one.model for name, one in loaded.items()})
    paths = {path for path, _ in model.named_parameters()}
    fresh = {model.path_in(name, key) for name, one in loaded.items() for key in one.fresh}
    return Loaded(model, first.tokenizer, first.source, sorted(fresh & paths), first.sha256, first.trained)
