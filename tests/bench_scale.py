"""How the cost grows: seconds per real token against rows, length, layers and vocabulary; memory against rows.

    make bench-scale        some five minutes on two cores; needs ../shared/data/sst2 for the rows

One thing is changed at a time. Rows are SST-2's. Lengths, layers and vocabularies are those of small random BERTs on random
words, since no real text has exactly 512 tokens. Each measurement is a process of its own: the loop's own steps, the first
five left out, and the process's largest resident size.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SST2 = ROOT.parent / "shared" / "data" / "sst2"
OUT = ROOT / "runs" / "bench-scale"
BASE = {"rows": 4000, "length": 64, "layers": 4, "vocabulary": 4000}
GROWS: dict[str, list[int]] = {
    "rows": [1000, 4000, 16000, 67000],
    "layers": [1, 2, 4, 8, 16],
    "vocabulary": [1000, 4000, 16000, 64000],
    "length": [32, 64, 128, 256, 512],
}
STEPS, WARM = 45, 5


def child(what: str, size: int) -> dict[str, Any]:
    """One measurement: seconds a real token, and MiB."""
    from engine.finetune import finetune
    from engine.recipe import load

    sizes = {**BASE, what: size}
    folder = OUT / f"{what}-{size}-{os.getpid()}"
    folder.mkdir(parents=True)
    if what == "rows":
        source, limit, model = str(SST2 / "train.tsv"), sizes["rows"], "{name: sentence-transformers/all-MiniLM-L6-v2}"
        columns = "{text: sentence}"
    else:
        made, draw = folder / "rows.jsonl", random.Random(0)
        words = [f"w{i}" for i in range(sizes["vocabulary"] - 10)]
        with made.open("w") as file:
            for i in range(BATCHES := 32 * (STEPS + 1)):
                text = " ".join(draw.choices(words, k=sizes["length"] - 2))
                file.write(json.dumps({"text": text, "label": ["no", "yes"][i % 2]}) + "\n")
        source, limit, columns = str(made), BATCHES, "{text: text}"
        model = f"{{name: {_tiny(folder / 'model', words, sizes)}}}"
    (folder / "r.yaml").write_text(f"""task: classification
model: {model}
data: {{train: {source}, train_limit: {limit}, columns: {columns}, max_length: {sizes["length"]}, cache: {OUT / "cache"}}}
train: {{max_steps: {STEPS}, epochs: 99, batch_size: 32}}
checkpoint: {{every: 1000000}}
evaluate: {{every: 1000000}}
""")
    finetune(load(str(folder / "r.yaml"), [f"data.cache={OUT / 'cache'}"]), str(folder / "run"), say=lambda line: None)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    steps = [r for r in log if r["event"] == "step"]
    tokens = sum(r["tokens"] for r in steps[WARM:])
    seconds = (steps[-1]["time"] - steps[WARM - 1]["time"]) / tokens
    return {"microseconds_per_token": 1e6 * seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _tiny(folder: Path, words: list[str], sizes: dict[str, int]) -> Path:
    """A random BERT of width 256 and its word tokenizer."""
    import tokenizers
    import torch
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = tokenizers.processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words) + len(special), hidden_size=256, num_hidden_layers=sizes["layers"], num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=512, num_labels=2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def main() -> int:
    """See the module's docstring."""
    if len(sys.argv) == 3:
        print(json.dumps(child(sys.argv[1], int(sys.argv[2]))))
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, Any]] = {}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print("| grows | to | microseconds a token | of the smallest | MiB |\n|---|---|---|---|---|")
    for what, sizes in GROWS.items():
        if what == "rows" and not SST2.exists():
            print(f"| rows | | skipped: {SST2} is not here | | |")
            continue
        for size in sizes:
            start = time.perf_counter()
            command = [sys.executable, __file__, what, str(size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
            one = {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - start}
            found.setdefault(what, {})[size] = one
            ratio = one["microseconds_per_token"] / found[what][sizes[0]]["microseconds_per_token"]
            print(f"| {what} | {size:,} | {one['microseconds_per_token']:.1f} | {ratio:.2f} | {one['memory']:.0f} |", flush=True)
            (OUT / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
