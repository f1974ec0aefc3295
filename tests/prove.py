"""`make prove`: the exactness laws, run now, as a table that can be quoted.

Each line is a claim and the tests that hold it; "holds" means that every one of them passed in this call.
"""

import contextlib
import io
import sys
import time
from typing import Any

import pytest

CLAIMS: dict[str, tuple[str, list[str]]] = {
    "accumulation = one big batch": (
        "every task: gradients of uneven micro-batches and of a short last window against plain autograd on the whole batch, 1e-6",
        [
            "test_tasks.py::test_every_task_has_a_small_data_set",
            "test_tasks.py::test_accumulation_is_one_big_batch",
            "test_loop.py::test_accumulated_gradients_equal_one_batch_and_plain_autograd",
            "test_loop.py::test_a_mean_of_means_would_have_failed",
        ],
    ),
    "packed rows = padded rows": (
        "outputs and gradients to 1e-5, every architecture that packs and every head of it",
        ["test_packing_all.py::test_packed_rows_give_every_head_the_same_outputs_and_gradients"],
    ),
    "last layer where the head reads = whole": (
        "outputs and gradients to 1e-5, every encoder, packed and not, with every method",
        [
            "test_packing_all.py::test_the_last_layer_at_read_positions_changes_no_output_and_no_gradient",
            "test_packing_all.py::test_methods_and_pieces_together_compute_the_same",
        ],
    ),
    "every pair of the pieces of speed = the plain loop": (
        "losses of training to 1e-5: packing, last layer, windows ahead, kernels, vocabulary, frozen cache",
        ["test_packing_all.py::test_any_pieces_together_train_as_the_plain_loop"],
    ),
    "resume = never stopped": (
        "bit-equal weights, optimizer, metrics and log after a stop at every step: full, LoRA, unfreezing (accumulating, bfloat16), PiSSA, QLoRA",
        ["test_loop.py::test_resumed_at_any_step_equals_never_stopped", "test_resume.py"],
    ),
    "kill = never stopped": (
        "byte-equal weights, optimizer, metrics and log after 1 to 3 real SIGKILLs",
        ["test_kills.py::test_killed_anywhere_ends_as_never_killed"],
    ),
    "a signal = never stopped": (
        "SIGINT, SIGTERM in training, evaluation, saving; a second one within C code",
        [
            "test_kills.py::test_a_signal_anywhere_saves_ends_and_goes_on_identically",
            "test_kills.py::test_signals_that_come_together_are_one_request",
            "test_kills.py::test_a_second_signal_ends_at_once_within_c_code_with_the_last_checkpoint_good",
        ],
    ),
    "no power loss loses a save": (
        "every crash point, every legal state of unsynced files",
        ["test_storage.py::test_a_power_loss_at_any_moment_loses_no_save_and_loads_nothing_corrupt"],
    ),
    "no damage goes unnoticed": (
        "1,000 flips, truncations, deletions",
        ["test_storage.py::test_a_thousand_damages_are_all_detected_and_the_next_older_one_is_used"],
    ),
    "a disk that refuses = never refused": (
        "EIO and ENOSPC at a sample of storage operations, byte-equal after going on",
        ["test_kills.py::test_a_refusing_disk_is_an_error_that_says_all_and_costs_nothing"],
    ),
    "eight mutants are caught": (
        "no file sync, no directory sync, manifest first, no hash check, log not cut, seeds not keyed, order not pure, lr not restored",
        ["test_mutants.py"],
    ),
    "windows made ahead = made at once": (
        "by another thread, the same tensors in the same order",
        ["test_packing_all.py::test_windows_made_ahead_are_the_windows"],
    ),
    "2 ranks = 1": ("gradients, weights, evaluation", ["test_ranks.py"]),
    "every method: init = base, merge = unmerged, reload = memory, base bit-equal": (
        "ten laws, every method, nine architectures",
        ["test_tune.py::test_laws"],
    ),
    "adapters = peft's": (
        "logits to 1e-5, both ways",
        ["test_exchange.py", "test_tune.py::test_the_saved_adapter_computes_the_same_in_peft"],
    ),
    "the best weights are returned": (
        "those of the best evaluation, exactly",
        ["test_loop.py::test_the_best_weights_are_restored"],
    ),
    "Trainer's weights = ours": ("same rows, same order, without accumulation", ["test_trainer.py"]),
}


class Count:
    """Counts outcomes."""

    def __init__(self) -> None:
        self.passed, self.failed, self.skipped = 0, 0, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def main() -> int:
    """Run the claims that the arguments name by a part of their text, or all; 1 if any does not hold."""
    from pathlib import Path

    here, wanted, broken = Path(__file__).parent, sys.argv[1:], 0
    print("| claim | how | checks | result |\n|---|---|---|---|", flush=True)
    for claim, (how, tests) in CLAIMS.items():
        if wanted and not any(word in claim for word in wanted):
            continue
        count, start = Count(), time.perf_counter()
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            code = pytest.main(["-q", "-x", *[str(here / t) for t in tests]], plugins=[count])
        holds = code == 0 and count.passed > 0 and not count.failed
        broken += not holds
        skipped = f", {count.skipped} skipped" if count.skipped else ""
        result = "holds" if holds else "DOES NOT HOLD"
        print(f"| {claim} | {how} | {count.passed}{skipped} | {result} ({time.perf_counter() - start:.0f} s) |", flush=True)
        if not holds:
            print(told.getvalue()[-3000:], file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
