"""Text to image on pairs of digits, improved by reward: `python -m experiments.quickstart --which=align`.

Starts from the stages of the text quickstart in the work directory `text`, or where that is empty trains them itself.
`:tiny` takes the same path in a few steps, to see that everything runs; its numbers mean nothing.
"""
from configs.dlc import align_digits, base, quickstart_text

METHODS = {  # row of the table -> config of `align_digits.py`
    'Online DPO': 'online_dpo', 'Online DPO, asynchronous': 'online_dpo_async', 'Best-of-N': 'best_of_n',
    'Online DPO, Elastic Reset': 'elastic_reset'}


def get_config(size: str = 'full'):
    text = quickstart_text.get_config(size)
    policy = align_digits.get_config()
    policy.num_steps, policy.log_every, policy.model.unroll = 30, 2, True
    if size == 'tiny':
        policy.num_steps, policy.batch_size, policy.log_every, policy.checkpoint_every = 6, 8, 2, 3
        policy.model.update({name: text.text_to_code.model[name] for name in ('width', 'depth', 'num_heads', 'hidden')})
        policy.sampler.steps, policy.generator.sampler.num_steps, policy.likelihood.num = 4, 4, 2
        policy.algorithm.num_samples = 2
    return base.ConfigDict(dict(
        # A finished text quickstart to start from (one that was stopped is gone on with); '': it is run below this
        # one's work directory.
        text='',
        text_to_image=text,
        policy=policy,  # settings that all methods share; what a method differs in is in align_digits.py
        methods=tuple(METHODS),
        seeds=(1,),  # each method is trained once a seed; its settings were chosen on seed 0
        sample_seeds=(0, 1),  # every sample set is drawn once a seed, of all methods from the same noise
        # The control of a trade-off of reward and drift: the first method's weights, so much of the way from the start.
        interpolate=(0.5,),
        # Sets of masked positions a code, by which KL is estimated: over 400 codes its mean is within 0.09 nats of that
        # of 32 sets: three policies, three draws of the sets.
        drift_masks=2 if size == 'tiny' else 8,
        judge_seed=0,
    )).lock()
