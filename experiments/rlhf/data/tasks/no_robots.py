"""Conversations: No Robots and its like under the template of the published runs, and (task `chat`) any under the
tokenizer's own."""
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.rlhf.data.tasks import rows as rows_lib
from experiments.rlhf.data.tasks.rows import read, word_counts
from experiments.rlhf.data.tasks.task import Prompt, Task, Tokenize
from experiments.runtime import checks
from rlhf_jax.tasks import conversations, no_robots

OPTIONS: dict[str, Any] = dict(
    template='tulu',  # tulu | llama3 | tokenizer: its own chat template
    eos='',  # special token that ends an answer in tulu; '': the tokenizer's EOS
    answers='last',  # train on the last answer of a conversation | every: on all of the assistant's
    date='',  # YYYY-MM-DD, for chat templates that write today's
)


def template_of(options: Mapping[str, Any], encode: Tokenize | None) -> conversations.Template:
    """The chat template that options name.

    Raises:
        ValueError: an unknown one, or one that the tokenizer does not have.
    """
    return conversations.Template(options['template'], getattr(encode, 'tokenizer', None), options['eos'],
                                  options['date'])


def make(options: dict[str, Any], encode: Tokenize | None) -> Task:
    checks.choice('data.options.answers', options['answers'], ('last', 'every'))
    template = template_of(options, encode)
    if template.tokenizer is None:  # to look at: plain texts
        text = lambda messages: str(template(messages, generate=True))
        turns = lambda messages: (text(messages[:-1]), messages[-1]['content'])
    else:
        text = lambda messages: template(messages, generate=True)
        turns = lambda messages: tuple(template.turns(messages))

    def messages_of(row, field='messages'):
        messages = row[field]
        if not isinstance(messages, (list, tuple)) or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError(f'{field}: must be a list of objects with role and content')
        return list(messages)

    def demonstration(row):
        messages = messages_of(row)
        if options['answers'] == 'every':
            return tuple(template.turns(messages, every=True))
        no_robots.split({'messages': messages})
        return turns(messages)

    def prompt(row):
        messages, answer = conversations.prompt_and_reference(messages_of(row))
        others = {name: value for name, value in row.items() if name != 'messages'}
        return Prompt(text(messages), ({} if answer is None else {'reference': answer}) | others)

    def pair(row):
        """Answers as texts after `messages`, or as whole conversations that differ in their last turn."""
        if isinstance(row['chosen'], str):
            asked = messages_of(row)
            answers = row['chosen'], rows_lib.text(row, 'rejected')
        else:
            (asked, chosen), (others, rejected) = (no_robots.split({'messages': messages_of(row, field)})
                                                   for field in ('chosen', 'rejected'))
            if asked != others:
                raise ValueError('chosen and rejected answer different conversations')
            answers = chosen, rejected
        (given, chosen), (_, rejected) = (turns([*asked, {'role': 'assistant', 'content': answer}])
                                          for answer in answers)
        return given, chosen, rejected

    def metrics(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return word_counts(completions, [row['reference'] for row in rows if 'reference' in row])

    return Task(
        demonstrations=lambda data, split: read(data, split, demonstration, no_robots.FIELDS),
        preferences=lambda data, split: read(data, split, pair, ('chosen', 'rejected')),
        prompts=lambda data, split: read(data, split, prompt, no_robots.FIELDS),
        metrics=metrics)
