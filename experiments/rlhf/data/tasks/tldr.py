"""TL;DR: summaries of Reddit posts, and preferences between them."""
from typing import Any

from experiments.rlhf.data.tasks.rows import read, text, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from rlhf_jax.tasks import tldr

OPTIONS: dict[str, Any] = dict(max_prompt=tldr.MAX_PROMPT)


def make(options: dict[str, Any], tokenize: Tokenize | None) -> Task:
    def query(row):
        for field in ('query', 'prompt'):  # of the prepared sets: summaries, and preferences
            if row.get(field) is not None:
                return text(row, field)
        row = {field: text(row, field) for field in tldr.FIELDS[:-1]}
        return tldr.truncated_query(row, tokenize, options['max_prompt']) if tokenize else tldr.query(**row)

    def reference(row):
        if row.get('reference_response') is not None:
            return text(row, 'reference_response').removesuffix(tldr.END)
        return ' ' + text(row, 'summary')

    def prompt(row):
        has = any(row.get(field) is not None for field in ('reference_response', 'summary'))
        return Prompt(query(row), dict(row) | ({'reference': reference(row)} if has else {}))

    def pair(row):
        return (query(row), *(text(row, field).removesuffix(tldr.END) for field in ('chosen', 'rejected')))

    return Task(
        demonstrations=lambda data, split: read(data, split, lambda row: (query(row).strip(), reference(row))),
        preferences=lambda data, split: read(data, split, pair),
        prompts=lambda data, split: read(data, split, prompt),
        metrics=lambda completions, rows: word_counts(completions, [r['reference'] for r in rows if 'reference' in r]))
