"""No Robots: conversations written by people."""
from typing import Any

from experiments.rlhf.data.tasks import rows as rows_lib
from experiments.rlhf.data.tasks.rows import read, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from rlhf_jax.tasks import no_robots

OPTIONS: dict[str, Any] = dict(eos=no_robots.END)


def make(options: dict[str, Any], _: Tokenize | None) -> Task:
    def text(messages):
        return no_robots.chat(messages, template='tulu', generate=True, eos=options['eos'])

    def demonstration(row):
        messages, answer = no_robots.split(row)
        return text(messages), answer

    def prompt(row):
        messages, answer = no_robots.split(row)
        return Prompt(text(messages), {'reference': answer} | {k: v for k, v in row.items() if k != 'messages'})

    def pair(row):
        """Answers as texts after `messages`, or as whole conversations that differ in their last turn."""
        if isinstance(row['chosen'], str):
            return text(row['messages']), row['chosen'], rows_lib.text(row, 'rejected')
        (messages, chosen), (others, rejected) = (no_robots.split({'messages': row[field]})
                                                  for field in ('chosen', 'rejected'))
        if messages != others:
            raise ValueError('chosen and rejected answer different conversations')
        return text(messages), chosen, rejected

    return Task(
        demonstrations=lambda data, split: read(data, split, demonstration, no_robots.FIELDS),
        preferences=lambda data, split: read(data, split, pair, ('chosen', 'rejected')),
        prompts=lambda data, split: read(data, split, prompt, no_robots.FIELDS),
        metrics=lambda completions, rows: word_counts(completions, [row['reference'] for row in rows]))
