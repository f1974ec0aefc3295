"""A small data set for each task: tests/cases/NAME.py for engine/tasks/NAME.py. tests/test_tasks.py holds the laws.

A case is a module with

    rows(count, seed)          generated rows with texts of uneven length
    RECIPE                     recipe overrides beside those of the base recipe, such as data.columns
    BAD                        name -> (row, words): a row that cannot be used, and what its message must say
    perfect(task, encoded, rows)      outputs, as evaluate.outputs gives them, that say exactly what is true
    FULL                       metric -> its value for perfect outputs
    reference(rows, lines)     metric -> value by scikit-learn (or the like), from the rows and the lines of predictions/ alone;
                               each line has the row's label, and the prediction, of random outputs
and, where they differ from what most tasks have,
    write(path, rows)          the file that holds the rows; default JSON lines
    ENDING                     of that file; default .jsonl
    BODIES                     the tiny models that the laws run on; default ("bert",)
"""
