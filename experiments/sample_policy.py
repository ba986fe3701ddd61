"""Responses of a language model.

    python -m experiments.sample --policy=RUN --prompt="3+4=" --num_samples=4 --temperature=0.7
    python -m experiments.sample --policy=HF_FOLDER --prompts=prompts.jsonl --max_new_tokens=256 --out=completions.jsonl

RUN is the --workdir of an sft, dpo or policy run, HF_FOLDER weights with config.json and tokenizer.json. A line of
--prompts is {"prompt": "..."}; its other fields are kept. --out gets a line a response, with `completion`, `ended` and
`logprob`, its log-probability in nats where tokens were drawn (greedy: 0).
"""
import json
from typing import Any

import jax

from experiments.rlhf.models import flags
from experiments.runtime import launch, storage
from experiments.runtime.progress import bar


def main() -> None:
    p = flags.parser(__doc__)
    p.add_argument('--prompt', action='append', metavar='TEXT', help='may be repeated')
    p.add_argument('--prompts', metavar='FILE', help='.jsonl')
    p.add_argument('--out', metavar='FILE', help='.jsonl (default: print them)')
    args, _ = launch.parse(p)
    flags.check(args)
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError('give either --prompt=TEXT or --prompts=FILE')
    if args.out:
        storage.check_writable(storage.resolve(args.out).parent, '--out')
    rows = [{'prompt': text} for text in args.prompt] if args.prompt else read_prompts(args.prompts)
    launch.initialize(args)
    policy = flags.load(args.policy, args)
    responses = policy.sample([row['prompt'] for row in rows], flags.sampling(policy, args, policy.config),
                          jax.random.key(args.seed), batch_size=args.batch_size, num_samples=args.num_samples,
                          progress=bar('prompts', len(rows), 'prompt'))
    lines = flags.response_lines(rows, responses)
    if args.out:
        storage.write_json_lines(args.out, lines)
        print(f'{len(lines)} responses -> {args.out}')
    else:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Rows with a `prompt` of a .jsonl.

    Raises:
        FileNotFoundError, ValueError: no such file; a line that is no JSON or has no prompt, with its number.
    """
    place = storage.resolve(path)
    if not place.exists():
        raise FileNotFoundError(f'--prompts={path}: no such file')
    rows = []
    for number, line in enumerate(place.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row['prompt'], str) or not row['prompt']:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'--prompts={path}: line {number} is not {{"prompt": "..."}}') from None
        rows.append(row)
    if not rows:
        raise ValueError(f'--prompts={path}: empty')
    return rows


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOTHING_WRITTEN, status=None)
