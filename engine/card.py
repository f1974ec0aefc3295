"""The model card: README.md of the saved model, with the front matter that the hub reads."""

from typing import Any

from engine import yaml12
from engine.recipe import Recipe


def render(
    recipe: Recipe,
    results: dict[str, Any],
    facts: dict[str, Any],
    names: list[str],
    keeps_layers: bool,
    task: Any,
    part: str = "",
) -> str:
    """Markdown: what it is, how it was trained, how good it is, how to use it, what it is not for. `part`: the task's name, of several."""
    tag, whole, title = task.pipeline_tag, recipe, recipe.name
    if part:
        recipe, title = recipe.part(part), f"{recipe.name}: {part}"
        names = [name for name in names if name.startswith(part + ".")]
        facts = {split: fact["tasks"][part] for split, fact in facts.items()}
    front = ({"base_model": recipe.model.name} if recipe.model.name else {}) | {
        "library_name": "transformers", "pipeline_tag": tag,
        "tags": ["fine-tuned", recipe.task, recipe.tune.method],
    }  # fmt: skip
    lines = ["---", yaml12.dump(front).rstrip(), "---", "", f"# {title}", ""]
    began = f"`{recipe.model.name}`, fine-tuned" if recipe.model.name else f"A small {recipe.model.label} from scratch, trained"
    lines += [f"{began} for {recipe.task} with the method `{recipe.tune.method}`.", ""]
    if part:
        others = ", ".join(name for name in whole.tasks if name != part)
        lines += [f"Its encoder was trained together with that of {others or 'no other task'} (`task: multitask`).", ""]
    lines += ["| split | rows | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for split in ("validation", "test"):
        if split in results:
            cells = []
            for name in names:
                interval = results["intervals"].get(split, {}).get(name)
                cells.append(f"{results[split][name]:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""))
            lines.append(f"| {split} | {facts[split]['rows_used']:,} | {' | '.join(cells)} |")
    lines += ["", "Brackets: 95 % bootstrap interval over the rows of the split.", "", "## Use", "", "```python"]
    lines += [
        "from transformers import pipeline",
        "",
        f'answer = pipeline("{tag}", model=".")',
        'answer("...")',
        "```",
        "",
    ]
    code = getattr(recipe.tune, "quantize", None)
    if code:
        lines += [
            f"**Trained on a base in {code}.** This model is that base plus the update, as plain floats. The adapter in `adapter/`"
            f" was fitted to the same {code} codes: on the float base it gives slightly other results.",
            "",
        ]
    if keeps_layers:
        lines += [
            "**This model has layers of its own.** AutoModel alone would leave them out; use the run folder: `python -m engine predict RUN`.",
            "",
        ]
    lines += ["## Limits", "", f"Trained on {facts['train']['rows_used']:,} examples of up to {recipe.data.max_length} tokens;"]
    lines += ["longer texts are cut. The scores hold for texts like those it was tested on.", "", "## Recipe", "", "```yaml"]
    return "\n".join([*lines, yaml12.dump(whole.resolved()).rstrip(), "```", ""])
