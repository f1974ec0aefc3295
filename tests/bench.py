"""Side by side: the engine and its rivals on the same work, the same batches, in one run; ratios, not times.

    make bench                              every case, three interleaved rounds (an hour on two cores)
    make bench ARGS="--cases sst2 lora"     some of them
    make bench ARGS=--table                 the README's tables from the last results
    make bench ARGS=--profile               where one step's time goes, and what is left to the ceiling

Each measurement is a process of its own. Throughput is counted from the end of the first step to the end of the last, with
the same rows in the same order for all but group_by_length, which chooses its own. Memory is the process's largest resident
size, start the time from the process's birth to the end of its first step. Equal results are shown apart, with dropout 0: the
losses of 40 steps beside each other. The ceiling is what this machine's own matrix products reach, measured in the same run; the
share of it counts the products of the body that real tokens need in full fine-tuning (6 operations a weight and token), so what
is spent on padding counts as nothing. Needs ../shared/data (sst2, imdb), which is not part of the project.
"""

import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BATCH, RATE, SEED = 32, 5e-5, 13
STILL_STEPS = 40
FROZEN = 5  # of 6 blocks, with the embeddings
POOL = ["train.dropout=pool"]  # asked for by name: cheaper masks of the same distribution
BF16 = ["train.weights=bfloat16", *POOL]
CACHE = ["tune={method: last_n, n: 1}", "train.cache_frozen=bfloat16", *POOL]
LORA = "tune={method: lora, r: 8}"


@dataclass(frozen=True)
class Work:
    """Rows to train on or to predict."""

    data: str = "sst2"  # or imdb
    rows: int = 8000
    length: int = 128
    steps: int = 80
    predict: bool = False


SST2, LONG = Work(), Work("imdb", 2000, 256, 8)
WEIGHTS = 10_622_976  # of MiniLM that take part in products with every token: 6 blocks of 12 H^2, H = 384, and biases left out
PREDICT = Work(rows=4000, predict=True)


@dataclass(frozen=True)
class Case:
    """One line of the table: the engine with `ours` against a rival with `theirs`."""

    name: str
    work: Work
    ours: list[str]
    theirs: dict[str, Any]
    goal: float
    floor: float
    equal: float | None = None  # how far losses may be apart over 40 steps with dropout 0; logits in prediction
    beside: dict[str, Any] = field(default_factory=dict)  # the rival of that comparison, where it is another one


PLAIN: dict[str, Any] = {}
CASES = [
    Case("sst2 float32 / Trainer", SST2, [], PLAIN, 6.5, 4.5, 1e-5),
    Case("sst2 float32, pool dropout / Trainer", SST2, POOL, PLAIN, 6.5, 4.5),
    Case("sst2 float32 / Trainer group_by_length", SST2, [], {"group": True}, 2.8, 2.0),
    Case("sst2 float32, pool dropout / Trainer group_by_length", SST2, POOL, {"group": True}, 2.8, 2.0),
    Case("sst2 float32 / Lightning", SST2, [], {"lightning": True}, 6.5, 4.5),
    Case("sst2 bf16 / Trainer bf16", SST2, BF16, {"bf16": True}, 5.0, 3.3, 1e-3, PLAIN),
    Case("sst2 bf16 / Trainer bf16 + group_by_length", SST2, BF16, {"bf16": True, "group": True}, 2.4, 1.5),
    Case("lora float32, pool dropout / Trainer + peft", SST2, [LORA, *POOL], {"peft": True}, 7.0, 4.5, 1e-5),
    Case("lora bf16 base / Trainer + peft", SST2, [LORA, *BF16], {"peft": True}, 10.0, 6.0, 1e-3),
    Case("256 tokens float32, pool dropout / Trainer", LONG, POOL, PLAIN, 5.0, 4.0),
    Case("256 tokens bf16 / Trainer", LONG, BF16, PLAIN, 8.0, 6.0),
    Case("5 of 6 blocks frozen, cached / Trainer, frozen", SST2, CACHE, {"frozen": True}, 35.0, 20.0),
    Case("prediction float32 / Trainer", PREDICT, [], PLAIN, 4.5, 3.3, 1e-5),
    Case("prediction bf16 / Trainer bf16", PREDICT, ["train.precision=bfloat16"], {"bf16": True}, 3.5, 2.5, 1e-2),
]


def texts(work: Work) -> tuple[list[str], list[int]]:
    """The first rows of train."""
    if work.data == "imdb":
        rows = [json.loads(line) for line in (SHARED / "imdb/train_2k.jsonl").read_text("utf-8").split("\n")[: work.rows] if line]
        return [r["text"] for r in rows], [int(r["label"] == "pos") for r in rows]
    lines = (SHARED / "sst2/train.tsv").read_text("utf-8").rstrip("\n").split("\n")
    columns = lines[0].split("\t")
    rows_ = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines[1 : work.rows + 1]]
    return [r["sentence"] for r in rows_], [int(r["label"]) for r in rows_]


def ceiling() -> dict[str, float]:
    """The best rate of this machine's products, in GFLOP/s, of float32 as torch has it and as the engine takes it, and of bfloat16."""
    import torch

    from engine.fast import kernels

    def rate(kind: torch.dtype) -> float:
        x, w = torch.randn(1024, 384).to(kind), torch.randn(1536, 384).to(kind)
        best = float("inf")
        for _ in range(40):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - start)
        return 2 * 1024 * 384 * 1536 / best / 1e9

    found = {"float32, torch": rate(torch.float32), "bfloat16": rate(torch.bfloat16)}
    with kernels.fast_kernels(torch.device("cpu")):
        return found | {"float32": rate(torch.float32)}


def profile(out: Path) -> None:
    """One step of SST-2, by what it is spent on: the mean of 20 after 60, in float32 and with bfloat16 weights."""
    from torch.profiler import ProfilerActivity, profile

    from engine import finetune

    groups = {
        "matrix products": ("aten::mm", "aten::addmm"),
        "attention": ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "Attention", "AttentionBackward"),
        "optimizer and clipping": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::mul_", "Optimizer.step#AdamW.step"),
        "GELU, norms, dropout": (
            "aten::gelu", "aten::gelu_backward", "aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::mul",
            "aten::bernoulli_", "aten::add", "aten::add_", "aten::sum",
        ),
        "copies and rearranging": ("aten::copy_", "aten::index_select", "aten::fill_", "aten::embedding_dense_backward"),
    }  # fmt: skip
    most, inner = ceiling(), finetune.train
    for name, options in (("float32", POOL), ("bfloat16", BF16)):
        spans: dict[str, float] = {}
        wall, tokens = [0.0, 0.0], [0]

        def train(model: Any, *arguments: Any, _wall: Any = wall, _tokens: Any = tokens, _spans: Any = spans, **more: Any) -> Any:
            watch, seen = profile(activities=[ProfilerActivity.CPU]), [0]
            write = more.pop("write")

            def looked(record: dict[str, Any]) -> None:
                write(record)
                seen[0] += record["event"] == "step"
                if seen[0] == 60:
                    _wall[0] = time.perf_counter()
                if seen[0] > 60:
                    _tokens[0] += record.get("tokens", 0)
                if seen[0] == 80 and not _wall[1]:
                    _wall[1] = time.perf_counter()
                    watch.start()
                if seen[0] == 100:
                    watch.stop()
                    for event in watch.key_averages():
                        _spans[event.key] = event.self_cpu_time_total / 1e6 / 20

            return inner(model, *arguments, **more, write=looked)

        finetune.train = train
        engine(out, SST2, options, 101, "base")
        step = (wall[1] - wall[0]) / 20
        share = step / sum(spans.values())  # what the profiler itself takes, taken off evenly
        print(f"\n{name}: {step * 1e3:.0f} ms a step\n\n| part | ms | share |\n|---|---|---|")
        known = 0.0
        for what, keys in groups.items():
            seconds = sum(spans.get(key, 0.0) for key in keys) * share
            known += seconds
            print(f"| {what} | {seconds * 1e3:.0f} | {seconds / step:.0%} |")
        print(f"| all else (Python, autograd, small operations) | {(step - known) * 1e3:.0f} | {1 - known / step:.0%} |")
        least = 6 * WEIGHTS * tokens[0] / 41 / most[name] / 1e9
        print(
            f"| for comparison: its products at the ceiling of {most[name]:.0f} GFLOP/s | {least * 1e3:.0f} | {least / step:.0%} |"
        )
    finetune.train = inner


def prepare(out: Path) -> None:
    """The data as one file each, and the base model with a head, with its own dropout and without: all start from these."""
    import torch
    import transformers

    from engine import models

    for work in (SST2, LONG):
        made = [json.dumps({"text": t, "label": y}) for t, y in zip(*texts(work), strict=True)]
        (out / f"{work.data}.jsonl").write_text("\n".join(made) + "\n", "utf-8")
    source = models.find(models.EMBEDDED, None, True, "bench").folder
    for name, options in (("base", {}), ("still", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})):
        torch.manual_seed(SEED)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, **options)
        model.save_pretrained(out / name)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out / name)


# -- the engine -------------------------------------------------------------------------------------------------------


def engine(out: Path, work: Work, overrides: list[str], steps: int, base: str) -> dict[str, Any]:
    """The engine's own run, as `make finetune` makes it, without a test split."""
    from engine.finetune import finetune
    from engine.recipe import load

    recipe = out / "bench.yaml"
    recipe.write_text(f"""task: classification
seed: {SEED}
model: {{name: {out / base}}}
data: {{train: {out}/{work.data}.jsonl, train_limit: {work.rows}, max_length: {work.length}, cache: {out / "cache"}}}
train: {{epochs: 9, max_steps: {steps}, batch_size: {BATCH}, learning_rate: {RATE}, schedule: constant, warmup: 0}}
checkpoint: {{every: 1000000}}
evaluate: {{every: 1000000, bootstrap: 0}}
""")
    made = load(str(recipe), [f"data.cache={out / 'cache'}", *overrides])
    if work.predict:
        return _predicted(made)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=out))
    finetune(made, str(folder))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    done = [r for r in log if r["event"] == "step"]
    tokens = sum(r["tokens"] for r in done[1:])
    return {"times": [r["time"] for r in done], "losses": [r["loss"] for r in done], "tokens": tokens, "steps": len(done) - 1}


def _predicted(recipe: Any) -> dict[str, Any]:
    """The logits of all rows, as `predict` computes them."""
    from engine import evaluate, optim
    from engine.fast import kernels
    from engine.prepare import prepare as ready_for

    ready = ready_for(recipe, lambda line: None)
    kind, train = optim.autocast(ready.precision, ready.device), ready.encoded["train"]
    with kernels.fast_kernels(ready.device):
        warm = evaluate.outputs(ready.loaded.model, ready.task, train, tokens=4096, device=ready.device, autocast=kind)
        start = time.time()
        made = evaluate.outputs(ready.loaded.model, ready.task, train, tokens=4096, device=ready.device, autocast=kind)
    assert len(made) == len(warm)
    return {"times": [start, time.time()], "logits": made.tolist()}


# -- the rivals -------------------------------------------------------------------------------------------------------


def trainer(out: Path, work: Work, options: dict[str, Any], steps: int, base: str) -> dict[str, Any]:
    """transformers' Trainer with its defaults and what `options` ask for; the rows in the engine's order."""
    import numpy as np
    import torch
    import transformers
    from datasets import Dataset

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / base)
    if options.get("peft"):
        import peft

        torch.manual_seed(SEED)
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
        )
        if options.get("save"):
            model.save_pretrained(options["save"])
    if options.get("frozen"):
        for module in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN]):
            module.requires_grad_(False)
    said, labels = texts(work)
    order = np.concatenate([np.random.Generator(np.random.PCG64([SEED, e])).permutation(len(said)) for e in range(3)])
    if work.predict:
        order = np.arange(len(said))
    data = Dataset.from_dict({"text": [said[i] for i in order], "label": [labels[i] for i in order]}).map(
        lambda b: tokenizer(b["text"], truncation=True, max_length=work.length), batched=True, remove_columns=["text"]
    )
    times: list[float] = []
    losses: list[float] = []

    class Same(transformers.Trainer):
        """The rows as they stand, and every loss."""

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return super()._get_train_sampler(*arguments) if options.get("group") else torch.utils.data.SequentialSampler(data)

        def training_step(self, *arguments: Any, **more: Any) -> Any:
            loss = super().training_step(*arguments, **more)
            losses.append(float(loss))
            return loss

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            times.append(time.time())

    more = {"train_sampling_strategy": "group_by_length"} if options.get("group") else {}
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, max_steps=steps,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.01, seed=SEED, report_to=[], save_strategy="no",
        disable_tqdm=True, bf16=bool(options.get("bf16")), bf16_full_eval=False, use_cpu=not torch.cuda.is_available(), **more,
    )  # fmt: skip
    run = Same(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer), callbacks=[Clock()],
    )  # fmt: skip
    if work.predict:
        run.predict(data.select(range(256)))
        start = time.time()
        made = run.predict(data).predictions
        return {"times": [start, time.time()], "logits": np.asarray(made, dtype=np.float64).tolist()}
    run.train()
    return {"times": times, "losses": losses}


def lightning(out: Path, work: Work, steps: int, base: str) -> dict[str, Any]:
    """Lightning's Trainer around the same model and collator."""
    import lightning as pl
    import numpy as np
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out / base)
    said, labels = texts(work)
    order = np.random.Generator(np.random.PCG64([SEED, 0])).permutation(len(said))
    rows = [{**tokenizer(said[i], truncation=True, max_length=work.length), "labels": labels[i]} for i in order[: steps * BATCH]]
    times: list[float] = []
    losses: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModelForSequenceClassification.from_pretrained(out / base)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch).loss
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.01)

        def on_train_batch_end(self, *arguments: Any) -> None:
            times.append(time.time())

    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, collate_fn=transformers.DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
    pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, accelerator="cpu",
    ).fit(Module().train(), loader)  # fmt: skip
    return {"times": times, "losses": losses}


# -- one process ------------------------------------------------------------------------------------------------------


def child(out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    work, steps, base = Work(**spec["work"]), spec["steps"], spec["base"]
    if spec["side"] == "engine":
        found = engine(out, work, spec["options"], steps, base)
    elif spec["options"].get("lightning"):
        found = lightning(out, work, steps, base)
    else:
        found = trainer(out, work, spec["options"], steps, base)
    times = found.pop("times")
    rows = work.rows if work.predict else (len(times) - 1) * BATCH
    found |= {"rate": rows / (times[-1] - times[0]), "start": times[0] - float(os.environ["BENCH_BORN"])}
    return {**found, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measured(out: Path, work: Work, side: str, options: Any, base: str = "base", steps: int | None = None) -> dict[str, Any]:
    """`child` in a process of its own."""
    spec = {"work": work.__dict__, "side": side, "options": options, "base": base, "steps": steps or work.steps}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--out", str(out), "--child", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**env, "BENCH_BORN": str(time.time())})
    if done.returncode:
        raise SystemExit(f"{spec}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- all of them ------------------------------------------------------------------------------------------------------


def sides(cases: list[Case]) -> Iterator[tuple[Work, str, Any]]:
    """What must be measured for these cases, each once."""
    seen = set()
    for case in cases:
        for side, options in (("engine", case.ours), ("rival", case.theirs)):
            key = json.dumps([case.work.__dict__, side, options])
            if key not in seen:
                seen.add(key)
                yield case.work, side, options


def apart(out: Path, case: Case) -> float:
    """The largest difference of losses over 40 steps with dropout 0 from the same weights; of logits in prediction."""
    import numpy as np

    if case.work.predict:
        logits = [np.array(measured(out, case.work, s, o)["logits"]) for s, o in (("engine", case.ours), ("rival", case.theirs))]
        return float(np.abs(logits[0] - logits[1]).max())
    theirs, ours = case.beside if "bf16" in case.theirs else case.theirs, case.ours
    if case.theirs.get("peft"):  # both begin with the adapter that peft drew
        folder = str(out / "drawn")
        theirs, ours = {**theirs, "save": folder}, [f"tune={{start: {folder}}}" if o == LORA else o for o in ours]
    rival = measured(out, case.work, "rival", theirs, "still", STILL_STEPS)["losses"]
    own = measured(out, case.work, "engine", ours, "still", STILL_STEPS)["losses"]
    return max(abs(a - b) for a, b in zip(own, rival, strict=True))


def run(out: Path, cases: list[Case], rounds: int) -> None:
    """Interleaved rounds, then equal results; everything goes into bench.json."""
    prepare(out)
    most = ceiling()
    print(f"ceiling: {', '.join(f'{kind} {rate:.0f} GFLOP/s' for kind, rate in most.items())}", flush=True)
    (out / "ceiling.json").write_text(json.dumps(most))
    found: dict[str, list[dict[str, Any]]] = {}
    for number, (work, side, options) in itertools.product(range(rounds), list(sides(cases))):
        one = measured(out, work, side, options)
        one.pop("logits", None)
        found.setdefault(json.dumps([work.__dict__, side, options]), []).append(one)
        told = f"{one['rate']:8.1f} examples/s  {one['memory']:6.0f} MiB  first step {one['start']:5.1f} s"
        print(f"round {number + 1}  {side:<6} {work.data:<5} {json.dumps(options):<60} {told}", flush=True)
    results = {}
    for case in cases:
        ours, theirs = (
            found[json.dumps([case.work.__dict__, side, options])]
            for side, options in (("engine", case.ours), ("rival", case.theirs))
        )
        ratios = [a["rate"] / b["rate"] for a, b in zip(ours, theirs, strict=True)]
        results[case.name] = {
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "goal": case.goal, "floor": case.floor,
            "ours": statistics.median(a["rate"] for a in ours), "theirs": statistics.median(b["rate"] for b in theirs),
            "memory": statistics.median(a["memory"] / b["memory"] for a, b in zip(ours, theirs, strict=True)),
            "start": statistics.median(a["start"] / b["start"] for a, b in zip(ours, theirs, strict=True)),
            "apart": None if case.equal is None else apart(out, case), "equal": case.equal,
        }  # fmt: skip
        if not case.work.predict and not any(word in case.name for word in ("lora", "frozen")):
            kinds = ["bfloat16" if "bf16" in str(o) or "bfloat16" in str(o) else "float32" for o in (case.ours, case.theirs)]
            a_row = statistics.median(one["tokens"] / (one["steps"] * BATCH) for one in ours)
            results[case.name]["share"] = [
                6 * WEIGHTS * a_row * results[case.name][side] / most[kind] / 1e9
                for side, kind in zip(("ours", "theirs"), kinds, strict=True)
            ]
        print(f"{case.name:<50} {json.dumps(results[case.name])}", flush=True)
        before = json.loads((out / "bench.json").read_text()) if (out / "bench.json").exists() else {}
        (out / "bench.json").write_text(json.dumps(before | results, indent=1) + "\n")


def table(out: Path) -> None:
    """Markdown for the README."""
    most = json.loads((out / "ceiling.json").read_text())
    print("Ceiling: " + ", ".join(f"{kind} {rate:.0f}" for kind, rate in most.items()) + " GFLOP/s\n")
    print(
        "| same work, same batches | ratio | spread | goal / floor | memory | first step | share of the ceiling | equal results |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, r in json.loads((out / "bench.json").read_text()).items():
        equal = "" if r["apart"] is None else f"{r['apart']:.1e} apart (at most {r['equal']:.0e})"
        spread = f"{r['low']:.2f} to {r['high']:.2f}"
        cells = [
            f"**{r['ratio']:.2f}**",
            spread,
            f"{r['goal']:g} / {r['floor']:g}",
            f"{r['memory']:.2f}",
            f"{r['start']:.2f}",
            " / ".join(f"{share:.0%}" for share in r.get("share", [])),
            equal,
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", help="only the cases that begin with one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--out", default="runs/bench")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    if not (SHARED / "sst2").exists():
        print(f"skipped: {SHARED / 'sst2'} is not here")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(json.dumps(child(out, json.loads(options.child))))
    elif options.table:
        table(out)
    elif options.profile:
        prepare(out)
        profile(out)
    else:
        wanted = [c for c in CASES if not options.cases or any(c.name.startswith(w) for w in options.cases)]
        if importlib.util.find_spec("lightning") is None:
            wanted = [c for c in wanted if not c.theirs.get("lightning")]
            print("lightning is not installed: its line is left out")
        run(out, wanted, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
