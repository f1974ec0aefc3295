"""Before a run: `check` says what would happen and what looks wrong, `layers` shows the model and what trains in it."""

import collections
import math

import torch

from engine import freeze, optim, prepare, runs, seeds
from engine.data.windows import describe_plan
from engine.fast import working
from engine.layers.quantized import QuantizedLinear
from engine.prepare import tell
from engine.recipe import Recipe, shown


def check(recipe: Recipe) -> None:
    """Prepare everything as a run would, then one real forward and backward pass on the first window."""
    ready = prepare.prepare(recipe, say=lambda line: None)
    plan = describe_plan(ready.windows, recipe.train.epochs, recipe.train.max_steps)
    tell(f"recipe  {shown(recipe.path)}: {recipe.task}, seed {recipe.seed}\n")
    tell("data")
    for name, fact in ready.facts.items():
        tokens = fact["tokens"]
        labels = ready.task.summary(fact)
        tell(
            f"  {name:<11} {fact['rows_read']:,} rows read = {fact['rows_used']:,} used + {sum(fact['dropped'].values()):,} dropped; {labels}"
        )
        leaks = "".join(f"; {n} {key.replace('_', ' ')}" for key, n in fact.items() if key.startswith("also_in_") and n)
        lengths = (
            f"tokens: mean {tokens['mean']}, longest {tokens['longest']}, {tokens['truncated']} cut at {recipe.data.max_length}"
        )
        tell(f"  {'':<11} {fact['duplicates']} duplicates{leaks}; {lengths}")
    tell("\nmodel")
    loaded = ready.loaded
    place = f": {loaded.source.folder}" if recipe.model.name else f", seed {recipe.seed}"
    tell(f"  {recipe.model.label} ({loaded.source.origin}{place})")
    tell(f"  fresh: {', '.join(loaded.fresh) or 'nothing'}")
    for line in prepare.summed(ready.swapped):
        tell(f"  swap: {line}")
    tell(f"  {ready.coverage}")
    tell("\ntraining")
    t = recipe.train
    lean = working.Working(loaded.model, t, ready.encoded, loaded.tokenizer, ready.windows.tokens)
    lean.prove(loaded.model, ready.probe(), f"{recipe.where('train.weights')}: train.weights={t.weights}")
    padding = "" if ready.windows.packed else f"; padding adds {plan['padded_tokens'] / plan['real_tokens'] - 1:.0%}"
    windows = f"{plan['windows_per_epoch']} windows x {t.epochs} epochs = {plan['steps']:,} steps"
    tell(f"  {plan['examples']:,} examples / batch {t.batch_size} = {windows}")
    parts = f"{plan['micro_batches_per_window']} micro-batches of at most {ready.windows.tokens:,} tokens"
    tell(f"  a window is about {parts}{padding}; {ready.packed}")
    if mixed := ready.windows.said():
        tell(f"  {mixed}")
    rise = math.ceil(t.warmup * plan["steps"]) if t.warmup < 1 else int(t.warmup)
    if cached := prepare.cache_frozen(ready, runs.code_sha256(recipe))[1]:
        tell(f"  {cached}")
    tell(f"  AdamW, learning rate {t.learning_rate:g} after {rise} steps of warm-up, then {t.schedule}")
    tell(f"  {ready.precision} on {ready.device}, clip {t.clip}, weight decay {t.weight_decay}")
    for piece in lean.said.values():
        tell(f"  {piece}")
    tell(f"  memory: about {_memory(loaded.model) / 2**20:,.0f} MiB for weights, gradients and AdamW, activations on top")
    problems = _probe(ready)
    lean.restore()
    notes = ready.notes + problems
    if (peak := t.learning_rate * max(ready.rates.values(), default=1.0)) >= 1:
        notes.append(f"the learning rate reaches {peak:g}: AdamW moves every weight by about that much a step; 1e-5 to 1e-2 is usual")
    tell("\n" + ("\n".join(f"note: {n}" for n in notes) if notes else "nothing looks wrong"))


def _memory(model: torch.nn.Module) -> int:
    """Bytes of parameters, buffers and float32 masters, and of gradient and two averages for what trains."""
    trained = {p: freeze.moved(p).nbytes for p in model.parameters() if p.requires_grad}
    masters = sum(size for p, size in trained.items() if freeze.moved(p) is not p)
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + masters + 3 * sum(trained.values())


def _probe(ready: prepare.Prepared) -> list[str]:
    """One real window (of several tasks one each): a finite loss, and a gradient for everything that trains."""
    model, problems = ready.loaded.model, []
    model.train()
    autocast = optim.autocast(ready.precision, ready.device)
    with seeds.untouched():
        for window, (name, task, _) in zip(ready.windows.unlike(), ready.task.heads(model), strict=True):
            total = 0.0
            for i, batch in enumerate(window.micro_batches):
                seeds.seed_all(ready.recipe.seed, 0, i)
                with autocast():
                    loss = ready.task.loss(model, {k: v.to(ready.device) for k, v in batch.items()}) / window.items
                loss.backward()
                total += float(loss.detach())
            chance, of = task.chance(), f"{name}: " if name else ""
            tell(f"  {of}first window: loss {total:.4f}" + (f" (chance: {chance:.4f})" if chance is not None else ""))
            if not math.isfinite(total):
                problems.append(f"{of}the loss of the first window is {total}")
    without = [n for n, p in model.named_parameters() if p.requires_grad and freeze.moved(p).grad is None]
    model.zero_grad(set_to_none=True)
    if without:
        problems.append(f"{len(without)} parameters train but get no gradient: {', '.join(without[:3])}")
    return problems


def layers(recipe: Recipe) -> None:
    """A table: path, class, shape, parameters, what trains, and what `swap` or the tuning method put there."""
    ready = prepare.prepare(recipe, say=lambda line: None)
    model, own = ready.loaded.model, set(ready.own)
    lines: list[tuple[str, ...]] = []
    for path, module in model.named_modules():
        held = [(name, tuple(p.shape), _state(p)) for name, p in module.named_parameters(recurse=False)]
        if isinstance(module, QuantizedLinear):
            held.insert(0, (f"weight as {module.quantize} ", (module.out_features, module.in_features), "frozen"))
        if not held:
            continue
        shape = "  ".join(f"{name}{size}" for name, size, _ in held)
        states = {state for *_, state in held}
        trains = states.pop() if len(states) == 1 else "partly"
        by = recipe.tune.method if any(f"{path}.{name}" in own for name, *_ in held) else _put_by_swap(path, ready)
        lines.append((path or "(root)", type(module).__name__, shape, f"{sum(math.prod(s) for _, s, _ in held):,}", trains, by))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    for line in lines:
        cells = [f"{cell:>{w}}" if i == 3 else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        tell("  ".join(cells).rstrip())
    counts = collections.Counter(line[4] for line in lines)
    tell(f"\n{len(lines)} modules with parameters: {', '.join(f'{n} {what}' for what, n in counts.items())}\n{ready.coverage}")


def _state(parameter: torch.nn.Parameter) -> str:
    step = getattr(parameter, "thaws", 0)
    return f"from step {step}" if step else "trains" if parameter.requires_grad else "frozen"


def _put_by_swap(path: str, ready: prepare.Prepared) -> str:
    return "swap" if any(path == s.path or path.startswith(s.path + ".") for s in ready.swapped) else ""
