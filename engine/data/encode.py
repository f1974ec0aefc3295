"""Examples to tokens, once: an Arrow file, memory-mapped, found again by the hash of all that it depends on.

The file is plain Arrow (`datasets.Dataset.from_file` reads it too). Columns that are ragged, such as input_ids, are
read as one flat array with offsets: example i is flat[offsets[i]:offsets[i+1]]. Nothing is copied into memory until a
micro-batch asks for it, and rows cost no Python object each. A file that is damaged, or does not hold these rows, is
made anew: its CRC-32 and its number of rows are noted in it.

A task may make several examples of one row (windows of a long document); the column "row" then says whose each is.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine import disk
from engine.data.read import Row
from engine.errors import InputError, RowError

VERSION = 2  # of the file's layout: part of the hash
CHUNK = 1000  # examples tokenised between two looks at `interrupted`

Array = npt.NDArray[Any]
Batch = dict[str, torch.Tensor]
Vary = Callable[[Batch, Array, tuple[int, int] | None], Batch]  # (batch, its examples, (seed, epoch) or None in evaluation)


@dataclass
class Encoded:
    """One split as tokens. N examples."""

    ragged: dict[str, tuple[Array, Array]]  # name -> flat (total,), offsets (N + 1,)
    scalars: dict[str, Array]  # name -> (N,), or (N, K) where every example has K numbers
    padding: dict[str, int]  # name -> what fills a ragged column up
    path: Path | None = None
    reused: bool = False
    vary: Vary | None = None  # what the task changes in a batch each time that it is seen

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> Array:
        """Tokens of each example, (N,)."""
        return np.diff(self.ragged["input_ids"][1])

    @property
    def row(self) -> Array:
        """The row that each example came from, (N,)."""
        return self.scalars["row"] if "row" in self.scalars else np.arange(len(self))

    def places(self, rows: list[str]) -> list[str]:
        """Where each example stands, from the places of the rows."""
        return [rows[i] for i in self.row.tolist()] if "row" in self.scalars else rows

    def batch(self, index: Array, place: tuple[int, int] | None = None) -> Batch:
        """The examples `index` as tensors: ragged columns padded to their longest, attention_mask added.

        `place` is (seed, epoch) in training, where a task may hide other tokens each time.
        """
        out: Batch = {}
        for name, (flat, offsets) in self.ragged.items():
            lengths = np.diff(offsets)[index]
            inside = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
            if name == "input_ids":
                out["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
            padded = np.full(inside.shape, self.padding.get(name, 0), dtype=np.int64)
            padded[inside] = np.concatenate([flat[offsets[i] : offsets[i + 1]] for i in index])
            out[name] = torch.from_numpy(padded)  # (B, T)
        for name, values in self.scalars.items():
            out[name] = torch.from_numpy(values[index])  # (B,) or (B, K)
        return self.vary(out, index, place) if self.vary else out

    def unlike(self) -> dict[str, torch.Tensor]:
        """Three examples: the two shortest, which packed share a row, and the longest. As many as there are, if fewer."""
        order = np.argsort(self.lengths, kind="stable")
        return self.batch(order[[0, min(1, len(order) - 1), -1]])


def encode(
    task: Any,
    rows: list[Row],
    tokenizer: Any,
    max_length: int,
    cache: Path | None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Encoded:
    """`rows` as the task sees them, tokenised; from `cache` when the same thing was tokenised before."""
    made = _encode(task, rows, tokenizer, max_length, cache, interrupted)
    made.vary = task.vary(tokenizer)
    return made


def _encode(
    task: Any, rows: list[Row], tokenizer: Any, max_length: int, cache: Path | None, interrupted: Callable[[], bool]
) -> Encoded:
    path = cache / f"{_key(task, rows, tokenizer, max_length, interrupted)}.arrow" if cache else None
    padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": 0, "labels": -100, **task.padding}
    if path is not None and (found := _open(path, padding, len(rows))):
        return found
    columns: dict[str, list[Any]] = {}
    for start in range(0, len(rows), CHUNK):
        _look(interrupted)
        try:
            chunk = task.encode(rows[start : start + CHUNK], tokenizer, max_length)
        except RowError as error:
            error.row += start
            raise
        for name, values in chunk.items():
            columns.setdefault(name, []).extend([i + start for i in values] if name == "row" else values)
    if path is None:
        return _from_columns(columns, padding)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # a name that can hold no folder is the recipe's fault, not the disk's
    except OSError as error:
        raise InputError(f"data.cache: {path.parent} cannot be made: {error.strerror or error}") from error
    _write(path, columns, len(rows))
    made = _open(path, padding, len(rows))
    if made is None:
        raise InputError(f"data.cache: {path} does not read back as it was written; is the disk broken?")
    made.reused = False
    return made


def _look(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise KeyboardInterrupt


def _key(task: Any, rows: list[Row], tokenizer: Any, max_length: int, interrupted: Callable[[], bool]) -> str:
    """sha256 of everything that the tokens depend on."""
    digest = hashlib.sha256()
    settings = [VERSION, type(task).__name__, task.fingerprint(), max_length, tokenizer.padding_side, tokenizer.truncation_side]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(json.dumps([tokenizer.special_tokens_map, tokenizer.pad_token_id], sort_keys=True, default=str).encode())
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation"), backend.pop("padding")  # every call sets these two anew
    digest.update(json.dumps(backend, sort_keys=True).encode())
    used = [*task.columns.values()]
    for i, row in enumerate(rows):
        if i % CHUNK == 0:
            _look(interrupted)
        digest.update(json.dumps([row.get(name) for name in used], default=str).encode())
    return digest.hexdigest()[:40]


def _write(path: Path, columns: dict[str, list[Any]], rows: int) -> None:
    import pyarrow

    arrays = {}
    for name, values in columns.items():
        if isinstance(values[0], list | np.ndarray):
            offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int32)
            flat = np.concatenate([np.asarray(v, dtype=np.int32) for v in values])
            arrays[name] = pyarrow.ListArray.from_arrays(_arrow(offsets), _arrow(flat))
        elif isinstance(values[0], tuple):
            arrays[name] = pyarrow.FixedSizeListArray.from_arrays(_arrow(np.asarray(values).ravel()), len(values[0]))
        else:
            arrays[name] = _arrow(np.asarray(values))
    table = pyarrow.table(arrays)
    table = table.replace_schema_metadata({"crc32": str(_crc(table)), "rows": str(rows)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk.refusing(path, table.nbytes):
        disk.make(path.parent)
        try:
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            disk.sync_path(temporary)
            temporary.rename(path)  # whole or not at all, whoever else is writing it
            disk.sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _crc(table: Any) -> int:
    """CRC-32 of a table's numbers, column by column: (offsets and) values."""
    crc = 0
    for name in table.column_names:
        for chunk in table.column(name).chunks:
            parts = (chunk.offsets, chunk.values) if hasattr(chunk, "offsets") else (_flat(chunk),)
            for part in parts:
                crc = zlib.crc32(np.ascontiguousarray(_numbers(part)).data, crc)
    return crc


def _arrow(numbers: Array) -> Any:
    """Numbers (n,) as an Arrow array. pyarrow.array, and to_numpy, would import pandas to see whether they are pandas' own."""
    import pyarrow

    if numbers.dtype == bool:
        bits = np.packbits(numbers, bitorder="little")
        return pyarrow.Array.from_buffers(pyarrow.bool_(), len(numbers), [None, pyarrow.py_buffer(bits)])
    kind = pyarrow.from_numpy_dtype(numbers.dtype)
    return pyarrow.Array.from_buffers(kind, len(numbers), [None, pyarrow.py_buffer(np.ascontiguousarray(numbers))])


def _numbers(array: Any) -> Array:
    """An Arrow array of numbers, none of them missing, as (n,); a view where it can be one."""
    if array.null_count:
        raise ValueError("numbers are missing")
    kind, buffer, end = np.dtype(array.type.to_pandas_dtype()), array.buffers()[1], array.offset + len(array)
    if buffer is None:
        return np.empty(0, dtype=kind)
    if kind.kind == "b":
        return np.unpackbits(np.frombuffer(buffer, dtype=np.uint8), bitorder="little")[array.offset : end].astype(bool)
    numbers = np.frombuffer(buffer, dtype=kind, count=end)[array.offset :]
    numbers.flags.writeable = False  # it may be a file
    return numbers


def _flat(values: Any) -> Any:
    """The numbers of a column that is not ragged."""
    return values.flatten() if hasattr(values, "flatten") else values


def _open(path: Path, padding: dict[str, int], rows: int) -> Encoded | None:
    """The tokens in `path`; None where there is no such file, or not a whole one of `rows` rows."""
    import pyarrow

    if not path.is_file():
        return None
    try:
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        noted = table.schema.metadata or {}
        if int(noted.get(b"rows", -1)) != rows or int(noted.get(b"crc32", -1)) != _crc(table):
            return None
    except (pyarrow.ArrowException, OSError, ValueError):
        return None
    ragged: dict[str, tuple[Array, Array]] = {}
    scalars: dict[str, Array] = {}
    for name in table.column_names:
        values = table.column(name).combine_chunks()
        if isinstance(values, pyarrow.ChunkedArray):
            values = values.chunk(0)
        if pyarrow.types.is_list(values.type):
            ragged[name] = (_numbers(values.values), _numbers(values.offsets))
        else:
            flat = _numbers(_flat(values))
            scalars[name] = flat.reshape(len(values), -1) if len(flat) != len(values) or hasattr(values, "flatten") else flat
    return Encoded(ragged, scalars, padding, path, reused=True)


def _from_columns(columns: dict[str, list[Any]], padding: dict[str, int]) -> Encoded:
    ragged: dict[str, tuple[Array, Array]] = {}
    scalars: dict[str, Array] = {}
    for name, values in columns.items():
        if isinstance(values[0], list | np.ndarray):
            offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])])
            ragged[name] = (np.concatenate([np.asarray(v, dtype=np.int32) for v in values]), offsets)
        else:
            scalars[name] = np.asarray(values)
    return Encoded(ragged, scalars, padding)
