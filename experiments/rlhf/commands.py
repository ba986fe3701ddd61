"""`experiments.evaluate` and `experiments.sample` for language models: flags in, numbers or texts out."""
import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
from tqdm import tqdm

from experiments.rlhf.data import tasks
from experiments.rlhf.policy import evaluation, rewards
from experiments.rlhf.models.inference import Policy
from experiments.runtime import launch, storage
from experiments.runtime import mesh as mesh_lib

EVALUATE = """Measures a language model on prompts that it was not trained on.

    python -m experiments.evaluate --policy=RUN --reference=SFT_RUN --gold=RM_RUN --num=512 --temperature=0.7
    python -m experiments.evaluate --policy=HF_FOLDER --task=gsm8k --path=gsm8k/ --split=test --max_new_tokens=512
    # 100 samples a problem: pass@k;  drift on 4000 human texts beside it
    python -m experiments.evaluate --policy=RUN --num_samples=100 --temperature=0.8 --drift=4000 --json=metrics.json

RUN is the --workdir of an sft, dpo or policy run, HF_FOLDER weights with config.json and tokenizer.json. A policy run
says its own data, lengths and rewards; flags (or a --config) say them for others and in place of its own.

Of responses: reward, gold reward and its win rate against the data's own responses, metrics of the task, length, share
ended, diversity. With --reference: KL in nats a response and a token, the perplexity of the responses under it, and
legacy_kl_perplexity, which published TL;DR tables call "KL" and which depends on the length of the prompts.
"""
SAMPLE = """Responses of a language model.

    python -m experiments.sample --policy=RUN --prompt="3+4=" --num_samples=4 --temperature=0.7
    python -m experiments.sample --policy=HF_FOLDER --prompts=prompts.jsonl --max_new_tokens=256 --out=completions.jsonl

RUN is the --workdir of an sft, dpo or policy run, HF_FOLDER weights with config.json and tokenizer.json. A line of
--prompts is {"prompt": "..."}; its other fields are kept. --out gets a line a response, with `completion`, `ended` and
`logprob`, its log-probability in nats where tokens were drawn (greedy: 0).
"""


# ---- Flags -----------------------------------------------------------------------------------------------------------

def parser(description: str, *, config: bool = False) -> argparse.ArgumentParser:
    p = launch.parser(description, config='data, sampling and rewards of a policy run' if config else None)
    p.add_argument('--policy', required=True, metavar='RUN|HF_FOLDER')
    p.add_argument('--tokenizer', metavar='FILE', help='tokenizer.json or its folder, where the policy has none')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), help='to compute in (default: as its config says)')
    p.add_argument('--tensor', type=int, default=1, metavar='N', help='devices that share one copy of the weights')
    p.add_argument('--num_samples', type=int, default=1, metavar='K', help='responses to each prompt')
    p.add_argument('--temperature', type=float, default=0.0, help='0: greedy')
    p.add_argument('--top_k', type=int, default=0, help='0: all')
    p.add_argument('--top_p', type=float, default=1.0)
    p.add_argument('--max_new_tokens', type=int, help="default: the run's own, else 128")
    p.add_argument('--batch_size', type=int, default=64, help='prompts at once')
    p.add_argument('--seed', type=int, default=0)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError for what is wrong whatever the model turns out to be."""
    for name in ('tensor', 'num_samples', 'batch_size', 'max_new_tokens', 'num'):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)} must be at least 1')
    if args.num_samples > 1 and not args.temperature:
        raise ValueError(f'--num_samples={args.num_samples} with --temperature=0: all samples of a prompt would be the '
                         'same; set --temperature')


def load(path: str, args: argparse.Namespace) -> Policy:
    mesh = mesh_lib.make_mesh({'data': -1, 'tensor': args.tensor})
    named = ml_collections.ConfigDict(dict(tokenizer=args.tokenizer)) if args.tokenizer else None
    return Policy.load(path, named, dtype=args.dtype or '', mesh=mesh)


def sampling(policy: Policy, args: argparse.Namespace, config: Mapping[str, Any] | None) -> Any:
    own = (config or {}).get('sampling') or {}
    return policy.sampling(max_new_tokens=args.max_new_tokens or own.get('max_new_tokens', 128),
                           temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                           min_new_tokens=own.get('min_new_tokens', 0))


def bar(what: str, total: int) -> Callable[[int], None]:
    """A progress bar, as the callback that moves it."""
    shown = tqdm(total=total, desc=what, dynamic_ncols=True, disable=jax.process_index() != 0)

    def update(done: int) -> None:
        shown.update(done - shown.n)
        if done >= total:
            shown.close()
    return update


# ---- evaluate --------------------------------------------------------------------------------------------------------

def evaluate() -> None:
    p = parser(EVALUATE, config=True)
    p.add_argument('--num', type=int, help='prompts, the first so many (default: all)')
    p.add_argument('--reference', metavar='RUN|HF_FOLDER', help='what the policy started from')
    p.add_argument('--reward', metavar='NAME', help="task | a reward model's folder | package.module:function")
    p.add_argument('--gold', metavar='NAME', help='the same, of a reward that was not trained on')
    p.add_argument('--gold_before_eos', action='store_true',
                   help='read gold reward models one token before EOS, as published TL;DR win rates were')
    p.add_argument('--drift', type=int, default=0, metavar='ROWS',
                   help="perplexity of the policy on so many of the data's own texts")
    p.add_argument('--task', choices=tuple(tasks.TASKS))
    p.add_argument('--path', metavar='PLACE', help='of the data: file, folder, or tfds:NAME')
    p.add_argument('--split', help='default: the data.heldout of the run, else validation')
    p.add_argument('--max_prompt', type=int, help='tokens; prompts that are longer are left out')
    p.add_argument('--json', metavar='FILE', help='also write the numbers there')
    p.add_argument('--out', metavar='FILE', help='also write the responses there, a JSON line each')
    args, config = launch.parse(p, optional=True)
    check(args)
    for name in ('json', 'out'):
        if getattr(args, name):
            storage.check_writable(storage.resolve(getattr(args, name)).parent, f'--{name}')
    launch.initialize(args)
    policy = load(args.policy, args)
    config = config or policy.config
    data = data_of(args, config)
    task = tasks.get(data, policy.encode)
    found = tasks.require(task, 'prompts', data)(data, args.split or data['heldout'])
    how = sampling(policy, args, config)
    prompts, rows = fitting(policy, found, task, how.max_new_tokens, args.max_prompt or (
        (config or {}).get('sampling') or {}).get('max_prompt', 0))
    prompts, rows = prompts[:args.num], rows[:args.num]
    scorers = rewards_of(args, config, task, data, policy)
    out, responses = evaluation.evaluate_policy(
        policy, prompts, rows, how, key=jax.random.key(args.seed), num_samples=args.num_samples,
        batch_size=args.batch_size, task=task, **scorers,
        reference=load(args.reference, args) if args.reference else None,
        human_text=evaluation.human_text(task, data, args.split or data['heldout'], args.drift) if args.drift else '',
        progress=bar)
    text = json.dumps({name: round(value, 6) if isinstance(value, float) else value for name, value in out.items()},
                      indent=1)
    print(text)
    if args.json:
        with storage.write_whole(args.json) as file:
            file.write((text + '\n').encode())
    if args.out:
        write(args.out, lines_of([{'prompt': prompt} for prompt in prompts], responses))


def data_of(args: argparse.Namespace, config: ml_collections.ConfigDict | None) -> dict[str, Any]:
    """A config's `data` under the flags.

    Raises:
        ValueError: neither says what the data are.
    """
    own = config.data.to_dict() if config is not None else dict(
        task='', path='', heldout='validation', num_rows=0, skip_bad_rows=False, options={})
    if args.task and args.task != own['task']:
        own |= dict(task=args.task, path='', options={}, heldout='validation')
    if not own['task']:
        raise ValueError(f'--policy={args.policy} has no config that says what to measure it on; give --task and '
                         '--path')
    return own | ({'path': args.path} if args.path else {}) | {'num_rows': 0}


def fitting(policy: Policy, found: list[tasks.Prompt], task: tasks.Task, room: int,
            longest: int) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Texts and rows of the prompts of at most `longest` tokens (0: the model's limit) that leave `room`.

    Raises:
        ValueError: there is none.
    """
    limit = policy.module.max_length - room
    limit = min(longest, limit) if longest else limit
    prompts, rows = [], []
    for prompt in found:
        ids = policy.encode(prompt.text)
        if len(ids) > limit and not task.cut_prompts:
            continue
        text = prompt.text if len(ids) <= limit else policy.tokenizer.decode(ids[-limit:])
        prompts.append(text)
        rows.append({'prompt': text} | dict(prompt.row))
    if not prompts:
        raise ValueError(f'none of {len(found)} prompts has at most {limit} tokens (--max_prompt, --max_new_tokens)')
    if len(prompts) < len(found):
        print(f'{len(found) - len(prompts)} of {len(found)} prompts have more than {limit} tokens and are left out')
    return prompts, rows


def rewards_of(args: argparse.Namespace, config: ml_collections.ConfigDict | None, task: tasks.Task,
               data: Mapping[str, Any], policy: Policy) -> dict[str, rewards.Reward]:
    """`reward` and `gold`, as far as flags, config and task name them."""
    said = config is not None and config.get('reward') and data['task'] == config.data.task
    names = {'reward': args.reward or (rewards.kind_of(config.reward) if said else 'task' if task.reward else ''),
             'gold': args.gold or (config.reward.gold if said else 'task' if task.gold else '')}

    def find(name):
        model = lambda path: rewards.RewardModel(
            path, policy.mesh, num_ids=policy.tokenizer.vocab_size, batch_size=args.batch_size,
            dtype=args.dtype or '',
            before_eos=args.gold_before_eos and name == 'gold')
        return rewards.find(f'--{name}', names[name], task, data['task'], model, gold=name == 'gold')
    return {name: find(name) for name in names if names[name]}


# ---- sample ----------------------------------------------------------------------------------------------------------

def sample() -> None:
    p = parser(SAMPLE)
    p.add_argument('--prompt', action='append', metavar='TEXT', help='may be repeated')
    p.add_argument('--prompts', metavar='FILE', help='.jsonl')
    p.add_argument('--out', metavar='FILE', help='.jsonl (default: print them)')
    args, _ = launch.parse(p)
    check(args)
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError('give either --prompt=TEXT or --prompts=FILE')
    if args.out:
        storage.check_writable(storage.resolve(args.out).parent, '--out')
    rows = [{'prompt': text} for text in args.prompt] if args.prompt else read_prompts(args.prompts)
    launch.initialize(args)
    policy = load(args.policy, args)
    found = policy.sample([row['prompt'] for row in rows], sampling(policy, args, policy.config),
                          jax.random.key(args.seed), batch_size=args.batch_size, num_samples=args.num_samples,
                          progress=bar('prompts', len(rows)))
    lines = lines_of(rows, found)
    if args.out:
        write(args.out, lines)
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


def lines_of(rows: list[dict[str, Any]], found: Any) -> list[dict[str, Any]]:
    """A row a response."""
    sums = found.logprobs.sum(-1)
    return [row | {'completion': text, 'ended': bool(found.ended[i, k]), 'logprob': round(float(sums[i, k]), 4)}
            for i, row in enumerate(rows) for k, text in enumerate(found.texts[i])]


def write(path: str, lines: list[dict[str, Any]]) -> None:
    with storage.write_whole(path) as file:
        file.write(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines).encode())
