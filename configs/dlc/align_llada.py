"""LLaDA-8B as a writer of codes of 512 x 256, improved by a reward on the images that the DiT-XL/2 and the Stable
Diffusion autoencoder make of them, inside the rollout: full, full_async, lora or lora_async.

    python -m experiments.train --config=configs/dlc/align_llada.py:full_async --workdir=runs/align_llada \\
        --config.weights=RUN --config.generator.path=DLC_DiT_L512/ --config.generator.vae=sd-vae-ft-ema/ \\
        --config.data.path=captions.jsonl --config.data.heldout=heldout.jsonl \\
        --config.reward.function=my_rewards:score --config.tokenizer=LLaDA-8B-Base/

RUN: the work directory of configs/dlc/text_to_code_llada.py, the tokenizer as it was given there, in `pretrained`; of
the released DLC_LLADA_L512 instead --config.pretrained=DLC_LLADA_L512/, whose tokenizer lies beside it. captions.jsonl:
a line {"caption": "...", ...} each, of which `score(images, rows)` gets the rows and the images, float32
[N, 256, 256, 3] in [0, 1]; heldout.jsonl: the same, not trained on, for measurements (--config.eval_every=0: none).

64 captions a step, 4 codes of each written in 128 network calls and drawn in 25 steps of DDIM, guided as the DiT's own
settings say; Online DPO on the bound at 8 sets of masked positions. Asynchronous: one version behind; say with
--config.rollout.devices=N how many of the devices generate. full trains all weights from float32 masters, lora queries
and values alone. Nothing here has been tuned or trained. By the compilers full needs 34 GiB of each of 8 H100 and 86 of
each chip of v5p-8, lora 17 of each of 8 H100 and 21 of v6e-8, with the accumulate of 4; 64 chips take
--config.accumulate=1.
An iteration takes at least 44 seconds on 8 H100, 37 of them to write codes (docs/align.md). Of any other slice:

    python -m experiments.compile --config=configs/dlc/align_llada.py:full --topology=v5p-8
"""
from configs.dlc import base
from configs.dlc.encoder_imagenet import CODES
from configs.parts import check_name

NAMES = ('full', 'full_async', 'lora', 'lora_async')


def get_config(name: str = 'full'):
    check_name('align_llada:', name, NAMES)
    config = base.align()
    config.num_steps, config.batch_size, config.accumulate = 500, 64, 4
    config.log_every, config.checkpoint_every, config.eval_every, config.eval_prompts = 5, 50, 50, 64
    config.model.num_codes, config.model.vocab_size = CODES['L512']
    config.model.dtype, config.model.remat = 'bfloat16', 'full'
    config.sampler.update(dict(steps=128, temperature=1.0, remasking='random'))
    config.generator.config = 'configs/dlc/generator_imagenet.py:L512'
    config.generator.sampler.update(dict(name='ddim', num_steps=25))
    config.generator.batch_size = 64
    config.reward.kind = 'function'
    config.algorithm.update(dict(name='online_dpo', num_samples=4, beta=0.1))
    config.reference.dtype = 'bfloat16'
    config.optimizer.learning_rate.update(dict(peak=1e-6, warmup_steps=10, decay='linear'))
    if name.startswith('lora'):
        config.lora.update(dict(rank=32, alpha=64.0))
        config.optimizer.learning_rate.peak = 2e-5
    if name.endswith('_async'):
        config.rollout.max_staleness = 1
    config.rollout.mesh.update(dict(data=1, fsdp=-1))
    return config
