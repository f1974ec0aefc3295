"""Files and recipes that mean harm: none runs code, none is loaded, none writes anything, each ends with one message.

A *canary* is a file that a payload would create. Beside it an audit hook listens for what running code needs: unpickling,
a shell, a process, a socket. The law for each case: exit code 2, one `error: ` message that names the place, no traceback,
no canary, nothing new on disk, within seconds.
"""

import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, MakeRecipe
from test_fuzz import Hang, limited

from engine import find, yaml12
from engine.__main__ import main
from engine.errors import InputError

HEARD: list[str] = []
LISTENED = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "marshal.loads",
)
_listening = False


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event in LISTENED and not (event == "marshal.loads" or event == "os.fork"):
        HEARD.append(f"{event} {str(arguments)[:200]}")


sys.addaudithook(_hear)


class Harm:
    """What unpickles into a shell command."""

    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def payloads(canary: str) -> dict[str, bytes]:
    """Pickles of every protocol and wrapping that would create `canary`."""
    made = {f"protocol {p}": pickle.dumps(Harm(canary), protocol=p) for p in range(6)}
    made["eval"] = b"cbuiltins\neval\n(V__import__('os').system('touch " + canary.encode() + b"')\ntR."
    made["in a dict"] = pickle.dumps({"weight": Harm(canary)})
    saved, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": Harm(canary)}, saved)
    torch.save({"weight": Harm(canary)}, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Harm(canary)], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../" + canary, "escaped")
        file.writestr("data.pkl", made["protocol 2"])
    return made | {
        "torch": saved.getvalue(),
        "torch legacy": legacy.getvalue(),
        "npy": array.getvalue(),
        "zip": archive.getvalue(),
    }


def test_the_payloads_would_bite(tmp_path: Path) -> None:
    for name, content in payloads("canary").items():
        if name in ("torch", "torch legacy", "npy", "zip"):
            continue
        pickle.loads(content)
        assert Path("canary").exists(), name
        Path("canary").unlink()
    torch.load(io.BytesIO(payloads("canary")["torch"]), weights_only=False)
    assert Path("canary").exists()


# -- model folders ----------------------------------------------------------------------------------------------------


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = b"\0" * 8
WEIGHTS: dict[str, bytes] = {
    "empty": b"", "short": b"\x08\0\0", "no header": struct.pack("<Q", 0), "header beyond the end": tensors({"a": entry()}, EIGHT, 10**6),
    "header of 2**63": tensors({"a": entry()}, EIGHT, 2**63), "header of 2**64-1": tensors({"a": entry()}, EIGHT, 2**64 - 1), "header of 100 MB": tensors({}, EIGHT, 100_000_001),
    "header of 17 MB": tensors(b'{"a":"' + b"x" * (17 << 20) + b'"}', EIGHT), "no JSON": tensors(b"{{{{{{{{", EIGHT), "not UTF-8": tensors(b'{"\xff": 1}', EIGHT),
    "a list": tensors([1, 2], EIGHT), "a number": tensors(3333333, EIGHT), "null": tensors(b"null    ", EIGHT), "deep": tensors(b'{"a":' * 100_000, EIGHT), "deep list": tensors(b"[" * 100_000, EIGHT),
    "a key twice": tensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "overlap": tensors({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT + b"\0" * 4), "the same bytes twice": tensors({"a": entry(), "b": entry()}, EIGHT),
    "a hole": tensors({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "not from zero": tensors({"a": entry(offsets=(4, 12))}, b"\0" * 12), "too much data": tensors({"a": entry()}, EIGHT * 2),
    "too little data": tensors({"a": entry()}, b"\0" * 7), "no data": tensors({"a": entry()}), "offsets turned": tensors({"a": entry(offsets=(8, 0))}, EIGHT), "negative offsets": tensors({"a": entry(offsets=(-8, 0))}, EIGHT),
    "negative shape": tensors({"a": entry(shape=(-1, -2))}, EIGHT), "shape overflow": tensors({"a": entry(shape=(2**32, 2**32))}, EIGHT), "shape overflow to fit": tensors({"a": entry(shape=(2**63, 2, 1))}, EIGHT),
    "huge shape": tensors({"a": entry(shape=(10**30,))}, EIGHT), "float shape": tensors({"a": entry(shape=(2.0,))}, EIGHT), "text shape": tensors({"a": entry(shape="22")}, EIGHT), "true shape": tensors({"a": entry(shape=(True, 2))}, EIGHT),
    "no shape": tensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "no offsets": tensors({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "three offsets": tensors({"a": entry(offsets=(0, 4, 8))}, EIGHT),
    "unknown dtype": tensors({"a": entry("F31")}, EIGHT), "no dtype": tensors({"a": entry(None)}, EIGHT), "list dtype": tensors({"a": entry(["F32"])}, EIGHT), "wrong size": tensors({"a": entry("F64")}, EIGHT),
    "an entry that is no object": tensors({"a": 3}, EIGHT), "a number of 5,000 digits": tensors(b'{"a": ' + b"9" * 5000 + b"}", EIGHT), "html": b"<!doctype html><script>alert(1)</script>" * 9,
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "gguf": b"GGUF" + EIGHT * 9, "elf": b"\x7fELF" + EIGHT * 9, "tar": b"\0" * 257 + b"ustar" + EIGHT * 40, "noise": bytes(range(256)) * 8,
}  # fmt: skip

CONFIG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "auto_map": lambda c: c | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}},
    "auto_map alone": lambda c: {"auto_map": {"AutoConfig": "evil.Config"}},
    "auto_map with a repository": lambda c: c | {"auto_map": {"AutoModel": "nobody/evil--evil.Model"}},
    "auto_map inside": lambda c: c | {"text_config": c | {"auto_map": {"AutoModel": "evil.Model"}}},
    "unknown type": lambda c: c | {"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}},
    "path as type": lambda c: c | {"model_type": "../../evil"},
    "attention kernel": lambda c: c | {"attn_implementation": "nobody/evil"},
    "attention kernel inside": lambda c: c | {"_attn_implementation": "nobody/evil:run"},
    "attention kernel, internal": lambda c: c | {"_attn_implementation_internal": "nobody/evil"},
    "quantised": lambda c: c | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "other weights": lambda c: c | {"transformers_weights": "pytorch_model.bin"},
    "other weights outside": lambda c: c | {"transformers_weights": "../../canary.bin"},
    "a pipeline": lambda c: c | {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
    "10**9 layers": lambda c: c | {"num_hidden_layers": 10**9}, "10**5 layers": lambda c: c | {"num_hidden_layers": 10**5}, "10**12 wide": lambda c: c | {"hidden_size": 10**12},
    "10**12 words": lambda c: c | {"vocab_size": 10**12}, "10**9 between": lambda c: c | {"intermediate_size": 10**9}, "30,000 wide": lambda c: c | {"hidden_size": 20_000, "num_hidden_layers": 100},
    "no layers": lambda c: c | {"num_hidden_layers": -1}, "no width": lambda c: c | {"hidden_size": 0}, "no heads": lambda c: c | {"num_attention_heads": 0}, "text for a size": lambda c: c | {"hidden_size": "32; touch canary"},
    "a list for a size": lambda c: c | {"hidden_size": [32]}, "null for a size": lambda c: c | {"vocab_size": None}, "float for a size": lambda c: c | {"vocab_size": 1e308}, "true for a size": lambda c: c | {"num_hidden_layers": True, "hidden_size": True},
    "unknown activation": lambda c: c | {"hidden_act": "os.system"}, "an object for an activation": lambda c: c | {"hidden_act": {"__reduce__": "os.system"}},
    "a list": lambda c: [c], "a text": lambda c: "evil", "a number": lambda c: 3, "null": lambda c: None, "empty": lambda c: {}, "list as type": lambda c: c | {"model_type": ["bert"]}, "object as type": lambda c: c | {"model_type": {"a": 1}},
    "null as type": lambda c: c | {"model_type": None}, "raw: deep": lambda c: b'{"a":' * 100_000, "raw: digits": lambda c: b'{"a": ' + b"9" * 5000 + b"}", "raw: not UTF-8": lambda c: b'{"a": "\xff\xfe"}', "raw: nothing": lambda c: b"",
    "raw: torn": lambda c: json.dumps(c).encode()[:-9], "raw: 5 MB": lambda c: json.dumps(c | {"x": "y" * (5 << 20)}).encode(), "raw: NUL": lambda c: b"\0" * 999,
}  # fmt: skip

TOKENIZER: dict[str, bytes] = {
    "empty": b"", "object": b"{}", "list": b"[]", "null": b"null", "torn": b'{"version": "1.0", "model": {"type": "WordLevel"', "no model": b'{"version": "1.0"}', "unknown model": b'{"version": "1.0", "model": {"type": "Evil"}}',
    "deep": b'{"a":' * 100_000, "NUL": b"\0" * 999, "not UTF-8": b'{"a": "\xff"}', "digits": b'{"version": ' + b"9" * 5000 + b"}", "negative id": b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":-1},"unk_token":"a"}}',
    "huge id": b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":99999999999999999999},"unk_token":"a"}}', "bad regex": b'{"version":"1.0","pre_tokenizer":{"type":"Split","pattern":{"Regex":"(((("},"behavior":"Isolated","invert":false},"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}',
    "no unk": b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"zzz"}}', "ids beyond the model": b'{"version":"1.0","pre_tokenizer":{"type":"Whitespace"},"model":{"type":"WordLevel","vocab":{"a":5000},"unk_token":"a"}}',
    "bad merges": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b","c"]}}', "bad charsmap": b'{"version":"1.0","normalizer":{"type":"Precompiled","precompiled_charsmap":"AAAA"},"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}',
}  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "auto_map": {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}}, "auto_map with a repository": {"auto_map": {"AutoTokenizer": ["nobody/evil--evil.T", None]}}, "a list": [], "a text": "x", "a number": 3,
}  # fmt: skip

Spoil = Callable[[Path], None]


def put(name: str, content: bytes) -> Spoil:
    return lambda folder: void((folder / name).write_bytes(content))


def void(_: Any) -> None:
    return None


def config(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        made = change(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
        (folder / "evil.py").write_text("open('canary', 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n")

    return spoil


def sharded(weight_map: Any, **also: bytes) -> Spoil:
    """The weights as a shard, under an index that says something else."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name, content in also.items():
            (folder / name.replace("_", ".")).write_bytes(content)

    return spoil


def instead(name: str, make: Callable[[Path], Any]) -> Spoil:
    """Something that is no plain file under `name`."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def bound(path: Path) -> None:
    os.chdir(path.parent)  # a socket's path may have 108 characters
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(path.parent.parent)


NEEDED = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
UNUSED = [
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.pkl",
    "vocab.pickle",
    "weights.npy",
    "flax_model.msgpack",
]


def folders() -> Iterator[tuple[str, Spoil, bool]]:
    """(what it is, how a good folder becomes it, whether it must be refused)."""
    bites = payloads("canary")
    for name in NEEDED:
        for kind, content in bites.items():
            yield f"pickle {kind} as {name}", put(name, content), True
    for kind, content in bites.items():
        for name in ("pytorch_model.bin", "model.pt"):
            yield (
                f"pickle {kind} as {name} alone",
                lambda f, n=name, c=content: ((f / "model.safetensors").unlink(), (f / n).write_bytes(c)),
                True,
            )  # type: ignore[misc]
        yield f"pickle {kind} as a shard", sharded({"embeddings.word_embeddings.weight": "evil.bin"}, evil_bin=content), True
        yield (
            f"pickle {kind} as other weights",
            lambda f, c=content: (config(CONFIG["other weights"])(f), (f / "pytorch_model.bin").write_bytes(c)),
            True,
        )  # type: ignore[misc]
        yield (
            f"pickle {kind} as an adapter",
            lambda f, c=content: (
                (f / "adapter_config.json").write_text('{"base_model_name_or_path": ".", "peft_type": "LORA"}'),
                (f / "adapter_model.bin").write_bytes(c),
            ),
            True,
        )  # type: ignore[misc]
    for name in UNUSED:
        yield f"pickle beside, as {name}", put(name, bites["protocol 4"]), False
    for kind, content in WEIGHTS.items():
        yield f"weights {kind}", put("model.safetensors", content), True
    for kind, change in CONFIG.items():
        yield f"config {kind}", config(change), True
    for kind, content in TOKENIZER.items():
        yield f"tokenizer {kind}", put("tokenizer.json", content), True
    for kind, value in TOKENIZER_CONFIG.items():
        yield f"tokenizer_config {kind}", put("tokenizer_config.json", json.dumps(value).encode()), True
    for target in (
        "../outside.safetensors",
        "/etc/passwd",
        "gone.safetensors",
        3,
        None,
        ["model-00001-of-00001.safetensors"],
        "",
        ".",
        "model-00001-of-00001.safetensors/../../x",
    ):
        yield f"index to {target}", sharded({"embeddings.word_embeddings.weight": target}), True
    yield "index that is a list", sharded([1]), True
    yield "index of unknown tensors", sharded({"evil": "model-00001-of-00001.safetensors"}), True
    for name in (*NEEDED, "special_tokens_map.json", "vocab.txt", "generation_config.json"):
        yield f"pipe as {name}", instead(name, os.mkfifo), True
        yield f"folder as {name}", instead(name, Path.mkdir), True
        yield f"endless {name}", instead(name, lambda p: p.symlink_to("/dev/zero")), True
        yield f"link to itself as {name}", instead(name, lambda p: p.symlink_to(p.name)), True
        yield f"socket as {name}", instead(name, bound), True
    yield "an adapter's config", put("adapter_config.json", b'{"base_model_name_or_path": "nobody/evil"}'), True


FOLDERS = list(folders())


@pytest.fixture
def quiet_disk(tmp_path: Path, recipe: MakeRecipe) -> Callable[[], None]:
    """Call it at the end: nothing is new but tokens in the cache, and nothing was heard."""

    def seen() -> set[str]:
        return {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if "model" not in p.parts[len(tmp_path.parts):][:1]}  # fmt: skip

    recipe()
    before = seen()

    def check() -> None:
        new = {name for name in seen() - before if not re.fullmatch(r"runs(/.cache(/\w{40}\.arrow)?)?", name)}
        assert not new, new
        assert not list(tmp_path.rglob("*canary*"))
        assert not Path(tmp_path.parent / "canary").exists()
        assert HEARD == []

    return check


def answers(capfd: pytest.CaptureFixture[str], *arguments: str, seconds: int = 20) -> tuple[int, str]:
    """Exit code and standard error of a command line, run here."""
    global _listening
    HEARD.clear()
    _listening = True
    try:
        with limited(seconds):
            try:
                code = main(list(arguments))
            except SystemExit as done:
                code = int(done.code or 0)
    finally:
        _listening = False
    return code, capfd.readouterr().err


def refused(code: int, said: str) -> None:
    """Exit code 2 and one message for people."""
    assert code == 2, said
    assert said.startswith("error: ")
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert len(said) < 3000
    assert not any(c < " " and c not in "\n\t" for c in said), repr(said)


@pytest.mark.parametrize("part", range(8))
def test_hostile_model_folders_are_refused(
    recipe: MakeRecipe, bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], quiet_disk: Callable[[], None], part: int
) -> None:
    path = str(recipe(model=Path("model")).path)
    assert len(FOLDERS) >= 200
    faults = []
    for name, spoil, must in FOLDERS[part::8]:
        folder = tmp_path / "model"
        shutil.copytree(bert, folder)
        spoil(folder)
        try:
            code, said = answers(capfd, "layers", path)
            if must or code:
                refused(code, said)
                assert "model" in said
            quiet_disk()
        except (AssertionError, Hang) as error:
            faults.append(f"{name}: {type(error).__name__} {str(error)[:300]}")
        shutil.rmtree(folder)
        for left in tmp_path.rglob("*canary*"):
            left.unlink()
    assert not faults, "\n".join([f"{len(faults)} of {len(FOLDERS[part::8])}", *faults])


def test_the_same_from_a_shell(recipe: MakeRecipe, bert: Path, tmp_path: Path) -> None:
    """Two of them through a real process, where nothing of this one's imports or handlers is left."""
    path = str(recipe(model=Path("model")).path)
    environment = {**os.environ, "PYTHONPATH": str(find.PROJECT), "HF_HUB_OFFLINE": "1"}
    chosen = {name: spoil for name, spoil, _ in FOLDERS}
    for name in ("pickle torch as a shard", "endless model.safetensors"):
        shutil.copytree(bert, "model")
        chosen[name](tmp_path / "model")
        done = subprocess.run(
            [sys.executable, "-m", "engine", "finetune", path], capture_output=True, text=True, env=environment, timeout=60
        )
        refused(done.returncode, done.stderr[done.stderr.index("error: ") :])
        assert not list(tmp_path.rglob("canary"))
        assert not list(Path("runs").glob("tiny*"))
        shutil.rmtree("model")


def test_a_run_folder_of_a_stranger_is_looked_at_too(
    recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """predict and evaluate open RUN/model: the same rules hold there."""
    assert main(["finetune", str(recipe().path), "train.epochs=1", "--out", "good"]) == 0
    chosen = {name: spoil for name, spoil, _ in FOLDERS}
    for name in ("pickle torch as model.safetensors", "pickle torch as a shard", "config auto_map", "config attention kernel", "tokenizer torn", "pipe as config.json",
                 "pickle protocol 4 as an adapter", "weights overlap", "tokenizer_config auto_map"):  # fmt: skip
        shutil.copytree("good", "model")
        chosen[name](tmp_path / "model" / "model")
        capfd.readouterr()
        refused(*answers(capfd, "predict", "model", "--text", "good"))
        assert HEARD == [], name
        assert not list(tmp_path.rglob("canary")), name
        shutil.rmtree("model")


# -- recipes ----------------------------------------------------------------------------------------------------------

GOOD = BASE.format(model="model")
TAGS = [
    "!!python/object/apply:os.system ['touch canary']", "!!python/object/new:os.system ['touch canary']", "!!python/object:os.system {}", "!!python/name:os.system ''", "!!python/module:os ''",
    "!!python/object/apply:subprocess.Popen [['touch', 'canary']]", "!!python/object/apply:builtins.eval ['open(\"canary\", \"w\")']", "!!python/tuple [1]", "!!python/bytes aGk=", "!!python/long 3", "!!python/complex 1j",
    "!!python/none x", "!!python/bool True", "!!python/str x", "!!python/int 3", "!!python/dict {a: 1}", "!!python/list [1]", "!!binary aGk=", "!!timestamp 2026-11-24", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!!int 3", "!!int x", "!!float x", "!!bool x", "!!null x", "!!str x", "!!map {}", "!!seq []", "!!merge x", "!!value x", "!x y", "!include /etc/passwd", "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch canary']", "!ENV ${HOME}",
]  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


def texts() -> Iterator[tuple[str, bytes]]:
    """Recipe files that must be refused."""
    for tag in TAGS:
        for place in (
            f"seed: {tag}\n",
            f"offline: {{x: [{tag}]}}\n",
            f"? {tag}\n: 1\n",
            f"swap: [{{at: x, with: y, options: {{a: {tag}}}}}]\n",
        ):
            yield f"tag {place}", (GOOD + place).encode()
    for name, text in {
        "bomb": BOMB, "bomb in data": GOOD + BOMB, "alias": GOOD + "seed: &a 3\ncheckpoint: {keep: *a}\n", "alias of itself": "a: &a [*a]\n", "alias unknown": GOOD + "seed: *a\n", "merge": GOOD + "offline: {<<: *x}\n",
        "merge of a map": GOOD + "<<: {seed: 3}\n", "key twice": GOOD + "seed: 1\nseed: 2\n", "group twice": GOOD + "train: {epochs: 3}\n", "key twice inside": GOOD + "checkpoint: {keep: 1, keep: 2}\n", "key twice, quoted": GOOD + "seed: 1\n'seed': 2\n",
        "list as key": GOOD + "? [a, b]\n: 1\n", "map as key": GOOD + "? {a: b}\n: 1\n", "number as key": GOOD + "1: 2\n", "null as key": GOOD + "~: 2\n", "true as key": GOOD + "true: 2\n", "empty key": GOOD + "'': 2\n", "dotted key": GOOD + "train.epochs: 2\n",
        "two documents": GOOD + "---\n" + GOOD, "end and more": GOOD + "...\nseed: 3\n", "yaml 9": "%YAML 9.9\n---\n" + GOOD, "tag directive": "%TAG ! tag:evil,2026:\n---\n" + GOOD + "seed: !x 3\n", "tab": GOOD + "checkpoint:\n\tkeep: 2\n",
        "a list": "- a\n- b\n", "a text": "evil", "a number": "3", "nothing": "", "comment": "# nothing\n", "null": "~", "open list": GOOD + "swap: [", "open text": GOOD + "task: 'x", "closing": GOOD + "}}}}\n", "html": "<html><script>alert(1)</script>", "json bomb": "[" * 100_000,
        "maps": "{a: " * 50_000, "dashes": "- " * 50_000, "question marks": "? " * 50_000, "colons": ": " * 50_000, "deep by indent": "".join(" " * i + f"k{i}:\n" for i in range(300)), "wide": "".join(f"k{i}: 1\n" for i in range(5000)), "long key": "k" * 150_000 + ": 1\n",
        "too long": "# " + "x" * 300_000 + "\n" + GOOD, "far too long": "x" * 3_000_000, "digits": GOOD + "seed: " + "9" * 10_000 + "\n", "hex digits": GOOD + "seed: 0x" + "f" * 10_000 + "\n", "octal": GOOD + "seed: 0o" + "7" * 4000 + "\n", "exponent": GOOD + "offline: {a: 1e" + "9" * 500 + "}\n",
        "wide int": GOOD + "seed: " + "9" * 60 + "\n", "escape": GOOD + "seed: \x1b[2J\n", "escape in quotes": GOOD + 'seed: "\\e[2J"\n', "bell": GOOD + "\x07: 1\n", "NUL": GOOD + "seed: \0\n", "DEL": GOOD + "seed: \x7f\n", "NUL in a name": GOOD.replace("train.jsonl", '"a\\0b"'),
        "escape in a name": GOOD.replace("train.jsonl", '"\\e[31m.jsonl"'), "turned name": GOOD.replace("train.jsonl", '"\\u202egnp.jsonl"'), "no such user": GOOD.replace("train.jsonl", "~nobody_at_all/x.jsonl"), "long name": GOOD.replace("train.jsonl", "x" * 5000 + ".jsonl"),
        "device": GOOD.replace("train.jsonl", "/dev/zero"), "device with a format": GOOD.replace("train: train.jsonl", "train: /dev/zero\n  format: txt"), "memory": GOOD.replace("train: train.jsonl", "train: /proc/self/mem\n  format: txt"), "folder": GOOD.replace("train.jsonl", "."),
        "passwords": GOOD.replace("train.jsonl", "/etc/passwd"), "hub path": GOOD.replace("train.jsonl", "'hub:../../x#train'"), "hub nothing": GOOD.replace("train.jsonl", "'hub:#'"), "hub shell": GOOD.replace("train.jsonl", "'hub:$(touch canary)/x#train'"),
        "method path": GOOD + "tune: {method: ../../evil}\n", "method module": GOOD + "tune: {method: os}\n", "method private": GOOD + "tune: {method: _around}\n", "method dunder": GOOD + "tune: {method: __init__}\n", "method dotted": GOOD + "tune: {method: 'lora.os'}\n", "method NUL": GOOD + 'tune: {method: "a\\0"}\n',
        "task path": GOOD.replace("task: classification", "task: ../evil"), "task dunder": GOOD.replace("task: classification", "task: __init__"), "metric": GOOD.replace("bootstrap: 50", "metrics: ['os.system']"), "metric dunder": GOOD.replace("bootstrap: 50", "metrics: ['__class__']"),
        "metric path": GOOD.replace("bootstrap: 50", "metrics: ['../x']"), "swap a function": GOOD + "swap: [{at: '**.query', with: 'os:system'}]\n", "swap eval": GOOD + "swap: [{at: '**.query', with: 'builtins:eval'}]\n", "swap a plain class": GOOD + "swap: [{at: '**.query', with: 'subprocess:Popen', options: {args: [touch, canary]}}]\n",
        "swap nothing": GOOD + "swap: [{at: '**.query', with: 'gone.py:X'}]\n", "swap no class": GOOD + "swap: [{at: '**.query', with: 'os'}]\n", "swap relative": GOOD + "swap: [{at: '**.query', with: '..evil:X'}]\n", "_target_": GOOD + "_target_: os.system\n", "_target_ inside": GOOD.replace("epochs: 2", "epochs: {_target_: os.system}"),
        "interpolation": GOOD.replace("epochs: 2", "epochs: ${oc.env:HOME}"), "include": GOOD + "include: /etc/passwd\n", "defaults": GOOD + "defaults: [x]\n", "hydra": GOOD + "hydra: {run: {dir: /tmp}}\n", "trust": GOOD.replace("model:\n", "model:\n  trust_remote_code: true\n"),
        "cache above": GOOD.replace("max_length: 48", "cache: ../outside"), "cache far above": GOOD.replace("max_length: 48", "cache: runs/../../../outside"), "cache absolute": GOOD.replace("max_length: 48", "cache: /tmp/outside_canary"), "cache here": GOOD.replace("max_length: 48", "cache: ."), "cache home": GOOD.replace("max_length: 48", "cache: ''"),
        "cache is a file": GOOD.replace("max_length: 48", "cache: train.jsonl"), "cache NUL": GOOD.replace("max_length: 48", 'cache: "a\\0b"'), "cache long": GOOD.replace("max_length: 48", "cache: " + "x" * 5000), "model above": GOOD.replace("name: model", "name: ../../../../etc"), "model device": GOOD.replace("name: model", "name: /dev/null"),
        "model NUL": GOOD.replace("name: model", 'name: "a\\0b"'), "model long": GOOD.replace("name: model", "name: " + "x" * 5000), "model shell": GOOD.replace("name: model", "name: '$(touch canary)'"), "model url": GOOD.replace("name: model", "name: http://127.0.0.1:9/x"), "model user": GOOD.replace("name: model", "name: ~nobody_at_all/x"),
        "model escape": GOOD.replace("name: model", 'name: "\\e[2J"'), "model empty": GOOD.replace("name: model", "name: ''"), "revision above": GOOD.replace("name: model", "name: owner/thing\n  revision: ../../../../etc"), "revision NUL": GOOD.replace("name: model", 'name: owner/thing\n  revision: "a\\0"'), "revision empty": GOOD.replace("name: model", "name: owner/thing\n  revision: ''"),
        "device name": GOOD.replace("epochs: 2", "device: '$(touch canary)'"), "device number": GOOD.replace("epochs: 2", "device: cuda:99"), "no device": GOOD.replace("epochs: 2", "device: ''"), "names twice": GOOD.replace("max_length: 48", "names: [text, text]"), "columns escape": GOOD.replace("max_length: 48", 'columns: {text: "\\e[2J"}'),
        "column role": GOOD.replace("max_length: 48", "columns: {__class__: x}"), "labels twice": GOOD.replace("max_length: 48", "labels: [positive, positive]"), "labels composed": GOOD.replace("max_length: 48", 'labels: ["\\u00e9", "e\\u0301"]'), "labels one": GOOD.replace("max_length: 48", "labels: [positive]"), "format": GOOD.replace("max_length: 48", "format: pickle"),
    }.items():  # fmt: skip
        yield name, text.encode("utf-8", "surrogatepass")
    for key, group in (("epochs", "train"), ("batch_size", "train"), ("learning_rate", "train"), ("clip", "train"), ("warmup", "train"), ("weight_decay", "train"), ("eps", "train"), ("max_steps", "train"), ("micro_batch_tokens", "train"), ("max_length", "data")):  # fmt: skip
        for value in (".nan", ".inf", "-.inf", "-1", "'3'", "[3]", "{a: 3}", "true", "1_000", "12:30", "yes"):
            text = re.sub(rf"\n  {key}: .*", "", GOOD).replace(f"\n{group}:\n", f"\n{group}:\n  {key}: {value}\n")
            yield f"{group}.{key}: {value}", text.encode()
    for name, raw in {
        "UTF-16": GOOD.encode("utf-16"),
        "latin-1": GOOD.encode() + b"# \xe4\n",
        "noise": bytes(range(256)),
        "gzip": b"\x1f\x8b\x08" + b"\0" * 99,
        "zip": b"PK\x03\x04" + b"\0" * 99,
        "pickle": payloads("canary")["protocol 4"],
        "NULs": b"\0" * 9999,
    }.items():
        yield name, raw


OVERRIDES = [
    "", "=", "=3", "seed", ".=3", "a..b=3", "a." * 5000 + "b=1", "seed=" + "9" * 5000, "seed=" + "9" * 60, "seed=[", "seed={", "seed=!!python/object/apply:os.system ['touch canary']", "seed=*a", "seed=&a [*a]", "seed=1\n---\n2", "seed='", "seed=\x1b[2J", "\x1b[2J=3",
    "seed=\udcff", "\udcff=1", "model=3", "model=", "data=[]", "task=", "task=../x", "train=", "tune.method={}", "tune.method=../../x", "tune=3", "swap=[{", "swap={a: b}", "swap=[{at: x, with: 'os:system'}]", "data.train=/dev/zero", "data.train=\x1b[2J", "data.train=~nobody_at_all/x",
    "data.train=" + "x" * 5000, "data.cache=train.jsonl", "data.cache=/proc/outside", "model.name=" + "../" * 50 + "etc", "model.name=\udcff", "__class__.x=1", "train.__init__=1", "train.epochs.x.y=1", "seed=" + "[" * 5000, "$(touch canary)=1", "seed=$(touch canary)", "evaluate.metrics=[__import__]",
]  # fmt: skip


@pytest.mark.parametrize("part", range(6))
def test_hostile_recipes_are_refused(
    recipe: MakeRecipe, bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], quiet_disk: Callable[[], None], part: int
) -> None:
    shutil.copytree(bert, tmp_path / "model")
    path = Path(recipe(model=Path("model")).path)
    cases: list[tuple[str, bytes, list[str]]] = [(name, raw, []) for name, raw in texts()]
    cases += [(f"override {one[:60]!r}", GOOD.encode(), [one]) for one in OVERRIDES if one and "=" in one]
    assert len(cases) >= 300
    faults = []
    for name, raw, overrides in cases[part::6]:
        path.write_bytes(raw)
        try:
            refused(*answers(capfd, "layers", str(path), *overrides))
            quiet_disk()
        except (AssertionError, Hang) as error:
            faults.append(f"{name[:80]}: {type(error).__name__} {str(error)[:300]}")
    assert not faults, "\n".join([f"{len(faults)} of {len(cases[part::6])}", *faults])


@pytest.mark.parametrize("name", ["...yaml", ".hidden.yaml", "..yaml", "\x1b[2J.yaml", "a\nb.yaml", " .yaml"])
def test_a_recipe_file_cannot_name_a_run_folder_outside_runs(
    recipe: MakeRecipe, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    recipe().path.rename(name)
    refused(*answers(capfd, "finetune", f"./{name}"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)])
def test_a_recipe_is_a_plain_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[str], None]) -> None:
    Path("recipes").mkdir()
    for name in ("odd.yaml", "recipes/named.yaml"):
        make(name)
    refused(*answers(capfd, "check", "./odd.yaml"))
    refused(*answers(capfd, "check", "named"))


def test_only_the_command_line_points_the_cache_elsewhere(
    recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = recipe()
    outside = tmp_path.parent / f"{tmp_path.name}_cache"
    assert answers(capfd, "layers", str(made.path), f"data.cache={outside}")[0] == 0
    assert list(outside.glob("*.arrow"))
    shutil.rmtree(outside)


def test_numbers_of_a_recipe_have_64_bits() -> None:
    assert yaml12.scalar(str(2**63 - 1)) == 2**63 - 1
    for text in (str(2**63), "0x" + "f" * 16):
        with pytest.raises(InputError, match="64 bits"):
            yaml12.scalar(text)
