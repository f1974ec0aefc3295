"""What a model folder must be before anything in it is opened: a stranger wrote it.

    plain files only  ->  config.json names no code  ->  no adapter of another model  ->  weights are safetensors, whole

A pickle can run code when it is opened, whatever its name; `config.json` can name code, a kernel or another weights file
to fetch; an index can list a pickle as a shard, or a file outside the folder; a header can claim more than the file holds.
transformers refuses some of it, after it has begun to load. Here all of it is refused first, from a few kilobytes.

    safetensors:   [ N: 8 bytes, little-endian ][ header: N bytes of JSON ][ data ]
    header:        {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}

The offsets must tile the data: no holes, no overlaps, no byte too many (the format's own rule, safetensors' README).
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

from engine.errors import InputError, quoted

OPENED = (".json", ".safetensors", ".txt", ".model", ".jinja")  # endings of what a loader may open
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = 1 << 26  # bytes; the largest tokenizer.json in use have about 40 MB
LARGEST_CONFIG = 1 << 22
LARGEST_HEADER = 1 << 24  # bytes; a header takes about 100 a tensor
BITS = {"F4": 4, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BOOL": 8, "I8": 8, "U8": 8, "I16": 16, "U16": 16, "F16": 16,
        "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}  # fmt: skip
# keys of config.json by which a loader imports code, opens other files or fetches kernels; what each one names
REFUSED = {
    "auto_map": "code that comes with the model",
    "quantization_config": "a quantised format; only plain weights are fine-tuned here",
    "transformers_weights": "another file with weights",
    "custom_pipelines": "code that comes with the model",
}


def folder(path: Path, where: str) -> dict[str, Any]:
    """config.json of a model folder in which everything that will be opened is what it should be; else an InputError."""
    for entry in sorted(path.iterdir()):
        if entry.suffix in OPENED:
            _plain_file(entry, where)
    if (path / "adapter_config.json").exists():
        raise InputError(f"{where}: {path} holds an adapter, which changes another model; merge it into that one first")
    config = _config(path, where)
    _weights(path, where, config)
    _tokenizer(path, where)
    return config


def tokenizer(path: Path, where: str) -> None:
    """The same of a folder that is opened for its tokenizer alone."""
    for entry in sorted(path.iterdir()):
        if entry.suffix in OPENED:
            _plain_file(entry, where)
    if (path / "config.json").exists():
        _config(path, where)
    _tokenizer(path, where)


def _tokenizer(path: Path, where: str) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).exists():
            _no_code(_object(path / name, where, LARGEST_CONFIG * 4), f"{where}: {path / name}")
    if (path / "tokenizer.json").exists():
        _object(path / "tokenizer.json", where, LARGEST_JSON)


def _plain_file(path: Path, where: str) -> None:
    """A regular file, perhaps through links (the hub's cache is made of them): a pipe or a device would never end."""
    try:
        regular = path.is_file()
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read: {error.strerror}") from error
    if not regular:
        raise InputError(f"{where}: {path} is no plain file")


def _object(path: Path, where: str, largest: int) -> dict[str, Any]:
    """The JSON object in a file of at most `largest` bytes."""
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
        if len(raw) > largest:
            raise InputError(f"{where}: {path} has more than {largest:,} bytes")
        value = json.loads(raw)
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{where}: {path} cannot be read: nested too deep") from error
    except ValueError as error:  # not JSON, not UTF-8, a number of 5,000 digits
        raise InputError(f"{where}: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {path} holds a {type(value).__name__} where an object {{...}} is needed")
    return value


def _no_code(value: dict[str, Any], place: str) -> None:
    """Refuse the keys that name code, at any depth."""
    level: list[Any] = [value]
    while level:
        for one in level:
            for key, what in REFUSED.items() if isinstance(one, dict) else ():
                if one.get(key):
                    raise InputError(f"{place}: '{key}' names {what}, which is refused")
            for key, inner in one.items() if isinstance(one, dict) else ():
                if "attn_implementation" in str(key) and isinstance(inner, str) and ("/" in inner or ":" in inner):
                    raise InputError(f"{place}: '{key}' names a kernel to fetch ({quoted(inner)}), which is refused")
        inside = (v for one in level for v in (one.values() if isinstance(one, dict) else one))
        level = [v for v in inside if isinstance(v, dict | list)]


def _config(path: Path, where: str) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = _object(path / "config.json", where, LARGEST_CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        also = " and would run code that comes with it" if config.get("auto_map") else ""
        raise InputError(f"{where}: the model type {quoted(kind)} is not part of transformers{also}; such code is refused")
    _no_code(config, f"{where}: {path / 'config.json'}")
    return config


def _weights(path: Path, where: str, config: dict[str, Any]) -> None:
    """Every safetensors file whole, every shard of an index one of them, and weights for what the config claims."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickled:
            raise InputError(
                f"{where}: {path} holds only pickled weights ({pickled[0]}), which can run code when opened and are refused."
                " Convert them once with save_pretrained(..., safe_serialization=True), or name a revision that has model.safetensors."
            )
        raise InputError(f"{where}: {path} holds no weights (model.safetensors)")
    headers = {file.name: header(file, where) for file in files}
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = _object(index, where, LARGEST_JSON).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{where}: {index} has no weight_map")
        for tensor, shard in shards.items():
            if not isinstance(shard, str) or tensor not in headers.get(shard, {}):
                raise InputError(f"{where}: {index}: {quoted(tensor)} is not in {quoted(shard)}, a safetensors file beside it")
    _fits(config, headers, f"{where}: {path / 'config.json'}")


def _fits(config: dict[str, Any], headers: dict[str, dict[str, Any]], place: str) -> None:
    """Sizes that the weights bear out: a config of a few bytes can claim a model that fills the memory before it fails.

    Every layer has a tensor, and every size is that of some tensor; layers may share (ALBERT), so small figures pass.
    """
    shapes = [tensor["shape"] for tensors in headers.values() for tensor in tensors.values()]
    longest = max((size for shape in shapes for size in shape), default=0)
    held = sum(math.prod(shape) for shape in shapes)
    layers = next((v for k, v in config.items() if k in ("num_hidden_layers", "n_layer", "n_layers") and isinstance(v, int)), 1)
    width = next((v for k, v in config.items() if k in ("hidden_size", "dim", "d_model", "n_embd") and isinstance(v, int)), 1)
    if layers * width * width > max(10**8, 4 * held):
        raise InputError(f"{place}: {layers:,} layers of width {width:,} are not what the weights hold ({held:,} numbers)")
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            _fits(value, headers, place)
        if not isinstance(value, int):
            continue
        counts = "layers" in key or key in ("n_layer", "num_blocks")
        if value < 0 and (counts or "size" in key):
            raise InputError(f"{place}: {key} {value:,} is no number of anything")
        if counts:
            if value > max(200, len(shapes)):
                raise InputError(f"{place}: {key} {value:,} is more than the {len(shapes):,} tensors of the weights")
        elif ("size" in key or key in ("dim", "d_model", "d_ff", "n_embd", "n_inner", "hidden_dim")) and value > max(
            20_000, longest
        ):
            raise InputError(f"{place}: {key} {value:,} is more than any tensor of the weights has ({longest:,})")


def header(path: Path, where: str) -> dict[str, dict[str, Any]]:
    """name -> {dtype, shape, data_offsets} of a safetensors file that is whole, without reading a tensor."""
    place = f"{where}: {path}"
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if length > size and head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise InputError(f"{place} is a pickle under another name, which can run code when opened and is refused")
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise InputError(
                    f"{place} cannot be loaded: this is no safetensors file (a header of {length:,} bytes in {size:,})"
                )
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}") from error
    try:
        found = json.loads(raw, object_pairs_hook=_once)
        found.pop("__metadata__", None)
        spans = sorted(_span(tensor) for tensor in found.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{place} cannot be loaded: its header is damaged ({type(error).__name__}: {quoted(str(error))})"
        ) from error
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise InputError(f"{place} cannot be loaded: its tensors overlap or leave a hole at byte {end:,}")
        end = stop
    if end != size - 8 - length:
        raise InputError(
            f"{place} cannot be loaded: its tensors need {end:,} bytes and it holds {size - 8 - length:,}; it was cut off"
        )
    return dict(found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key stands there twice")
    return out


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    """(begin, end) of a tensor's bytes, which its dtype and shape must account for."""
    begin, end = tensor["data_offsets"]
    shape = tensor["shape"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("an offset or a size is no whole number")
    if (end - begin) * 8 != BITS[tensor["dtype"]] * math.prod(shape):
        raise ValueError("a tensor's bytes are not those of its shape")
    return begin, end
