"""Measures a language model on prompts that it was not trained on.

    python -m experiments.evaluate --policy=RUN --reference=SFT_RUN --gold=RM_RUN --num=512 --temperature=0.7
    python -m experiments.evaluate --policy=HF_FOLDER --task=gsm8k --path=gsm8k/ --split=test --max_new_tokens=512
    # 100 samples a problem: pass@k;  drift on 4000 human texts beside it
    python -m experiments.evaluate --policy=RUN --num_samples=100 --temperature=0.8 --drift=4000 --json=metrics.json
    # every checkpoint that was kept, a line each with its step and hours
    python -m experiments.evaluate --policy=RUN --step=all --gold=RM_RUN --json=curve.jsonl

RUN is the --workdir of an sft, dpo or policy run, HF_FOLDER weights with config.json and tokenizer.json. A policy run
says its own data, lengths and rewards; flags (or a --config) say them for others and in place of its own.

Of responses: reward, gold reward and its win rate against the data's own responses, metrics of the task, length, share
ended, diversity. With --reference: KL in nats a response and a token, the perplexity of the responses under it, and
legacy_kl_perplexity, which published TL;DR tables call "KL" and which depends on the length of the prompts.

With --json=FILE or --out=FILE, what has been sampled and what models have scored is in FILE.partial until FILE is
written: interrupted, the same command goes on from there. Reward functions are called anew.
"""
import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from experiments.rlhf.data import tasks
from experiments.rlhf.models import flags
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.models.classifier import TextClassifier, is_classifier
from experiments.rlhf.models.inference import Policy, Prompt, Responses
from experiments.rlhf.policy import evaluation, rewards
from experiments.rlhf.policy.completions import Reward
from experiments.rlhf.policy.reward_model import RewardModel
from experiments.runtime import blocks, launch, shards, storage
from experiments.runtime import steps as steps_lib
from experiments.runtime.curve import Curve, settings_of
from experiments.runtime.progress import bar


def main() -> None:
    p = flags.parser(__doc__, config=True)
    p.add_argument('--num', type=int, help='prompts, the first so many (default: all)')
    p.add_argument('--reference', metavar='RUN|HF_FOLDER', help='what the policy started from')
    p.add_argument('--reward', metavar='NAME', help="task | a reward model's folder | package.module:function")
    p.add_argument('--gold', metavar='NAME', help='the same, of a reward that was not trained on')
    p.add_argument('--label', help='of a BERT or DistilBERT classifier: whose probability is the reward')
    p.add_argument('--trust', action='store_true', help="run code that the policy's config.json names as its reward")
    p.add_argument('--gold_before_eos', action='store_true',
                   help='read gold reward models one token before EOS, as published TL;DR win rates were')
    p.add_argument('--drift', type=int, default=0, metavar='ROWS',
                   help="perplexity of the policy on so many of the data's own texts")
    p.add_argument('--interpolate', metavar='0,0.5,1', default='', help='measure the weights so far on the way from '
                   'the --reference to the policy, a row a share: the control that a gain in reward for drift needs')
    p.add_argument('--task', choices=tuple(tasks.TASKS))
    p.add_argument('--path', metavar='PLACE', help='of the data: file, folder, or tfds:NAME')
    p.add_argument('--split', help='default: the data.heldout of the run, else validation')
    p.add_argument('--max_prompt', type=int, help='tokens; prompts that are longer are left out')
    p.add_argument('--json', metavar='FILE', help='also write the numbers there; --step=all: a line a checkpoint')
    p.add_argument('--out', metavar='FILE', help='also write the responses there, a JSON line each')
    args, given = launch.parse(p, optional=True)
    flags.check(args)
    steps_lib.check(args.step, args.out)
    if args.step == 'all' and not args.json:
        raise ValueError('--step=all measures one checkpoint after another; say with --json=FILE where its rows go')
    for name in ('json', 'out'):
        if getattr(args, name):
            storage.check_writable(storage.resolve(getattr(args, name)).parent, f'--{name}')
    alphas = launch.shares('--interpolate', args.interpolate)
    if alphas and not args.reference:
        raise ValueError('--interpolate needs --reference: what the policy started from')
    if alphas and args.out:
        raise ValueError('--interpolate measures several policies; --out writes the responses of one')
    launch.initialize(args)
    wanted = steps_lib.wanted(args.step, args.policy, args.out)
    if args.step == 'all':
        curve = Curve(args.json, settings_of(args, given and given.to_dict()), run=args.policy)
        for step in curve.missing(wanted):
            out = evaluate(args, given, alphas, step)
            out = out if isinstance(out, dict) else {f'alpha_{row["alpha"]:g}': row for row in out}
            if jax.process_index() == 0:
                print(json.dumps({'step': step} | out), flush=True)
                curve.add(step, out)
            blocks.remove(partial_of(args, step))
        if jax.process_index() == 0:
            print(f'{len(wanted)} checkpoints -> {args.json}')
        return
    out = evaluate(args, given, alphas, wanted[0])
    if jax.process_index() == 0:
        print(json.dumps(out, indent=1))
        if args.json:
            storage.write_json(args.json, out)
    blocks.remove(partial_of(args, wanted[0]))


def partial_of(args: argparse.Namespace, step: int | None) -> str:
    """Where what has been measured so far of the policy at `step` is kept; '' where nothing is written."""
    output = args.json or steps_lib.placed(args.out or '', step)
    return os.fspath(shards.partial(output)) if output else ''


def evaluate(args: argparse.Namespace, given: ml_collections.ConfigDict | None, alphas: Sequence[float],
             step: int | None) -> dict[str, Any] | list[dict[str, Any]]:
    """The metrics of the policy at `step` (None: its newest checkpoint), whose responses go to --out; or a row for each
    of `alphas`, at which the policy is interpolated with the reference.

    Args:
        given: the config of --config, which stands in place of the run's own.
    """
    policy = flags.load(args.policy, args, given, step)
    reference = None
    if args.reference:
        reference = flags.load(args.reference, args, step=steps_lib.agreed_newest(args.reference))
        tokenizer_lib.check_same_tokenizer(f'--reference={args.reference}', reference.tokenizer, reference.encode.name,
                                           policy.encode)
    config = given or policy.config
    data = data_of(args, config)
    task = tasks.get(data, policy.encode)
    candidates = tasks.require(task, 'prompts', data)(data, args.split or data['heldout'])
    how = flags.sampling(policy, args, config, own_task=config is not None and data['task'] == config.data.task)
    prompts, rows = fitting(policy, candidates, task, how.max_new_tokens, args.max_prompt or (
        (config or {}).get('sampling') or {}).get('max_prompt', 0))
    prompts, rows = prompts[:args.num], rows[:args.num]
    place = partial_of(args, step)
    scorers = rewards_of(args, config, task, data, policy, read=config is policy.config, place=place)
    human_text = evaluation.human_text(task, data, args.split or data['heldout'], args.drift) if args.drift else ''

    def measure(policy: Policy) -> tuple[dict[str, Any], Responses]:
        out, responses = evaluation.evaluate_policy(
            policy, prompts, rows, how, key=jax.random.key(args.seed), num_samples=args.num_samples,
            batch_size=args.batch_size, task=task, **scorers, reference=reference, human_text=human_text, progress=bar,
            place=place)
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in out.items()}, responses

    if alphas:
        return [{'alpha': alpha} | measure(policy.interpolated(reference, alpha))[0] for alpha in alphas]
    out, responses = measure(policy)
    if args.out and jax.process_index() == 0:
        storage.write_json_lines(steps_lib.placed(args.out, step), flags.response_lines(
            [{name: row[name] for name in ('prompt', 'reference') if name in row} for row in rows], responses))
    return out


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


def fitting(policy: Policy, candidates: Sequence[tasks.Prompt], task: tasks.Task, room: int,
            longest: int) -> tuple[list[Prompt], list[Mapping[str, Any]]]:
    """Prompts and rows of those of at most `longest` tokens (0: the model's limit) that leave `room`.

    One that is cut is given as ids: its text would not always become the same ones again.

    Raises:
        ValueError: there is none.
    """
    limit = policy.module.max_length - room
    limit = min(longest, limit) if longest else limit
    prompts: list[Prompt] = []
    rows: list[Mapping[str, Any]] = []
    for prompt in candidates:
        ids = policy.encode(prompt.text)
        if len(ids) <= limit:
            prompts.append(prompt.text)
            rows.append({'prompt': str(prompt.text)} | dict(prompt.row))
        elif task.cut_prompts and limit > 0:
            ids = policy.encode.cut(ids, limit)
            prompts.append(ids)
            whole = str(prompt.text)  # what a classifier of texts reads, as in training
            rows.append({'prompt': policy.tokenizer.decode(ids), 'whole_prompt': whole} | dict(prompt.row))
    if not prompts:
        raise ValueError(f'none of {len(candidates)} prompts has at most {limit} tokens (--max_prompt, '
                         '--max_new_tokens)')
    if len(prompts) < len(candidates) and jax.process_index() == 0:
        print(f'{len(candidates) - len(prompts)} of {len(candidates)} prompts have more than {limit} tokens and are '
              'left out')
    return prompts, rows


def rewards_of(args: argparse.Namespace, config: ml_collections.ConfigDict | None, task: tasks.Task,
               data: Mapping[str, Any], policy: Policy, *, read: bool, place: str = '') -> dict[str, Reward]:
    """Reward functions to report: from the flags, else from the run's config, else the task's own rule.

    As in training, `reward.missing_eos` of the config stands in place of the reward of a response that does not end.

    Args:
        read: `config` comes from the policy's folder, not from the user.
        place: folder where the scores of models are written (`evaluation.written`); '': nowhere.

    Raises:
        ValueError: a reward that cannot be had, or code that only such a folder names, without --trust.
    """
    uses_config = config is not None and config.get('reward') and data['task'] == config.data.task
    if uses_config:
        default = {'reward': rewards.reward_name(config.reward), 'gold': config.reward.gold}
    else:
        default = {'reward': 'task' if task.reward else '', 'gold': 'task' if task.gold else ''}
    names = {'reward': args.reward or default['reward'], 'gold': args.gold or default['gold']}
    if read:
        rewards.check_code({f'reward.{name}': names[name] for name in names if not getattr(args, name)},
                           f'--policy={args.policy}', args.trust)

    def scorer(name: str) -> Reward:
        def model(path: str) -> Reward:
            if is_classifier(path):
                label = args.label or (config.reward.get('label', '') if uses_config else '')
                classifier = TextClassifier(path, policy.mesh, label=label, batch_size=args.batch_size)
                return evaluation.written(classifier, place)
            tokenizer_lib.check_stage(f'--{name}', path, policy.encode)
            reward_model = RewardModel(
                path, policy.mesh, num_ids=policy.tokenizer.vocab_size, batch_size=args.batch_size,
                dtype=args.dtype or '', step=steps_lib.agreed_newest(path),
                before_eos=args.gold_before_eos and name == 'gold')
            return evaluation.written(reward_model, place)
        return rewards.find(f'--{name}', names[name], task, data['task'], model, gold=name == 'gold')

    scorers = {name: scorer(name) for name in names if names[name]}
    missing_eos = rewards.number('reward.missing_eos', config.reward.missing_eos) if uses_config else None
    if 'reward' in scorers and missing_eos is not None:
        scorers['reward'] = rewards.with_missing_eos(scorers['reward'], missing_eos)
    return scorers


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOT_MEASURED, status=None)
