"""A small model from nothing: an architecture of transformers, sizes from the recipe, random weights from its seed.

    model:
      from_scratch: {architecture: bert, layers: 4, hidden: 256, heads: 4}      12 H^2 weights a block, V H in embeddings
      tokenizer: {train: {kind: wordpiece, vocabulary: 8000}}                   V

It learns far more slowly than a pretrained model and never gets as far on little data. It is for languages and notations
that no model has seen, for pretraining of one's own, for teaching, and as the stand-in of a recipe without network.

The sizes have one name here and many in the architectures (`hidden` is hidden_size, n_embd, d_model or dim). transformers
maps most of them; the table below has the rest.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import seeds, vocabulary
from engine.errors import InputError, nearest
from engine.models import Loaded, Source, settle
from engine.recipe import Recipe

INTERMEDIATE = ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate", "dropout",
           "attention_dropout", "hidden_dropout", "embedding_dropout", "mlp_dropout")  # fmt: skip
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id")


def load(
    recipe: Recipe,
    task: Any,
    texts: Callable[[], list[str]],
    *,
    cache: Path | None = None,
    folders: tuple[Path, ...] = (),
    kept: Path | None = None,
) -> Loaded:
    """The recipe's model from scratch and its tokenizer; the same recipe and texts give the same bits.

    `texts` are what a tokenizer is trained on, unless `kept` or the cache holds it. Raises InputError.
    """
    spec, where = recipe.model.from_scratch, f"{recipe.where('model.from_scratch')}: model.from_scratch"
    assert spec is not None, "a recipe that names its model is loaded by models.load"
    kind = config_class(spec.architecture, f"{recipe.where('model.from_scratch.architecture')}: model.from_scratch.architecture")
    segments = getattr(kind(), "type_vocab_size", 0) > 1
    place = f"{recipe.where('model.tokenizer')}: model.tokenizer"
    tokenizer, trained = vocabulary.serve(
        recipe.model.tokenizer, family(kind), segments, texts, longest=spec.max_positions, cache=cache, where=place, folders=folders,
        kept=kept,
    )  # fmt: skip
    seeds.seed_all(recipe.seed)
    model = build(spec, kind, tokenizer, task.auto_class, task.model_options(), where)
    settle(model, tokenizer, where, recipe.data.max_length)
    return Loaded(model, tokenizer, Source(Path(spec.architecture), "from scratch"), [], _sha256(model, tokenizer), trained)


def build(spec: Any, kind: Any, tokenizer: Any, auto_class: str, options: dict[str, Any], where: str) -> Any:
    """The model of a `FromScratch` group in float32, with weights from torch's generator."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = configuration(spec, kind, tokenizer, where)
        for name, value in options.items():
            setattr(config, name, value)
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:  # each architecture has checks of its own, with errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Unrecognized configuration class" in reason:
            reason = f"{spec.architecture} has no {auto_class}, which this task needs"
        raise InputError(f"{where}: {reason}") from error
    return model


def config_class(architecture: str, where: str) -> Any:
    """The configuration class of a model type, or an InputError that offers the nearest one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if architecture not in CONFIG_MAPPING_NAMES:
        near = nearest(architecture, [name for name in CONFIG_MAPPING_NAMES if name[:1] == architecture[:1]])
        hint = near if "did you mean" in near else "; bert, gpt2, llama and t5 are four of those that it knows"
        raise InputError(f"{where}: transformers has no architecture '{architecture}'{hint}")
    return CONFIG_MAPPING[architecture]


def family(kind: Any) -> vocabulary.Family:
    """The special tokens that go with an architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if kind.model_type == "gpt2":
        return vocabulary.GPT2
    if getattr(kind(), "is_encoder_decoder", False):
        return vocabulary.ENCODER_DECODER
    return vocabulary.ENCODER if kind.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else vocabulary.DECODER


def configuration(spec: Any, kind: Any, tokenizer: Any, where: str) -> Any:
    """`spec` in the architecture's own words."""
    default = kind()
    sizes = {
        "hidden_size": spec.hidden, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_positions, "num_decoder_layers": spec.layers, "num_key_value_heads": spec.heads,
        "embedding_size": spec.hidden, "head_dim": spec.hidden // spec.heads, "vocab_size": len(tokenizer),
        "encoder_layers": spec.layers, "decoder_layers": spec.layers, "encoder_attention_heads": spec.heads,
        "decoder_attention_heads": spec.heads,
    }  # fmt: skip
    sizes |= dict.fromkeys(INTERMEDIATE, spec.intermediate or 4 * spec.hidden) | dict.fromkeys(DROPOUT, spec.dropout)
    sizes |= {name: getattr(tokenizer, name, None) for name in IDS}
    given = {name: value for name, value in sizes.items() if hasattr(default, name)}
    if (
        given.get("decoder_start_token_id", getattr(default, "decoder_start_token_id", None)) is None
        and default.is_encoder_decoder
    ):
        given["decoder_start_token_id"] = tokenizer.pad_token_id
    for name in spec.options:
        if not hasattr(default, name) or name.startswith("_") or "attn_implementation" in name or "auto_map" in name:
            known = [n for n in default.to_dict() if not n.startswith("_")]
            raise InputError(f"{where}.options: {spec.architecture} has no '{name}'{nearest(name, known)}")
    return kind(**{**given, **spec.options})


def _sha256(model: Any, tokenizer: Any) -> str:
    """Of the weights as they begin, and of the tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation"), backend.pop("padding")  # every call sets these two anew
    digest.update(json.dumps(backend, sort_keys=True).encode())
    return digest.hexdigest()
