"""Tuning methods, one a file, found by name: `tune.method: lora` is lora.py.

A method offers `Options` (its keys beside `tune.method`) and `apply(model, options, head)`, which swaps and freezes and
returns the line that says so. It may offer `merge(model)`, `save(model, folder, options, head, base)` in the peft package's
layout, `rates(model, options)` for learning rates of its own, `takes(options)` for positions that it takes from the text,
and STAYS = True if its layers stay in the saved model.
"""
