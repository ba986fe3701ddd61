"""Standard deviation of the score that DPO compares pairs by, with each way of lowering it on and off.

    python -m benchmarks.likelihood_variance --policy=RUN --reference=RUN --captions=captions.txt

RUN: work directories of text_to_code or align. Draws two codes of each caption from the reference and estimates
s(y_w) - s(y_l), s = B_policy - B_reference (`dlc_jax.likelihood`), many times with other masks. Prints, in nats, the
standard deviation over masks (root of the mean variance over captions) beside that of the score itself over captions.
"""
import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import likelihood, text_to_code
from experiments.align.captions import open_rows
from experiments.dlc.text_to_code import TextToCode, make_model, make_words

Array = jax.Array
# Name -> what is left out of the four that are on by default.
VARIANTS = {
    'all': {}, 'sizes of masks not stratified': dict(stratified=False),
    'one size of masks for all': dict(one_size=True), 'other masks for the reference': dict(share_models=False),
    'other masks for the second code': dict(share_pair=False),
    'none': dict(stratified=False, share_models=False, share_pair=False)}


def draw(key: Array, num: int, length: int, *, stratified: bool, one_size: bool) -> Array:
    """Masks bool [num, length]; `one_size`: all of a single size that is drawn, as many masks of one noise level."""
    if not one_size:
        return likelihood.draw_masks(key, num, length, stratified=stratified)
    size_key, place_key = jax.random.split(key)
    size = jax.random.randint(size_key, (), 1, length + 1)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(place_key, (num, length)), -1), -1)
    return rank < size


def score(bounds: Any, key: Array, num: int, length: int, *, stratified: bool = True, one_size: bool = False,
          share_models: bool = True, share_pair: bool = True) -> Array:
    """Estimates of s(y_w) - s(y_l), [N] a caption; `bounds`: (model 0 or 1, code 0 or 1, masks) -> [N]."""
    total = jnp.zeros(())
    for model, sign in ((0, 1.0), (1, -1.0)):
        for code, other in ((0, 1.0), (1, -1.0)):
            at = (0 if share_models else model) * 2 + (0 if share_pair else code)
            masks = draw(jax.random.fold_in(key, at), num, length, stratified=stratified, one_size=one_size)
            total = total + sign * other * bounds(model, code, masks)
    return total


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--policy', required=True)
    p.add_argument('--reference', required=True)
    p.add_argument('--captions', required=True)
    p.add_argument('--num_captions', type=int, default=32)
    p.add_argument('--draws', type=int, default=50, help='of masks, a caption')
    p.add_argument('--temperature', type=float, default=1.0, help='of the codes')
    p.add_argument('--json', metavar='FILE')
    args = p.parse_args(argv)
    policy, reference = TextToCode.load(args.policy), TextToCode.load(args.reference)
    rows = open_rows(args.captions, '--captions')
    captions = [rows[i]['caption'] for i in np.linspace(0, len(rows) - 1, args.num_captions).astype(int)]
    codes = reference.sample(jax.random.key(0), captions, num_per_prompt=2, temperature=args.temperature,
                             remasking='random').reshape(len(captions), 2, -1)
    tokens, mask = reference.checked(captions)
    model, words, length = make_model(reference.config), make_words(reference.config), codes.shape[-1]

    def bound(params: Any, code: Array, masks: Array) -> Array:
        def logits_of(versions: Array) -> Array:
            count, num, _ = versions.shape
            of_each = [jnp.repeat(x, num, 0) for x in (tokens, mask)]
            run = text_to_code.network(model, params, *of_each, words, length)
            return run(versions.reshape(-1, length)).reshape(count, num, length, -1)
        return likelihood.bound_terms(logits_of, code, masks, words.num_codes).sum(-1)

    params, both = (policy.params, reference.params), jnp.asarray(codes, jnp.int32)
    out: dict[str, Any] = {}
    for name, left_out in VARIANTS.items():
        for num in (1, 2, 4, 8):
            @jax.jit
            def run(keys: Array, num: int = num, left_out: dict = left_out) -> Array:
                bounds = lambda which, code, masks: bound(params[which], both[:, code], masks)
                return jax.lax.map(lambda key: score(bounds, key, num, length, **left_out), keys)
            drawn = np.asarray(run(jax.random.split(jax.random.key(1), args.draws)), np.float64)  # [draws, N]
            out.setdefault(name, {})[num] = float(np.sqrt(drawn.var(0, ddof=1).mean()))
            if name == 'all' and num == 8:
                out['of the score over captions'] = float(drawn.mean(0).std())
        print(f'{name:36s}', '  '.join(f'n={num}: {x:7.3f}' for num, x in out[name].items()), flush=True)
    print(f'{"of the score over captions":36s} {out["of the score over captions"]:.3f}')
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(out, file, indent=1)
    return out


if __name__ == '__main__':
    main()
