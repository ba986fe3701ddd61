"""GSM8K: word problems whose answer is a number."""
from typing import Any

import numpy as np

from experiments.rlhf.data.tasks.rows import read, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from rlhf_jax.tasks import gsm8k

OPTIONS: dict[str, Any] = dict(keep_annotations=False)


def make(options: dict[str, Any], _: Tokenize | None) -> Task:
    def prompt(row):
        return Prompt(gsm8k.prompt(row['question']), dict(row) | {'label': gsm8k.label(row)})

    def demonstration(row):
        gsm8k.label(row)
        return (gsm8k.prompt(row['question']),
                gsm8k.demonstration(row['answer'], keep_annotations=options['keep_annotations']))

    def exact(completions, rows):
        return gsm8k.exact_match(completions, [row['label'] for row in rows])

    def metrics(completions, rows):
        answered = np.mean([gsm8k.extract_answer(c) is not None for c in completions])
        return {'accuracy': float(exact(completions, rows).mean()), 'answered': float(answered),
                **word_counts(completions, [row['answer'] for row in rows])}

    return Task(demonstrations=lambda data, split: read(data, split, demonstration, gsm8k.FIELDS),
                prompts=lambda data, split: read(data, split, prompt, gsm8k.FIELDS), reward=exact, metrics=metrics)
