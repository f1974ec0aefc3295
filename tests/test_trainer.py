"""Without accumulation, transformers' Trainer and the loop are the same mathematics: the weights agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe

from engine import finetune, prepare


def test_trainers_weights_are_ours(recipe: MakeRecipe, still_bert: Path) -> None:
    """The same rows in the same order, AdamW, decay groups, linear schedule and clipping; no dropout, and no warm-up (Trainer's begins at 0, ours does not)."""
    pytest.importorskip("accelerate", reason="Trainer needs it; it is a rival to compare with, not a dependency")
    import transformers
    from torch.utils.data import SequentialSampler

    made = recipe(
        "train.batch_size=8", "train.epochs=1", "train.learning_rate=1e-3", "train.weight_decay=0.1", "train.warmup=0",
        "train.packing=false", "train.micro_batch_tokens=40", "data.validation=null", "early_stopping=null", model=still_bert,
    )  # fmt: skip
    ready = prepare.prepare(made, say=lambda line: None)
    start = {n: p.detach().clone() for n, p in ready.loaded.model.named_parameters()}
    encoded = ready.encoded["train"]
    order = ready.windows.order(0)
    rows = [{k: v[0] for k, v in encoded.batch(order[i : i + 1]).items() if k != "truncated"} for i in range(len(order))]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir="trainer", per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-3, weight_decay=0.1, warmup_steps=0,
        lr_scheduler_type="linear", max_grad_norm=1.0, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    collate = transformers.DataCollatorWithPadding(ready.loaded.tokenizer)
    trainer = InOrder(model=ready.loaded.model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    theirs = {n: p.detach() for n, p in ready.loaded.model.named_parameters()}
    finetune.finetune(made, "r", say=lambda line: None)
    ours = dict(transformers.AutoModelForSequenceClassification.from_pretrained("r/model").named_parameters())
    names = [
        n for n in ours if not n.endswith("key.bias")
    ]  # softmax does not see it: its gradient is rounding, which Adam blows up
    for name in names:
        assert (ours[name] - theirs[name]).norm() <= 1e-2 * (ours[name] - start[name]).norm(), name
    apart = torch.cat([(ours[n] - theirs[n]).flatten() for n in names]).norm()
    moved = torch.cat([(ours[n] - start[n]).flatten() for n in names]).norm()
    assert moved > 0.1
    assert apart < 1e-3 * moved
