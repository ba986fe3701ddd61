"""Relabels preference pairs with a gold reward model.

    python -m experiments.relabel --pairs=pairs.jsonl --gold=RM_RUN --tokenizer=pythia/ --out=relabelled.jsonl

A row holds `prompt`, `chosen` and `rejected`, texts with or without their <|endoftext|>. Where the gold model prefers
the rejected one the two change places; ties stay. Prints in how many pairs it agrees with the labels it found. The
published preferences of arXiv 2410.18252 were made with --before_eos.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.rlhf.data import texts
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.policy.completions import Completions
from experiments.rlhf.policy.reward_model import RewardModel
from experiments.runtime import launch, lines, shards, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import steps as steps_lib
from experiments.runtime.curve import settings_of
from experiments.runtime.progress import bar
from rlhf_jax import generate as generate_lib
from rlhf_jax.tasks import rows as rows_lib
from rlhf_jax.tasks import tldr


def scorer(gold: RewardModel, encode: texts.Encoder, rows: Sequence[Mapping[str, Any]], field: str, *,
           max_length: int = 0) -> Callable[[range], np.ndarray]:
    """Numbers of rows -> scores [n] of each prompt with its `field`, ended by EOS.

    Raises:
        ValueError: one is longer than `max_length` (0: than the model's context).
    """
    ids = [texts.joined(encode, row['prompt'], row[field].removesuffix(tldr.END))[0] for row in rows]
    longest, limit = max(map(len, ids)), max_length or gold.max_length
    if longest > limit:
        raise ValueError(f'--pairs: row {[len(i) for i in ids].index(longest)}: prompt and {field} have {longest} '
                         f'tokens, more than {limit}')
    tokens, mask = generate_lib.pad_prompts(ids, buckets=(longest,), pad_token=encode.tokenizer.pad, left=False)

    def of_part(part: range) -> np.ndarray:
        some = slice(part.start, part.stop)
        return np.asarray(gold(Completions([row[field] for row in rows[some]], rows[some], tokens[some], mask[some],
                                           np.ones(len(part), bool))))
    return of_part


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--pairs', required=True, metavar='FILE', help='.jsonl, .json, .parquet, .arrow, or a folder')
    p.add_argument('--split', help='of a folder')
    p.add_argument('--gold', required=True, metavar='RM', help='reward_model run, or Hugging Face folder')
    p.add_argument('--tokenizer', metavar='FILE', help='default: that of --gold')
    p.add_argument('--before_eos', action='store_true', help='read scores one token before EOS, as published')
    p.add_argument('--batch_size', type=int, default=64)
    p.add_argument('--max_length', type=int, default=0, help="tokens; 0: the model's context")
    p.add_argument('--out', required=True, metavar='FILE', help='.jsonl')
    steps_lib.add_flag(p, '--gold')
    shards.add_flag(p)
    args, _ = launch.parse(p)
    shard = shards.parse(args)
    steps_lib.check(args.step, args.out)
    storage.check_writable(storage.resolve(args.out).parent, '--out')
    launch.initialize(args)
    wanted = steps_lib.wanted(args.step, args.gold, args.out)
    rows = list(rows_lib.read(storage.resolve(args.pairs), tldr.PAIR_FIELDS, split=args.split))
    if not rows:
        raise ValueError(f'--pairs={args.pairs}: no rows')
    stage = tokenizer_lib.stage_of(args.gold)
    if stage is None:
        raise FileNotFoundError(f'--gold={args.gold}: no config.json there; give a reward_model run or a Hugging Face '
                                'folder')
    name = args.tokenizer or stage.name
    tokenizer = tokenizer_lib.open_tokenizer(name)
    # A folder without tokenizer files says nothing of a BOS: those of --tokenizer do.
    encode = texts.Encoder(tokenizer, stage.bos if stage.is_run or stage.tokenizer else tokenizer.adds_bos, name)
    tokenizer_lib.check_stage('--gold', args.gold, encode)
    for step in wanted:
        gold = RewardModel(args.gold, mesh_lib.make_mesh({'data': -1}, jax.local_devices()), step=step,
                           num_ids=tokenizer.vocab_size, batch_size=args.batch_size, before_eos=args.before_eos)
        score = [scorer(gold, encode, rows, field, max_length=args.max_length) for field in ('chosen', 'rejected')]
        out = steps_lib.placed(args.out, step)
        settings = settings_of(args, steps_lib.newest(args.gold) if step is None else step, rows)

        def relabel(part: range, score: Any = score) -> list[dict[str, Any]]:
            return tldr.relabel(rows[part.start:part.stop], *(of_field(part) for of_field in score))[0]
        whole = lines.write(out, len(rows), min(args.batch_size, len(rows)), shard, settings, relabel,
                            bar('pairs', len(rows), 'pair'))
        if jax.process_index() == 0:
            print(summary(rows, out) if whole else f'shard {args.shard} of {out}: {lines.describe_missing(out)}')


def summary(rows: Sequence[Mapping[str, Any]], out: str) -> str:
    """How often the gold model agrees with the labels of `rows`, of which `out` holds the relabelled ones."""
    relabelled = list(rows_lib.read(storage.resolve(out)))
    swapped = sum(new['chosen'] != row['chosen'] for row, new in zip(rows, relabelled, strict=True))
    ties = sum(new['chosen_score'] == new['rejected_score'] for new in relabelled)
    agreement = (len(rows) - swapped - ties) / len(rows)
    return f'agreement {agreement:.4f}: {swapped} of {len(rows)} pairs changed places -> {out}'


if __name__ == '__main__':
    launch.main(main)
