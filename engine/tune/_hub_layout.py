"""Read a trained adapter in adapter-hub's layout, as the `adapters` package (github.com/adapter-hub/adapters) saves it.

    adapter_config.json    {"config": {mh_adapter, output_adapter, ...}, "model_type": "bert", "name": NAME, ...}
    adapter.safetensors    bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight, ... .adapter_up.weight, ...
    head_config.json, model_head.safetensors       a prediction head, where one was saved

What their package computes in BERT's family, with h = dropout(dense(.)), x the residual, and u = scaling * up(act(down(.))):

    original_ln_before  original_ln_after  residual_before_ln   output                         here
    false               true               true                 norm(h + u(h) + x)             after: projection
    true                true               true                 norm(h + u(norm(h + x)) + x)   after: norm
    is_parallel: true   true               -                    norm(h + u(x) + x)             placement: parallel

All else (other orders of norms, gates, learnt scalings, invertible or Kronecker layers) is refused by the name of its key.
In evaluation the outputs are equal; in training, after: projection has the sublayer's dropout behind the bottleneck, theirs
before it. Pickled weights (pytorch_adapter.bin) are refused: opening a pickle can run code.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

from engine.errors import InputError

CONFIG, WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS = (
    "adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors",
)  # fmt: skip
PICKLED = {WEIGHTS: "pytorch_adapter.bin", HEAD_WEIGHTS: "pytorch_model_head.bin"}

# keys of their config that must have this value (or be absent, which means the same); the others are looked at below
PLAIN: dict[str, Any] = {
    "original_ln_after": True, "ln_before": False, "ln_after": False, "use_gating": False, "cross_adapter": False,
    "dropout": 0.0, "phm_layer": False, "stochastic_depth": 0.0,
}  # fmt: skip
# keys without meaning for a trained adapter of this kind
IDLE = {
    "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "is_parallel", "scaling",
    "residual_before_ln", "leave_out", "inv_adapter", "inv_adapter_reduction_factor", "invertible_adapter", "init_weights",
    "init_weights_seed", "adapter_residual_before_ln", "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule",
    "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
    "architecture", "new_attention_norm", "attention_type",
}  # fmt: skip
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # names of files without "version", which their package renames
ACTIVATIONS = {"leakyrelu": "leaky_relu"}

# a place in their names -> our module there, by form
BERT = {
    "attention.output.": {"projection": "attention.output.dense", "norm": "attention.output.LayerNorm"},
    "output.": {"projection": "output.dense", "norm": "output.LayerNorm", "parallel": "output"},
}
DISTILBERT = {
    "attention_adapters.": {"projection": "attention.out_lin", "norm": "sa_layer_norm"},
    "output_adapters.": {"projection": "ffn.lin2", "norm": "output_layer_norm", "parallel": "ffn"},
}
LAYERS = {
    "bert": ("bert.encoder.layer.", BERT),
    "roberta": ("roberta.encoder.layer.", BERT),
    "xlm-roberta": ("roberta.encoder.layer.", BERT),
    "electra": ("electra.encoder.layer.", BERT),
    "distilbert": ("distilbert.transformer.layer.", DISTILBERT),
}
OLD_NAMES = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\.")  # of files before version 3
TENSOR = re.compile(r"(\d+)\.(.*?)adapters\.([^.]+)\.(adapter_down\.0|adapter_up)\.(weight|bias)")

# their flexible head's two linear layers (heads.NAME.1 and .4) as our modules, and the activation between them
HEADS = {
    "bert": ("bert.pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}


def recognised(folder: Path) -> bool:
    """Whether `folder` holds an adapter in this layout."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLED[WEIGHTS]))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(options of tune.method adapter, its tensors, the head's tensors or {}), named by their paths in our model.

    Raises InputError where the folder is damaged, pickled, or computes what our adapters do not.
    """
    about = _json(folder / CONFIG)
    kind, config = about.get("model_type"), about.get("config")
    if kind not in LAYERS:
        raise InputError(f"{folder / CONFIG}: model_type '{kind}' is not among {', '.join(LAYERS)}")
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: config is no mapping of keys")
    tensors = _load(folder, WEIGHTS)
    options, form = _options(config, about, tensors, folder / CONFIG)
    ours = _renamed(tensors, kind, form, folder / WEIGHTS)
    _check_complete(ours, options["reduction"], folder)
    sites = [n.removesuffix(".down.weight") for n in ours if n.endswith(".down.weight")]
    if config.get("leave_out") or not config["output_adapter"]:
        options["at"] = sites  # not every place of a placement: the places one by one
    return options, ours, _head(folder, kind)


def _options(
    config: dict[str, Any], about: dict[str, Any], tensors: dict[str, Tensor], where: Path
) -> tuple[dict[str, Any], str]:
    """Their config as our options, and the form of the sites."""

    def refuse(key: str, why: str = "our adapters compute nothing like it") -> InputError:
        return InputError(f"{where}: config.{key}: {json.dumps(config.get(key))} cannot be read here: {why}")

    if config.get("architecture") is not None:
        raise refuse("architecture", "only bottleneck adapters are (architecture: null)")
    for key, value in config.items():
        if key in PLAIN and value != PLAIN[key] and value is not None:
            raise refuse(key)
        if key not in PLAIN and key not in IDLE:
            raise refuse(key, "the key is not known")
    for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        if key not in config:
            raise refuse(key, "it is missing")
    inverts = config.get("inv_adapter") or config.get("invertible_adapter")
    # task adapters of old versions name an invertible layer that they neither use nor hold; their package drops it too
    if any("invertible" in n for n in tensors) or (inverts and about.get("type") != "text_task"):
        raise refuse("inv_adapter")
    reduction = config["reduction_factor"]
    if isinstance(reduction, dict):
        reduction = next(iter(reduction.values())) if len(set(reduction.values())) == 1 else None
    if not isinstance(reduction, int | float) or reduction < 1 or reduction != int(reduction):
        raise refuse("reduction_factor", "one whole number from 1 on is needed")
    scaling = config.get("scaling", 1.0)
    if not isinstance(scaling, int | float) or scaling <= 0:
        raise refuse("scaling", "a number above 0 is needed")
    options: dict[str, Any] = {
        "reduction": int(reduction), "activation": _activation(config["non_linearity"], about, where), "scaling": float(scaling),
    }  # fmt: skip
    if config.get("is_parallel"):
        if config["mh_adapter"] or not config["output_adapter"]:
            raise refuse("mh_adapter", "a parallel adapter is read beside the feed-forward alone")
        return {**options, "placement": "parallel"}, "parallel"
    if config.get("residual_before_ln", True) is not True and config.get("original_ln_before"):
        raise refuse("residual_before_ln")
    if not config["mh_adapter"] and not config["output_adapter"]:
        raise refuse("output_adapter", "there would be no bottleneck at all")
    form = "norm" if config.get("original_ln_before") else "projection"
    placement = "houlsby" if config["mh_adapter"] else "pfeiffer"
    return {**options, "placement": placement, "after": form}, form


def _activation(name: str, about: dict[str, Any], where: Path) -> str:
    """Our name of an activation of theirs."""
    if "version" not in about:
        name = OLD_ACTIVATIONS.get(name, name)
    name = ACTIVATIONS.get(name.lower(), name.lower())
    if name not in ACT2FN:
        raise InputError(f"{where}: config.non_linearity: '{name}' is no activation of transformers")
    return name


def _renamed(tensors: dict[str, Tensor], kind: str, form: str, where: Path) -> dict[str, Tensor]:
    """Their tensors by the paths of our parameters."""
    prefix, places = LAYERS[kind]
    ours = {}
    for name, tensor in tensors.items():
        plain = OLD_NAMES.sub("adapters.", name)
        layer = plain.removeprefix(prefix).removeprefix(prefix.partition(".")[2])  # saved with a head's model, or without
        match = TENSOR.fullmatch(layer)
        if not match or match[2] not in places or form not in places[match[2]]:
            raise InputError(f"{where}: {name} belongs to no bottleneck that is known here")
        part = "down" if match[4].startswith("adapter_down") else "up"
        ours[f"{prefix}{match[1]}.{places[match[2]][form]}.{part}.{match[5]}"] = tensor
    return ours


def _check_complete(ours: dict[str, Tensor], reduction: int, folder: Path) -> None:
    """Every bottleneck has its four tensors, of the size that the config says."""
    sites = {name.rpartition(".")[0].rpartition(".")[0] for name in ours}
    for site in sorted(sites):
        missing = [n for n in ("down.weight", "down.bias", "up.weight", "up.bias") if f"{site}.{n}" not in ours]
        if missing:
            raise InputError(f"{folder / WEIGHTS}: {site} lacks {missing[0]}")
        narrow, width = ours[f"{site}.down.weight"].shape
        if narrow != max(1, width // reduction):
            raise InputError(
                f"{folder}: config.reduction_factor: {reduction} gives {width // reduction}, but the weights have {narrow}"
            )
    if not sites:
        raise InputError(f"{folder / WEIGHTS}: it holds no bottleneck")


def _head(folder: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of the classification head, by our names; {} where none was saved."""
    if not any((folder / n).is_file() for n in (HEAD_CONFIG, HEAD_WEIGHTS, PICKLED[HEAD_WEIGHTS])):
        return {}
    alone = f"; delete {HEAD_CONFIG} and {HEAD_WEIGHTS} to read the adapter alone"
    about, tensors = _json(folder / HEAD_CONFIG), _load(folder, HEAD_WEIGHTS)
    config, name = about.get("config"), about.get("name")
    if config is None:  # the head of one of transformers' own classes, under its own names
        if not str(about.get("model_class")).endswith("ForSequenceClassification"):
            raise InputError(f"{folder / HEAD_CONFIG}: model_class {about.get('model_class')} is no classification head{alone}")
        return tensors
    first, last, activation = HEADS[kind]
    needed = {"head_type": "classification", "layers": 2, "activation_function": activation, "use_pooler": False, "bias": True}
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise InputError(
                f"{folder / HEAD_CONFIG}: config.{key}: {json.dumps(config.get(key))} cannot be read here: the head of"
                f" {kind} has {json.dumps(value)}{alone}"
            )
    mapping = {f"heads.{name}.{i}.{part}": f"{ours}.{part}" for i, ours in ((1, first), (4, last)) for part in ("weight", "bias")}
    odd = sorted(mapping.keys() ^ tensors.keys())
    if odd:
        raise InputError(f"{folder / HEAD_WEIGHTS}: {odd[0]} has no match{alone}")
    return {ours: tensors[theirs] for theirs, ours in mapping.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: no mapping of keys")
    return found


def _load(folder: Path, name: str) -> dict[str, Tensor]:
    path, pickled = folder / name, PICKLED[name]
    if not path.is_file() and (folder / pickled).is_file():
        raise InputError(
            f"{folder / pickled} is a pickle, which can run code when opened, and is refused. Write it as {name} once, where you"
            " trust it: model.save_adapter(FOLDER, NAME, use_safetensors=True) of the adapters package"
        )
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
