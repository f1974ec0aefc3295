"""Every key of a recipe: its type, default and meaning, once.

The same declarations check a recipe, write its resolved form into the run folder and print `describe`. The groups are
the stages of a run, in order. A tuning method adds the options that stand beside `tune.method` in its own file
(engine/tune/NAME.py, class Options).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Group(BaseModel):
    """A group of keys: unknown keys and wrong types are errors, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _pattern(value: str) -> str:
    if not value.strip():
        raise ValueError("a pattern that can match something is needed, such as `**` for everything")
    return value


def _validation(value: Any) -> Any:
    if isinstance(value, float | int) and not isinstance(value, bool):
        if not 0 < value < 1:
            raise ValueError("a fraction of train lies between 0 and 1, such as 0.1")
        return float(value)
    return _one_or_many(value)


def _rhythm(value: Any) -> Any:
    if value == "epoch" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("write `epoch` or a number of steps")


def _tokens(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("write `auto` or a number of tokens")


def _timetable(value: Any) -> Any:
    if isinstance(value, float | int) and not isinstance(value, bool):
        if value <= 0:
            raise ValueError("write a list of {after, train}, or a number of epochs above 0")
        return float(value)
    if value == []:
        raise ValueError("write a list of {after, train}, or a number of epochs above 0; leave the key out to unfreeze nothing")
    return value


def _warmup(value: Any) -> Any:
    number = isinstance(value, float | int) and not isinstance(value, bool)
    if number and (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
        return value
    raise ValueError("write a fraction of all steps from 0 to 1, or a whole number of steps")


Files = Annotated[
    list[str], BeforeValidator(_one_or_many), Field(min_length=1), "file, list of files, or hub:OWNER/NAME[/CONFIG]#SPLIT"
]
Pattern = Annotated[str, AfterValidator(_pattern)]
Patterns = Annotated[list[Pattern], BeforeValidator(_one_or_many), Field(min_length=1), "path pattern or list of them"]
Rhythm = Annotated[int | str, BeforeValidator(_rhythm), "epoch or a number of steps"]


class FromScratch(Group):
    """A model with random weights, drawn from the recipe's seed."""

    architecture: str = Field(description="bert, gpt2, llama, t5, or any other model type that transformers knows.")
    layers: int = Field(4, ge=1, le=200, description="Blocks (of an encoder-decoder: in each of its two stacks).")
    hidden: int = Field(256, ge=4, le=20_000, description="Numbers in a token's vector, H.")
    heads: int = Field(4, ge=1, description="Attention heads; H is a multiple of them.")
    intermediate: int | None = Field(None, ge=1, le=80_000, description="Width of the feed-forward layer; by default 4 H.")
    max_positions: int = Field(512, ge=4, description="The longest text in tokens; relative positions have no such end.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Wherever the architecture has dropout.")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Other keys of the architecture's config.json, such as {num_key_value_heads: 2}."
    )

    @model_validator(mode="after")
    def _heads_share_the_vector(self) -> "FromScratch":
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is no multiple of heads {self.heads}")
        return self


class NewTokenizer(Group):
    """A tokenizer trained on the recipe's own training text."""

    kind: Literal["wordpiece", "byte_bpe", "unigram"] = Field(description="As BERT's, as GPT-2's, or as T5's.")
    vocabulary: int = Field(8000, ge=300, le=500_000, description="Tokens that it may have at the most, special ones included.")
    lowercase: bool = Field(False, description="Write everything small first (wordpiece: and without accents).")
    min_frequency: int = Field(2, ge=1, description="How often a pair of pieces must occur to become one (not unigram).")


class TrainTokenizer(Group):
    """The group that says that a tokenizer is trained, not loaded."""

    train: NewTokenizer = Field(description="Train it on the texts of data.train: the same texts give the same bytes.")


class Model(Group):
    """Where the weights come from: `name` or `from_scratch`, one of the two."""

    name: str | None = Field(None, description="A folder, or a model's name on the hub (owner/name).")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; pin a commit to be exact.")
    offline: bool = Field(False, description="Never ask the hub: a folder, the hub's cache or the embedded default only.")
    from_scratch: FromScratch | None = Field(None, description="A small model with random weights, in the place of a name.")
    tokenizer: Annotated[str | TrainTokenizer | None, "folder, or {train: {kind, vocabulary, ...}}"] = Field(
        None, description="The tokenizer of a model from scratch; another folder than the model's own for a named one."
    )

    @property
    def label(self) -> str:
        """What the model is called in the output."""
        return self.name or (self.from_scratch.architecture if self.from_scratch else "")


class Data(Group):
    """What is read, and how rows become model input."""

    train: Files = Field(description="The rows to learn from.")
    validation: Annotated[list[str] | float | None, BeforeValidator(_validation), "files, or a fraction of train"] = Field(
        None, description="The rows that choose the best step; a number takes that fraction of train."
    )
    test: Files | None = Field(None, description="The rows of the final score; never looked at before the end.")
    columns: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="What the task reads -> the column that holds it, such as {text: review}; multilabel's `labels` may name a list.",
    )
    format: Literal["jsonl", "json", "csv", "tsv", "parquet", "txt", "conll", "squad"] | None = Field(
        None, description="The files' format; by default their ending tells."
    )
    names: list[str] | None = Field(
        None, description="Column names for conll files, and for csv / tsv files without a header row."
    )
    quoting: Literal["auto", "csv", "none"] = Field(
        "auto", description='Quotes in csv / tsv: "csv" reads them, "none" keeps them; auto is csv for .csv, none for .tsv.'
    )
    labels: list[str] | None = Field(None, description="The labels in their order; by default train's, sorted.")
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="A broken line, a row without text or with an unknown label: stop and name it, or drop and count it."
    )
    train_limit: int | None = Field(None, gt=0, description="Use only the first N rows of train.")
    max_length: int = Field(
        128,
        ge=4,
        description="Tokens an example may have; longer ones are cut, counted and reported, or become windows (by task).",
    )
    cache: str = Field(
        "runs/.cache",
        description="Folder of tokenised data, reused by content hash; outside the working folder only by command line.",
    )


class Part(Group):
    """One of the tasks that share an encoder (task: multitask)."""

    task: str = Field(description="classification, ... (any task but multitask).")
    data: Annotated[dict[str, Any], "keys of `data`"] = Field(
        default_factory=dict, description="Its own keys of `data`; what stands in the recipe's `data` is the default of all."
    )
    weight: float = Field(1.0, gt=0, description="What its loss is multiplied by.")
    metrics: list[str] | None = Field(
        None, min_length=1, description="Its headline metrics; the first goes into the mean. By default its task's first."
    )


class SwapRule(Group):
    """One replacement: every module that `at` matches is built anew by `with`."""

    at: Patterns = Field(description="Path patterns: * one segment, ** any number, {a,b} either, [0-3] a range.")
    with_: str = Field(alias="with", description="The layer: file.py:Class or package.module:Class.")
    options: dict[str, Any] = Field(default_factory=dict, description="Passed to the class, or to its from_old.")
    weights: Literal["keep", "fresh"] = Field("keep", description="Carry over tensors that fit by name and shape, or none.")
    expect: int | None = Field(None, ge=1, description="How many modules must match; anything else is an error.")

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Thaw(Group):
    """One line of the timetable of gradual unfreezing."""

    after: float = Field(ge=0, description="From when on: epochs, such as 1 or 0.5.")
    train: Patterns = Field(description="Parameter paths that train from then on; until then they are frozen.")


class Tune(Group):
    """What trains, and how fast. Each method adds its own options here."""

    method: str = Field("full", description="A file in engine/tune/ (full, last_n, lora, adapter, ...), or file.py:Class.")
    start: str | None = Field(
        None, min_length=1, description="Begin from this trained adapter: a run, or a folder in peft's or adapter-hub's layout."
    )
    freeze: Patterns | None = Field(None, description="Parameter paths to freeze besides, such as **.embeddings.**.")
    train: Patterns | None = Field(None, description="Parameter paths to train besides; comes after freeze.")
    unfreeze: Annotated[list[Thaw] | float | None, BeforeValidator(_timetable), "list of {after, train}, or epochs"] = Field(
        None,
        description="Gradual unfreezing: a timetable, or E: the head first, then one more block from the top every E epochs.",
    )
    layer_decay: float = Field(1.0, gt=0, le=1, description="Each lower block learns this many times as fast as the one above.")
    rates: dict[Pattern, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict, description="Parameter path pattern -> factor of the learning rate there; factors multiply."
    )


class Train(Group):
    """The loop."""

    epochs: int = Field(3, ge=1, description="Passes over train.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, whatever the epochs.")
    batch_size: int = Field(32, ge=1, description="Examples in one optimizer step; micro-batches split it exactly.")
    micro_batch_tokens: Annotated[int | str, BeforeValidator(_tokens), "number of tokens, or auto"] = Field(
        "auto",
        description="Padded tokens in one forward pass: the memory knob, it never changes the result. Halved when memory runs out.",
    )
    kernels: bool = Field(
        True,
        description="On a CPU: attention a few rows at a time, float32 products by oneDNN where they are true, dropout's masks by a"
        " faster generator; speed alone, and which dropout is drawn.",
    )
    packing: bool = Field(True, description="Compute no padding, where the architecture allows; changes speed alone.")
    last_layer: bool = Field(
        True,
        description="Compute the last layer only where the head reads, if a probe proves it; changes speed, and which dropout is drawn.",
    )
    ahead: bool = Field(True, description="Make the next window in a thread while a step runs; changes speed alone.")
    cache_frozen: Literal["off", "float32", "bfloat16"] = Field(
        "off",
        description="Compute the frozen blocks below all that trains once, and keep their states so; they lose their dropout.",
    )
    cache_limit: float = Field(
        16.0, ge=0, description="GiB that such states may take in data.cache; without room: computed anew."
    )
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled decay; biases and norms are left out.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2, description="AdamW's running-average factors.")
    eps: float = Field(1e-8, gt=0, description="AdamW's term against division by zero.")
    warmup: Annotated[float | int, BeforeValidator(_warmup), "fraction of all steps, or a number of steps"] = Field(
        0.06, description="Linear rise of the learning rate."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="The way down after warm-up.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the whole gradient; null for none.")
    precision: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="Autocast type; auto is bfloat16 where the device computes it, else float32."
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="What the model computes with. bfloat16: half the bytes; the optimizer moves float32 masters, which are saved.",
    )
    dropout: Literal["exact", "pool"] = Field(
        "exact", description="pool: masks are windows of a pool of random numbers, the same distribution for less time on a CPU."
    )
    compact_vocabulary: bool = Field(
        True, description="Train only the word embeddings that the data uses; the others only decay, computed once. Saves memory."
    )
    max_skipped: int = Field(
        3, ge=0, description="Steps to leave out in a row because their numbers are not finite, twice; one more is an error."
    )
    max_skipped_in_run: int = Field(10, ge=0, description="The same for a whole run.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")


class Evaluate(Group):
    """How a model is judged."""

    every: Rhythm = Field("epoch", description="When to score the validation split.")
    metrics: list[str] | None = Field(
        None,
        min_length=1,
        description="Headline metrics of the task, by scikit-learn's names where it has them; the task has defaults.",
    )
    bootstrap: int = Field(1000, ge=0, description="Resamples behind each 95 % interval; 0 for none.")


class EarlyStopping(Group):
    """Keep and restore the best weights; stop when they get no better."""

    monitor: str = Field(description="A headline metric, or loss.")
    patience: int | None = Field(None, ge=1, description="Evaluations without gain before stopping; null never stops.")
    min_delta: float = Field(0.0, ge=0, description="The least change that counts as a gain.")


class Checkpoint(Group):
    """What is kept so that a run can go on."""

    every: Rhythm = Field("epoch", description="When to save.")
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep, besides the best weights.")


class Schema(Group):
    """One fine-tuning run."""

    task: str = Field(description="classification, ... (the files in engine/tasks/).")
    seed: int = Field(13, ge=0, description="Decides data order, fresh weights and dropout.")
    model: Model
    data: Data
    tasks: dict[str, Part] = Field(default_factory=dict, description="Of multitask: its tasks by name.")
    swap: list[SwapRule] = Field(default_factory=list, description="Custom layers put into the pretrained model.")
    tune: Tune = Tune()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    early_stopping: EarlyStopping | None = None
    checkpoint: Checkpoint = Checkpoint()
    offline: dict[str, Any] = Field(default_factory=dict, description="Keys that replace the others under --offline.")
