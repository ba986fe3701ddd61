"""Arithmetic, made up on the spot: a rule for a reward, and a gold reward (`arithmetic_gold`)."""
import dataclasses
from typing import Any

import numpy as np

from experiments.rlhf.data.tasks import arithmetic_gold as gold
from experiments.rlhf.data.tasks.rows import parse_split, place
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from rlhf_jax.tasks import arithmetic

OPTIONS: dict[str, Any] = dict(num_steps=2, max_number=20, operations='+-', words=True, seed=0, num_heldout=512,
                               faults=0.0)


def make(options: dict[str, Any], _: Tokenize | None) -> Task:
    settings = {name: options[name] for name in ('num_steps', 'max_number', 'operations', 'words')}

    def problems(data, split):
        if data['path']:
            raise ValueError(f'data.path={data["path"]}: arithmetic problems are made up; leave it empty')
        name, low, high = parse_split(split)
        if name == 'train':
            made = arithmetic.problems(options['seed'], data['num_rows'] or 10_000, **settings)
        elif name in ('validation', 'test'):
            num = options['num_heldout']
            made = arithmetic.problems(options['seed'], 2 * num, held_out=True, **settings)
            made = made[:num] if name == 'validation' else made[num:]
        else:
            raise ValueError(f"data: split {split!r} of arithmetic is not one of 'train', 'validation', 'test'")
        return made[place(low, len(made), 0):place(high, len(made), len(made))]

    def exact(completions, rows):
        return arithmetic.exact_match(completions, [row['answer'] for row in rows])

    def metrics(completions, rows):
        answered = np.mean([arithmetic.extract_answer(c) is not None for c in completions])
        return {'accuracy': float(exact(completions, rows).mean()), 'answered': float(answered),
                'gold': float(gold.reward(completions, rows).mean()),
                'characters': float(np.mean([len(c) for c in completions]))}

    return Task(
        demonstrations=lambda data, split: [(p.prompt, gold.demonstration(p, i, options['seed'], options['faults']))
                                            for i, p in enumerate(problems(data, split))],
        preferences=lambda data, split: gold.pairs(problems(data, split), options['seed']),
        prompts=lambda data, split: [Prompt(p.prompt, dataclasses.asdict(p)) for p in problems(data, split)],
        reward=exact, gold=gold.reward, metrics=metrics)
