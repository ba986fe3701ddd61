"""StackExchange: questions with answers in the order of their votes."""
from typing import Any

from experiments.rlhf.data.tasks.rows import read, text, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from rlhf_jax.tasks import stackexchange

OPTIONS: dict[str, Any] = {}


def make(options: dict[str, Any], _: Tokenize | None) -> Task:
    ask = lambda row: stackexchange.prompt(text(row, 'question'))

    def prompt(row):
        reference = {'reference': text(row, 'response_j')} if row.get('response_j') else {}
        return Prompt(ask(row), dict(row) | reference)

    return Task(
        demonstrations=lambda data, split: read(data, split, lambda row: (ask(row), text(row, 'response_j'))),
        preferences=lambda data, split: read(
            data, split, lambda row: (ask(row), text(row, 'response_j'), text(row, 'response_k'))),
        prompts=lambda data, split: read(data, split, prompt, ('question',)),
        metrics=lambda completions, rows: word_counts(completions, [r['reference'] for r in rows if 'reference' in r]))
