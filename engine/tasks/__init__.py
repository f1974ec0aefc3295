"""Tasks, one a file, found by name: `task: classification` is classification.py, whose class Task says what is asked.

Whatever differs between tasks is a value or a method of that class; no other file knows a task's name. Task derives from
Base (_base.py), which answers for those that need nothing special, or from TextTask (_text.py) where a text or a pair of
texts is the input. R rows are what the file holds, N examples are what the model sees: a long document may become
several examples (windows), and its scores are still those of one row. For most tasks N = R.

About the task
    roles             role -> "required" | "optional" | "target": what data.columns may map. self.columns is role -> column.
    many              roles that may name several columns; such a task spreads them over self.columns and self.needs itself
    auto_class        the AutoModel* of transformers that has the head, and that the saved model loads back with
    peft_type, pipeline_tag        peft's and transformers' words for the task
    metrics           name -> function(*arrays) -> float (engine/metrics.py has tables); default_metrics: the headline ones
    answer            the key of `predict`'s lines that holds the prediction: label, labels, value, entities, answer, text
    per_token         whether output is (B, T, K), to be trimmed to each example's T; else (B, ...)
    full_marks        what a perfect model scores by the first of default_metrics, 1 or 100
    parts             multitask's tasks by name; empty for all others
    padding           ragged column -> what fills it up (labels: -100, others: 0, unless said here)
    class Options(schema.Data)     of the module, where the task has keys of its own beside data.*; self.options holds them

Rows
    fit(rows, source)              learn what only train can tell: labels, scale. Bad targets are skipped here.
    adapt(rows)                    a file written otherwise than train's: read it so, and say it; or None
    problem(row, target=True)      (reason, detail) of what makes a row unusable, or None
    text_of(row), stratum(row), facts(rows), gold(row)     duplicates; fair splits; counts; the truth as predictions/ shows it
    group(row)                     rows of one group are never torn apart by a split (the questions on one context); None: alone

Tokens and model
    fingerprint()                  what of the task the tokens depend on
    encode(rows, tokenizer, max_length)    columns: a list a example = ragged, a number = scalar (N,), a tuple = fixed width (N, K).
                                   Several examples of a row: the scalar column "row" (index into `rows`) says whose each is.
    vary(tokenizer)                -> f(batch, its examples, (seed, epoch)) -> batch, or None: what changes each time that an example
                                   is seen (masked_lm hides other tokens), as a pure function of these; no place: evaluation.
    model_options()                passed to from_pretrained, kept in config.json
    items(batch)                   how many things the loss sums over; loss(model, batch): that SUM. The loop divides, once.
    forward(model, batch)          what the loss needs, float32; output(model, batch): what evaluation keeps, forward by default.
                                   Padding must not change it: a softmax over T looks at attention_mask.

Judgement
    judge(outputs, encoded, rows)  -> Judged: arrays (each (R, ...)) that the metrics take in order, losses and items (R,).
                                   outputs: (N, ...), or with per_token a list of N arrays (T, K).
    compute(names, judged, index)  each metric on all rows, or on the rows `index`: final scores and bootstrap alike
    calibrate(judged, aim)         choose by the validation split (a threshold, for the metric `aim`); True if something changed.
                                   Called at each evaluation of validation, so the kept choice is that of the best weights.
    predictions(outputs, encoded, rows)    one dict a ROW, with "prediction"; besides probabilities, value, entities, ...
    lines(outputs, judged, encoded, rows)  predictions/SPLIT.jsonl: each row with its truth, prediction and loss
    detail(judged)                 JSON for metrics.json
    sections(detail, lines), mistakes(lines)   class methods: blocks.Block to draw, from metrics.json and predictions/ alone

Kept with the model
    heads(model)                   (folder in model/, task, model) of each model that is saved
    finish(model)                  the last touch before it is saved (regression folds its scale into the head)
    state() / restore(config)      what config.json keeps as "task_state" beside the labels / the task again from config.json

The laws in tests/test_tasks.py run for every file here.
"""
