"""The comparison with Trainer says no more than it measured, and both of its sides read the same recipe."""

from pathlib import Path

import bench_tasks
import pytest

from engine import find, recipe


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (0.90, 0.80, "better"),
        (0.90, 0.89, "equal within the interval"),
        (0.90, 0.91, "equal within the interval"),
        (0.90, 0.95, "WORSE"),
    ],
)
def test_a_difference_counts_only_outside_the_interval(mine: float, theirs: float, said: str) -> None:
    assert bench_tasks.verdict(mine, theirs, 0.88, 0.92) == said


@pytest.mark.parametrize("name", bench_tasks.JOBS)
def test_every_row_is_a_valid_recipe_of_its_own_numbers(name: str, tmp_path: Path) -> None:
    job = bench_tasks.JOBS[name]
    (tmp_path / "r.yaml").write_text(bench_tasks.recipe_of(job, tmp_path), "utf-8")
    made = recipe.load(str(tmp_path / "r.yaml"))
    t = made.train
    assert (made.task, t.epochs, t.batch_size, t.learning_rate) == (job.task, job.epochs, job.batch, job.rate)
    assert made.data.max_length == job.length
    assert job.metric in find.module("tasks", job.task, name).Task.metrics


def test_pretraining_reads_texts_of_train_alone_and_the_row_begins_from_it(tmp_path: Path) -> None:
    jobs = {name: job for name, job in bench_tasks.JOBS.items() if job.pretrain}
    assert jobs
    for job in jobs.values():
        (tmp_path / "p.yaml").write_text(bench_tasks.pretraining_of(job, tmp_path), "utf-8")
        (tmp_path / "r.yaml").write_text(bench_tasks.recipe_of(job, tmp_path), "utf-8")
        first, then = recipe.load(str(tmp_path / "p.yaml")), recipe.load(str(tmp_path / "r.yaml"))
        assert (first.task, first.train.epochs, first.data.test) == ("masked_lm", job.pretrain, None)
        assert first.data.train == then.data.train == [f"{tmp_path}/train.jsonl"]
        assert not isinstance(first.data.validation, list)  # a share of train: no row that is scored later
        assert then.model.name == f"{tmp_path}/{bench_tasks.PRETRAINED}"
        assert first.model.from_scratch is not None


def test_several_tasks_are_those_of_the_single_rows(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(bench_tasks.multitask_recipe(tmp_path), "utf-8")
    made = recipe.load(str(tmp_path / "r.yaml"))
    assert set(made.tasks) == set(bench_tasks.SHARING) <= set(bench_tasks.JOBS)


def test_the_table_tells_what_was_measured() -> None:
    row = {"task": "classification", "metric": "accuracy", "train": 100, "dev": 10, "epochs": 2, "majority": 0.6, "engine": 0.9, "interval": [0.85, 0.95],
           "trainer": 0.8, "seconds": {"engine": 10.0, "trainer": 20.0}, "first": "engine", "ratio": 2.0, "verdict": "better"}  # fmt: skip
    told = bench_tasks.markdown({"waimai_10k": row})
    assert (
        "| waimai_10k | classification | 100 x 2 | accuracy | 0.900 | 0.850 to 0.950 | 0.800 | better | 10 | 20 | 2.00 |" in told
    )
    assert "30.0 points" in told
