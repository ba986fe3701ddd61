"""Text to image on pairs of handwritten digits, sized for two CPU cores:
`python -m experiments.quickstart --which=text`.

`configs/dlc/quickstart_text.py:tiny` is the same in a few steps, to see that everything runs; its numbers mean nothing.
"""
from configs.dlc import base, encoder_digits, generator_digits, text_to_code_digits


def get_config(size: str = 'full'):
    config = base.ConfigDict(dict(
        encoder=encoder_digits.get_config(), generator=generator_digits.get_config(),
        text_to_code=text_to_code_digits.get_config(),
        num_images=dict(train=6000, heldout=400, unseen=200),  # of each split
        sample_seeds=(0, 1, 2),  # every sample set is drawn once a seed; tables give mean and standard deviation
        sample_batch=200,  # divides the numbers of prompts and of held-out images: one size to compile for
    ))
    encoder, generator, text = config.encoder, config.generator, config.text_to_code
    encoder.data.num_local = 1
    generator.num_steps = 1500
    generator.model.update(dict(width=96, depth=3, num_heads=3, patch_size=4, input_size=16, num_codes=32,
                                vocab_size=16, code_init_std=3.0))
    # A step is dear here, and for long a DiT hardly looks at its code: the more of the noise levels at which a digit
    # can be told from others, and the faster the code's embedding moves, the earlier it does.
    generator.diffusion.beta_end = 0.01
    generator.optimizer.learning_rate.peak = 5e-3
    generator.optimizer.groups = ((r'cond_embed/.*', dict(learning_rate=10.0)), (r'.*', {}))
    generator.sampler.update(dict(num_steps=25, guidance=2.5))
    for stage in (encoder, generator, text):
        stage.model.unroll = True  # three blocks: a tenth quicker on two cores, and as quickly compiled
    if size == 'tiny':
        for stage in (encoder, generator, text):
            stage.num_steps, stage.checkpoint_every, stage.log_every, stage.batch_size = 8, 4, 2, 32
            stage.model.update(dict(width=32, depth=2, num_heads=2))
        encoder.head.update(dict(hidden=32, bottleneck=16, prototypes=64))
        text.model.hidden, text.eval_every, generator.sampler.num_steps, text.sampler.steps = 48, 8, 4, 4
        config.num_images.update(dict(train=160, heldout=40, unseen=40))
        config.sample_seeds, config.sample_batch = (0, 1), 40
    elif size != 'full':
        raise ValueError(f"quickstart_text: size {size!r} is not 'full' or 'tiny'")
    return config.lock()
