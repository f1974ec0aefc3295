"""Tasks, one a file, found by name: `task: classification` is classification.py, whose class Task says what is asked."""
