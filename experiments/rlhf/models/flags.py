"""What the commands on language models share: the flags that open a policy and say how it samples."""
import argparse
from collections.abc import Mapping
from typing import Any

import jax

from experiments.rlhf.models.inference import Policy, Responses
from experiments.runtime import launch, steps
from experiments.runtime import mesh as mesh_lib


def parser(description: str, *, config: bool = False) -> argparse.ArgumentParser:
    """A parser with the flags that the commands share; `config`: with --config too."""
    p = launch.parser(description, config='data, sampling and rewards of a policy run' if config else None)
    p.add_argument('--policy', required=True, metavar='RUN|HF_FOLDER')
    steps.add_flag(p, '--policy')
    p.add_argument('--tokenizer', metavar='FILE', help='tokenizer.json or its folder, where the policy has none')
    p.add_argument('--adapter', metavar='DIR', help='of PEFT, merged into the policy')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), help='to compute in (default: as its config says)')
    p.add_argument('--tensor', type=int, default=1, metavar='N', help='devices that share one copy of the weights')
    p.add_argument('--num_samples', type=int, default=1, metavar='K', help='responses to each prompt')
    p.add_argument('--temperature', type=float, default=0.0, help='0: greedy')
    p.add_argument('--top_k', type=int, default=0, help='0: all')
    p.add_argument('--top_p', type=float, default=1.0)
    p.add_argument('--max_new_tokens', type=int, help="default: as in the run, else 128")
    p.add_argument('--min_new_tokens', type=int, help='no end before so many (default: as in the run where prompts of '
                   'its own task are measured, by evaluate; else 0)')
    p.add_argument('--batch_size', type=int, default=64, help='prompts at once')
    p.add_argument('--seed', type=int, default=0)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError for what is wrong whatever the model turns out to be."""
    for name in ('tensor', 'num_samples', 'batch_size', 'max_new_tokens', 'num'):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)} must be at least 1')
    if (args.min_new_tokens or 0) < 0:
        raise ValueError(f'--min_new_tokens={args.min_new_tokens} must be at least 0')
    if args.num_samples > 1 and not args.temperature:
        raise ValueError(f'--num_samples={args.num_samples} with --temperature=0: all samples of a prompt would be the '
                         'same; set --temperature')


def load(path: str, args: argparse.Namespace, config: Mapping[str, Any] | None = None,
         step: int | None = None) -> Policy:
    """The policy in `path` as the flags say, at its newest checkpoint or at `step`; `config.bos` decides about BOS
    where it says anything."""
    mesh = mesh_lib.make_mesh({'data': -1, 'tensor': args.tensor}, jax.local_devices())
    return Policy.load(path, tokenizer=args.tokenizer or '', bos=(config or {}).get('bos'), dtype=args.dtype or '',
                       adapter=args.adapter or '', mesh=mesh, step=step)


def sampling(policy: Policy, args: argparse.Namespace, config: Mapping[str, Any] | None, *,
             own_task: bool = False) -> Any:
    """How the flags say to sample; what they leave out of the lengths is as in `config`, the run's.

    Args:
        own_task: whether the prompts are of the run's own task, which is what its least length is for. Answers to
            others may end at once, as those of the model that it began with may.
    """
    settings = (config or {}).get('sampling') or {}
    least = args.min_new_tokens
    if least is None:
        least = settings.get('min_new_tokens', 0) if own_task else 0
    most = args.max_new_tokens or settings.get('max_new_tokens', 128)
    if least > most:
        raise ValueError(f'--max_new_tokens={most} is less than the {least} before which no response ends; raise it or '
                         'lower --min_new_tokens')
    return policy.sampling(max_new_tokens=most, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                           min_new_tokens=least)


def response_lines(rows: list[dict[str, Any]], responses: Responses) -> list[dict[str, Any]]:
    """One row for each response: the prompt's `rows`, with `completion`, `ended` and `logprob` (nats)."""
    sums = responses.logprobs.sum(-1)
    return [row | {'completion': text, 'ended': bool(responses.ended[i, k]), 'logprob': round(float(sums[i, k]), 4)}
            for i, row in enumerate(rows) for k, text in enumerate(responses.texts[i])]
