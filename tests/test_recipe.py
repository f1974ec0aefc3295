"""Recipes: strict, all errors at once with file:line, key and nearest match; YAML 1.2 scalars."""

from pathlib import Path

import pytest
import yaml
from conftest import BASE, MakeRecipe

from engine import find, yaml12
from engine.errors import InputError
from engine.keys import describe
from engine.recipe import available, load
from engine.schema import Tune


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5), ("1e3", 1000.0), ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("0o17", 15), ("017", 17),
        ("12:30", "12:30"), ("1_000", "1_000"), ("~", None), ("", None), (".5", 0.5), ("-7", -7), ("2026-11-23", "2026-11-23"),
        ("[a, 1]", ["a", 1]), ("'3'", "3"), ("**.query", "**.query"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = yaml12.scalar(text)
    assert found == value
    assert type(found) is type(value)
    assert yaml12.parse(yaml12.dump({"k": value}), "dumped")[0] == {"k": value}


def test_pyyaml_alone_would_have_read_them_wrongly() -> None:
    assert yaml.safe_load("3e-5") == "3e-5"
    assert yaml.safe_load("no") is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", ":2: the key 'a' stands here twice (first in line 1)"),
        ("a: &x 1\nb: *x", ":2: aliases"),
        ("a: !!python/object/apply:os.system [echo]", ":1: the tag"),
        ("a: [1, 2", "this is not YAML"),
        (
            "at: **.query",
            ":1:6: this is not YAML: expected alphabetic or numeric character, but found '*'; a pattern that begins with * needs quotes",
        ),
        ("a:\n\t- 1", ":2:1: this is not YAML"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deep"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        yaml12.parse(text, "f.yaml")
    assert said in str(error.value)
    assert str(error.value).startswith("f.yaml")


def test_all_errors_come_at_once_with_line_key_and_hint(tmp_path: Path) -> None:
    text = BASE.format(model="x").replace("learning_rate: 1e-2", "learnin_rate: 1e-2").replace("epochs: 2", "epochs: two")
    text = (
        text.replace("max_length: 48", "max_length: 1").replace("model:\n", "modle: 1\nmodel:\n")
        + "early_stopping: {monitor: loss, patence: 2}\n"
    )
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load(str(tmp_path / "bad.yaml"))
    lines = str(error.value).splitlines()
    numbers = {
        part: i for i, line in enumerate(text.splitlines(), 1) for part in line.replace("{", "").split() if part.endswith(":")
    }
    for key, said in (
        ("train.learnin_rate", "unknown key; did you mean 'learning_rate'?"), ("train.epochs", "a whole number is needed, not 'two'"),
        ("data.max_length", "greater than or equal to 4"), ("modle", "did you mean 'model'?"), ("early_stopping.patence", "did you mean 'patience'?"),
    ):  # fmt: skip
        line = next(line for line in lines if f" {key}: " in line)
        assert said in line
        leaf = key.rpartition(".")[2] + ":"
        assert line.startswith(f"bad.yaml:{numbers.get(leaf, numbers.get('early_stopping:'))}:")
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lerning_rate=1", "did you mean 'learning_rate'?"), ("train.epochs=0", "greater than or equal to 1"),
        ("train.learning_rate=fast", "a number is needed, not 'fast'"), ("train.learning_rate=.nan", "finite number"),
        ("data.validation=1.5", "between 0 and 1"), ("tune.method=lorra", "did you mean 'lora'?"), ("tune.r=4", "unknown key"),
        ("task=clasification", "did you mean 'classification'?"), ("train.warmup=1.5", "a fraction of all steps"), ("epochs", "is no override"),
        ("train.precision=bf16", "'float32', 'bfloat16', 'float16' or 'auto'"), ("swap=[{at: x, with: y, weigths: keep}]", "did you mean 'weights'?"),
        ("checkpoint.every=sometimes", "write `epoch` or a number of steps"), ("evaluate.metrics=accuracy", "a list is needed"),
    ],
)  # fmt: skip
def test_wrong_overrides_are_named(recipe: MakeRecipe, override: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        recipe(override)
    assert said in str(error.value)
    assert "command line" in str(error.value)


def test_early_stopping_needs_a_validation_split(recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="needs data.validation"):
        recipe("data.validation=null", "early_stopping={monitor: loss}")


def test_another_method_drops_the_options_of_the_old_one(recipe: MakeRecipe) -> None:
    assert recipe("tune.method=lora", "tune.r=4").tune.r == 4
    assert recipe("tune.r=4", "tune.method=lora").tune.r == 4
    assert recipe("tune={method: lora, r: 4}", "tune.method=last_n").tune.model_dump(exclude_defaults=True) == {
        "method": "last_n"
    }


def test_the_resolved_recipe_reads_back_as_itself(recipe: MakeRecipe, tmp_path: Path) -> None:
    first = recipe("tune.method=lora", "train.learning_rate=3e-5", "data.labels=[no, '3e1']")
    (tmp_path / "again.yaml").write_text(yaml12.dump(first.resolved()))
    assert load(str(tmp_path / "again.yaml")).resolved() == first.resolved()


def test_the_offline_block_replaces_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text(BASE.format(model="owner/large") + "offline: {model: {name: small}, train: {epochs: 1}}\n")
    path = str(tmp_path / "o.yaml")
    assert load(path).model.name == "owner/large"
    offline = load(path, offline=True)
    assert (offline.model.name, offline.train.epochs, offline.train.batch_size) == ("small", 1, 16)


def test_offline_without_a_block_is_an_error(recipe: MakeRecipe) -> None:
    made = recipe()
    with pytest.raises(InputError, match="offline"):
        load(str(made.path), offline=True)


def test_describe_knows_every_key_with_a_meaning() -> None:
    rows = describe()
    keys = [key for key, *_ in rows]
    assert {"task", "model.name", "data.train", "swap[].at", "tune.method", "tune.r", "train.clip", "checkpoint.keep"} <= set(
        keys
    )
    assert all(meaning for _, _, _, meaning in rows)
    assert {
        f"({name}) "
        for name in find.names("tune")
        if len(find.module("tune", name, "").Options.model_fields) > len(Tune.model_fields)
    } <= {m[: m.find(")") + 2] for *_, m in rows if m.startswith("(")}


def test_every_shipped_recipe_is_valid_and_begins_with_a_headline() -> None:
    found = available()
    assert set(found) == {p.stem for p in (find.PROJECT / "recipes").glob("*.yaml")}
    assert found
    for name, path in found.items():
        load(name)
        assert path.read_text("utf-8").startswith("# "), f"{name}: the first line says what the recipe is"
