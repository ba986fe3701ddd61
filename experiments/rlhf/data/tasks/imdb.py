"""IMDB: film reviews to go on with."""
from typing import Any

from experiments.rlhf.data.tasks.rows import read, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from rlhf_jax.tasks import imdb

OPTIONS: dict[str, Any] = dict(
    held_out=0.2,
    stretch=0,  # words: demonstrations and pairs are of reviews cut into stretches of so many; 0: whole reviews
)


def make(options: dict[str, Any], _: Tokenize | None) -> Task:
    if options['stretch'] < 0:
        raise ValueError(f'data.options.stretch={options["stretch"]} must be at least 0 words')

    def of(data, split, make, fields=imdb.FIELDS):
        """'train' and 'validation' are parts of 'train' as the data set has it."""
        name, bracket, rest = split.partition('[')
        cut = None
        if name in ('train', 'validation'):
            part, name = ('train', 'validation').index(name), 'train'
            cut = lambda num: imdb.split(num, held_out=options['held_out'])[part]
        return read(data, name + bracket + rest, make, fields, cut=cut)

    def prompt(row):
        first, rest = imdb.halves(row['text'])
        if not first:
            raise ValueError(f'text: {row["text"][:40]!r} has no first half')
        return Prompt(first, dict(row) | {'reference': rest})

    def parts(reviews):
        return [part for text in reviews for part in imdb.stretches(text, options['stretch'])]

    def demonstrations(data, split):
        return [('', part) for part in parts(of(data, split, lambda row: row['text']))]

    def preferences(data, split):
        """Reviews, or stretches of them, a positive one before a negative one."""
        labelled = of(data, split, lambda row: (int(row['label']), row['text']), (*imdb.FIELDS, 'label'))
        good, bad = (parts(text for label, text in labelled if label == wanted) for wanted in (imdb.POSITIVE, 0))
        if not (good and bad):
            raise ValueError(f'data.path={data["path"]}: split {split!r} has {len(good)} positive reviews and '
                             f'{len(bad)} negative ones (label 1 and 0); pairs need both')
        return [('', a, b) for a, b in zip(good, bad)]

    def metrics(completions, rows):
        long_enough = any(len(c.split()) >= 3 for c in completions)
        return word_counts(completions) | (imdb.diversity(completions) if long_enough else {})

    return Task(demonstrations=demonstrations, preferences=preferences,
                prompts=lambda data, split: of(data, split, prompt), metrics=metrics, cut_prompts=True)
