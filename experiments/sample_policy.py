"""Samples responses of a language model.

    python -m experiments.sample --policy=RUN --prompt="3+4=" --num_samples=4 --temperature=0.7
    python -m experiments.sample --policy=HF_FOLDER --prompts=prompts.jsonl --max_new_tokens=256 --out=completions.jsonl
    python -m experiments.sample --policy=HF_FOLDER --chat --system="Be brief." --prompt="Who wrote Emma?"

RUN is the --workdir of an sft, dpo or policy run, HF_FOLDER weights with config.json and tokenizer.json. A row of
--prompts (.jsonl, .json, .parquet, also packed) is {"prompt": "..."}, or {"messages": [{"role": ..., "content": ...}]};
its other fields are kept. With --chat a prompt is what a user says, and is asked under the chat template that the run
was trained with, else under the tokenizer's own; messages always are. --out gets a line a response, with `completion`,
`ended` and `logprob`, its log-probability in nats where tokens were drawn (greedy: 0).
"""
import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.rlhf.data import tasks, texts
from experiments.rlhf.models import flags
from experiments.rlhf.models.inference import Part, Policy
from experiments.runtime import launch, lines, shards, storage
from experiments.runtime import steps as steps_lib
from experiments.runtime.curve import settings_of
from experiments.runtime.progress import bar
from rlhf_jax.chat import Text
from rlhf_jax.tasks import conversations
from rlhf_jax.tasks import rows as rows_lib


def main() -> None:
    p = flags.parser(__doc__)
    p.add_argument('--prompt', action='append', metavar='TEXT', help='may be repeated')
    p.add_argument('--prompts', metavar='FILE', help='.jsonl, or as the data of a run')
    p.add_argument('--chat', action='store_true', help='prompts are what a user says, under the chat template')
    p.add_argument('--system', metavar='TEXT', help='with --chat: what comes before the user')
    p.add_argument('--chat_date', default='', metavar='YYYY-MM-DD', help="for chat templates that write today's date")
    p.add_argument('--out', metavar='FILE', help='.jsonl (default: print them)')
    shards.add_flag(p)
    args, _ = launch.parse(p)
    flags.check(args)
    if shards.parse(args) and not args.out:
        raise ValueError(f'--shard={args.shard}: say with --out=FILE where the responses of all shards go')
    steps_lib.check(args.step, args.out)
    if args.step == 'all' and not args.out:
        raise ValueError(f'--step=all: say with --out=FILE, {steps_lib.PLACE} in its name, where the responses go')
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError('give either --prompt=TEXT or --prompts=FILE')
    if args.system and not args.chat:
        raise ValueError('--system: only with --chat')
    if args.out:
        storage.check_writable(storage.resolve(args.out).parent, '--out')
    rows = [{'prompt': text} for text in args.prompt] if args.prompt else read_prompts(args.prompts)
    launch.initialize(args)
    for step in steps_lib.wanted(args.step, args.policy, args.out):
        sample(args, rows, step)


def sample(args: argparse.Namespace, rows: list[dict[str, Any]], step: int | None) -> None:
    """Prints or writes responses of the policy at `step` (None: its newest checkpoint) to the prompts of `rows`."""
    policy = flags.load(args.policy, args, step=step)
    prompts = prompts_of(rows, policy, chat=args.chat, system=args.system, date=args.chat_date)
    texts.count_spelled(policy.encode, prompts, '--prompts' if args.prompts else '--prompt')
    ids = [policy.ids_of(prompt) for prompt in prompts]
    size = min(args.batch_size, len(rows))
    how, longest = flags.sampling(policy, args, policy.config), max(map(len, ids))
    policy.pad(ids, how.max_new_tokens)  # one that is too long is found before any is sampled

    def respond(some: range) -> list[dict[str, Any]]:
        part = slice(some.start, some.stop)
        return flags.response_lines(rows[part], policy.sample(
            ids[part], how, jax.random.key(args.seed), batch_size=size, num_samples=args.num_samples,
            part=Part(some.start, longest)))
    if not args.out:
        for start in range(0, len(rows), size):
            for line in respond(range(start, min(start + size, len(rows)))):
                if jax.process_index() == 0:
                    print(json.dumps(line, ensure_ascii=False))
        return
    out = steps_lib.placed(args.out, step)
    settings = settings_of(args, steps_lib.newest(args.policy) if step is None else step, rows)
    whole = lines.write(out, len(rows), size, shards.parse(args), settings, respond,
                        bar('prompts', len(rows), 'prompt'))
    if jax.process_index() == 0:
        print(f'{len(rows) * args.num_samples} responses -> {out}' if whole else
              f'shard {args.shard} of {out}: {lines.describe_missing(out)}')


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Rows with a `prompt` or `messages`.

    Raises:
        FileNotFoundError, ValueError: no such file; a row that has neither, with its number.
    """
    place = storage.resolve(path)
    if not place.exists():
        raise FileNotFoundError(f'--prompts={path}: no such file')
    rows = []
    try:
        for number, row in enumerate(rows_lib.read(place)):
            said = row.get('prompt', row.get('messages'))
            if not isinstance(said, (str, list)) or not said:
                raise ValueError(f'{path}: row {number} is neither {{"prompt": "..."}} nor {{"messages": [...]}}')
            rows.append(row)
    except ValueError as error:
        raise ValueError(f'--prompts={error}') from None
    if not rows:
        raise ValueError(f'--prompts={path}: empty')
    return rows


def prompts_of(rows: Sequence[Mapping[str, Any]], policy: Policy, *, chat: bool = False, system: str | None = None,
               date: str = '') -> list[Text]:
    """What the policy continues: prompts as they are, conversations under a chat template.

    Raises:
        ValueError: a conversation without a chat template, or one that it does not take.
    """
    template, prompts = None, []
    for number, row in enumerate(rows):
        text = row.get('prompt')
        if isinstance(text, str) and not chat:
            prompts.append(text)
            continue
        template = template or template_of(policy, date)
        first = [{'role': 'system', 'content': system}] if system else []
        messages = [{'role': 'user', 'content': text}] if isinstance(text, str) else row.get('messages', text)
        try:
            prompts.append(template([*first, *messages], generate=True))
        except ValueError as error:
            raise ValueError(f'row {number}: {error}') from None
    return prompts


def template_of(policy: Policy, date: str) -> conversations.Template:
    """The chat template that a run was trained with, else the tokenizer's own.

    Raises:
        ValueError: there is neither.
    """
    data = policy.config.data if policy.config is not None and 'data' in policy.config else None
    if data is not None and data.task in ('no_robots', 'chat'):
        options = tasks.TASKS[data.task].OPTIONS | dict(data.options)
        return conversations.Template(options['template'], policy.tokenizer, options['eos'], date or options['date'])
    try:
        return conversations.Template('tokenizer', policy.tokenizer, date=date)
    except ValueError as error:
        raise ValueError(f'--chat: {error}') from None


if __name__ == '__main__':
    launch.main(main)
