"""Tuning methods, one a file, found by name: `tune.method: lora` is lora.py; `file.py:Class` is a class of yours.

A method offers `Options` (its keys beside `tune.method`) and `apply(model, options, head)`, which swaps and freezes and
returns the line that says so. It may offer

    merge(model)              fold what was learnt into plain weights, in place
    rates(model, options)     parameter name -> factor of the learning rate
    takes(options)            positions that it takes from the text
    STAYS = True              its layers stay in the saved model
    rebuild(model, options, head)   make its layers again when a run is opened, where `apply` reads files besides:
                              from what it noted in model.config
    PEFT_TYPE, peft(model, options) -> (config, tensors), from_peft(config, tensors) -> options, load_peft(model, options, tensors)
                              the peft package's name for it, and its layout out and in
"""
