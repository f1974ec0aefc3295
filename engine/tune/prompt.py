"""Prompt tuning: trained vectors before the text's embeddings (Lester et al. 2021, arXiv:2104.08691).

    words        the  film  was  good          input_ids (B, T)
                  |    |     |    |   look-up
    vectors  p1 p2 e1   e2   e3   e4           inputs_embeds (B, P + T, E);  only p1 .. pP train, and the head
                        |
                 [ frozen model ]

P * E numbers steer the whole model: they are a prompt in a language finer than words. `vocabulary` begins with the
embeddings of P words drawn at random, which the paper found better than random vectors.

One seam serves every architecture: a hook before the model's body (`model.bert`, `model.transformer`, ...), which looks the
words up and puts the prompt before them, in the mask (visible to all), the token types (0) and the positions (the text's
move up by P); and one after it. The task's head, outside the body, still gets the input_ids and so still finds the last
token that is no padding (GPT-2, Llama) or the one that ends the text (T5). What it reads of the body's output:

    a head that reads the first position, or a pooler's output     all P + T: position 0 is p1, as in the peft package
    any other head (tokens, spans, language model, last token)     the text's T, so labels and offsets stay right

In T5 the prompt stands before the encoder's text, and the decoder may look at it; its own text has none. While generating
with a cache the prompt comes in once, with the first tokens. `hidden_states` and `attentions`, where asked for, cover P + T.
A row packed with others (engine/fast/packing.py) takes its prompt with it.
"""

import inspect
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from engine.errors import InputError
from engine.freeze import train_only
from engine.models import positions
from engine.schema import Tune

STAYS = True  # the saved model keeps its prompt
PEFT_TYPE = "PROMPT_TUNING"


class Options(Tune):
    """Length and beginning."""

    length: int = Field(16, ge=1, le=4096, description="Trained vectors before the text; they take this many positions of the model's.")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="Begin as the embeddings of random words, or as noise."
    )


def takes(options: Options) -> int:
    """How many of the model's positions the text cannot have."""
    return options.length


class Prompt(nn.Module):
    """P vectors of the embeddings' width E, and what the hooks must know of the body they stand before."""

    def __init__(
        self, vectors: Tensor, network: nn.Module | None, arguments: list[str], room: tuple[int | None, int], whole: bool
    ):
        super().__init__()
        self.embedding = nn.Parameter(vectors)  # (P, E)
        self.network = network  # (P, E) -> (P, E), or None
        self.arguments = arguments  # names of the body's arguments, in order
        self.longest, self.first = room  # how many positions there are, and the number of the first
        self.whole = whole  # the head reads all P + T positions

    def forward(self) -> Tensor:
        """The prompt: (P, E)."""
        return self.embedding if self.network is None else self.network(self.embedding)  # type: ignore[no-any-return]


def lengthen(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the body: input_ids (B, T) become inputs_embeds (B, P + T, E); mask, token types and positions follow."""
    prompt: Prompt = body.prompt
    given = dict(zip(prompt.arguments, args, strict=False)) | kwargs
    p, cache, mask, place = (
        len(prompt.embedding),
        given.get("past_key_values"),
        given.get("attention_mask"),
        given.get("position_ids"),
    )
    if mask is not None:
        if mask.ndim != 2:
            raise InputError("tune.method: prompt needs an attention_mask of shape (B, T); generate with the default cache")
        given["attention_mask"] = F.pad(mask, (p, 0), value=1)
    if place is not None:
        given["position_ids"] = place = place + p
    if cache is not None and cache.get_seq_length() > 0:  # the prompt is in the cache already
        return (), given
    ids = given.pop("input_ids", None)
    words: Tensor = given["inputs_embeds"] if ids is None else body.get_input_embeddings()(ids)
    b, t, _ = words.shape
    if prompt.longest is not None and t + p > prompt.longest:
        raise InputError(f"data.max_length: a text of {t} tokens and the prompt's {p} are more than this model's"
                         f" {prompt.longest} positions; at most {prompt.longest - p} are left for the text")  # fmt: skip
    given["inputs_embeds"] = torch.cat([prompt().to(words.dtype).expand(b, -1, -1), words], dim=1)
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = F.pad(given["token_type_ids"], (p, 0))
    if place is not None:
        own = torch.arange(p, device=place.device) + prompt.first
        given["position_ids"] = torch.cat([own.expand(len(place), -1), place], dim=1)
    return (), given


def shorten(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the body: last_hidden_state (B, P + T, H) -> (B, T, H), unless the head reads the first position."""
    prompt, cache = body.prompt, kwargs.get("past_key_values")
    hidden = output[0]
    if prompt.whole or (cache is not None and cache.get_seq_length() > hidden.shape[1]):  # a later step with a cache
        return output
    hidden = hidden[:, len(prompt.embedding) :]
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


def look_back(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a decoder: its mask over the encoder's output, (B, T), lets it look at the prompt too: (B, P + T)."""
    mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
    if mask is not None and states is not None:
        kwargs = kwargs | {"encoder_attention_mask": F.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)}
    return args, kwargs


def attach(model: Any, vectors: Tensor, network: nn.Module | None, head: list[str]) -> None:
    """Put a prompt before the model's body and train it, the head, and nothing else."""
    body = getattr(model, model.base_model_prefix, model)
    decoder = getattr(body, "decoder", None) if hasattr(body, "encoder") else None
    stack = body.encoder if decoder is not None or model.config.is_encoder_decoder else body
    reads_first = {_reads_first(one) for one in [*getattr(model, "heads", {}).values()] or [model]}
    if len(reads_first) > 1:
        raise InputError("tune.method: some of the heads read the first position alone, so one prompt cannot serve all tasks")
    whole = decoder is not None or reads_first.pop()
    arguments = list(inspect.signature(stack.forward).parameters)
    if "inputs_embeds" not in arguments:
        raise InputError(f"tune.method: {model.config.model_type} takes no embeddings as input, so it takes no prompt")
    table = embeddings(model)
    stack.prompt = Prompt(vectors, network, arguments, positions(model), whole).to(table.device, table.dtype)
    stack.register_forward_pre_hook(lengthen, with_kwargs=True)
    stack.register_forward_hook(shorten, with_kwargs=True)
    if decoder is not None:
        decoder.register_forward_pre_hook(look_back, with_kwargs=True)
    path = next(name for name, m in model.named_modules() if m is stack.prompt)
    train_only(model, [path, *head])


def _reads_first(model: Any) -> bool:
    """Whether the head classifies by the first position; a decoder's takes a cache and reads the last, a mean reads all."""
    name = type(model).__name__
    first = name.endswith(("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction"))
    decoder = "past_key_values" in inspect.signature(model.forward).parameters
    return first and not decoder and getattr(model.config, "classifier_pooling", "cls") == "cls"


def embeddings(model: Any) -> Tensor:
    """The word embeddings: (V, E)."""
    return model.get_input_embeddings().weight.detach()  # type: ignore[no-any-return]


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Put the prompt in, freeze the rest but the head; returns the coverage line."""
    table, p = embeddings(model), options.length
    if options.init == "vocabulary":
        rows = torch.randperm(len(table))[:p] if p <= len(table) else torch.randint(len(table), (p,))
        vectors = table[rows.to(table.device)].clone()
    else:
        vectors = torch.randn(p, table.shape[1]) * table.float().std().cpu()
    attach(model, vectors, None, head)
    return f"prompt: {p} vectors of {table.shape[1]} before the text, begun as {'words' if options.init == 'vocabulary' else 'noise'}"


# -- the peft package's layout ----------------------------------------------------------------------------------------


def found(model: nn.Module) -> Prompt:
    """The model's prompt."""
    return next(m for m in model.modules() if isinstance(m, Prompt))


def peft(model: Any, options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json's keys, and prompt_embeddings (P, E)."""
    return shared_config(model) | {"peft_type": PEFT_TYPE, "prompt_tuning_init": "RANDOM"}, {"prompt_embeddings": folded(model)}


def shared_config(model: Any) -> dict[str, Any]:
    """The keys that peft's prompt methods share. InputError where peft cannot run the model on embeddings alone.

    peft hands the model no input_ids, so a GPT-2 or Llama that classifies reads the last position there, padding or not: the
    two agree on rows without padding on the right.
    """
    prompt, config, name = found(model), model.config.get_text_config(), type(model).__name__
    if config.is_encoder_decoder and name.endswith("ForSequenceClassification"):
        raise InputError(f"tune.method: a prompt has no peft counterpart on {name}, which cannot do without input_ids")
    if getattr(config, "classifier_pooling", "cls") != "cls":
        raise InputError(
            f"tune.method: a prompt has no peft counterpart on {name} that takes a mean: peft's counts the prompt in"
        )
    return {
        "num_virtual_tokens": prompt.embedding.shape[0], "token_dim": prompt.embedding.shape[1], "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
    }  # fmt: skip


def folded(model: nn.Module) -> Tensor:
    """The prompt as the model reads it, whatever made it: (P, E)."""
    prompt = found(model)
    training = prompt.training
    try:
        return prompt.eval()().detach().clone()
    finally:
        prompt.train(training)


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """tune options for a peft adapter_config."""
    return {"method": "prompt", "length": config["num_virtual_tokens"]}


@torch.no_grad()
def load_peft(model: Any, options: Any, tensors: dict[str, Tensor]) -> None:
    """Put peft's prompt into a model on which `apply` has run."""
    prompt, given = found(model), tensors["prompt_embeddings"]
    if given.shape != prompt.embedding.shape:
        raise InputError(f"prompt_embeddings is {tuple(given.shape)}; this model needs {tuple(prompt.embedding.shape)}")
    prompt.network = None  # the file holds what a network made
    prompt.embedding.copy_(given)
