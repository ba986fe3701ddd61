"""The small LLaDA of pairs of digits improved by a judge of the pictures: METHOD or METHOD_async, on two CPU cores.

    python -m experiments.quickstart --which=align --workdir=runs/quickstart_align    # writes all that this starts from
    python -m experiments.train --config=configs/dlc/align_digits.py:online_dpo --workdir=runs/align/online_dpo
    python -m experiments.sample --text "a seven above a two" --text_model=runs/align/online_dpo \\
        --generator=runs/quickstart_align/text/generator --out=seven_two.png

METHOD: online_dpo, best_of_n, rloo, grpo, elastic_reset (Online DPO under it). Captions are of the 80 pairs that were
trained on; the reward is how sure a judge is of both digits, one that was trained on other handwritten digits than the
judge whose opinion is logged beside it.
"""
from configs.dlc import base, text_to_code_digits
from configs.parts import check_name

METHODS = ('online_dpo', 'best_of_n', 'rloo', 'grpo', 'elastic_reset')
NAMES = (*METHODS, *(f'{method}_async' for method in METHODS))


def get_config(name: str = 'online_dpo', at: str = 'runs/quickstart_align'):
    check_name('align_digits:', name, NAMES)
    method = name.removesuffix('_async')
    text, config = text_to_code_digits.get_config(), base.align()
    for section in ('model', 'words'):
        config[section].update(text[section])
    config.tokenizer, config.vocabulary, config.caption_length = text.tokenizer, text.vocabulary, text.caption_length
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 60, 32, 5, 0
    config.sampler.update(dict(steps=16, temperature=0.7, remasking='random'))
    config.weights = f'{at}/text/text_to_code'
    config.generator.path = f'{at}/text/generator'
    config.generator.sampler.update(dict(name='ddim', num_steps=8))
    config.data.update(dict(path=f'{at}/captions/seen.jsonl', heldout=f'{at}/captions/unseen.jsonl'))
    config.reward.update(dict(kind='model', model=f'{at}/judges/proxy', gold=f'{at}/judges/gold'))
    config.algorithm.update(dict(name='online_dpo' if method == 'elastic_reset' else method, num_samples=4, beta=0.1))
    if method in ('rloo', 'grpo'):
        config.likelihood.update(dict(kind='exact', num=8))
    if method == 'elastic_reset':
        config.elastic.update(dict(method='elastic_reset', period=20, decay=0.9))
    if name.endswith('_async'):
        config.rollout.max_staleness = 1
    config.optimizer.learning_rate.update(dict(peak=3e-4, decay='linear'))
    return config
