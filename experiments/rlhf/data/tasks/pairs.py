"""Any texts: the options name the fields."""
from typing import Any

from experiments.rlhf.data.tasks.rows import read, text, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize

OPTIONS: dict[str, Any] = dict(prompt='prompt', response='response', chosen='chosen', rejected='rejected')


def make(options: dict[str, Any], _: Tokenize | None) -> Task:
    def texts(row, *names):
        return tuple(text(row, options[name]) for name in names)

    def demonstration(row):
        return texts(row, 'prompt', 'response' if row.get(options['response']) is not None else 'chosen')

    return Task(
        demonstrations=lambda data, split: read(data, split, demonstration),
        preferences=lambda data, split: read(data, split, lambda row: texts(row, 'prompt', 'chosen', 'rejected')),
        prompts=lambda data, split: read(data, split, lambda row: Prompt(*texts(row, 'prompt'), dict(row))),
        metrics=lambda completions, rows: word_counts(completions))
