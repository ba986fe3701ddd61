"""Released weights of the paper (arXiv 2507.12318), with their authors' settings for sampling.

    python -m experiments.convert --kind=dit --src=DLC_DiT_L512/ --dst=runs/released/generator

What the tensors tell (widths, depths, L and V) replaces what stands here; the rest says how the model was trained.
"""
from configs.dlc import code_model_imagenet, encoder_imagenet, generator_imagenet, text_to_code_llada
from configs.parts import check_name

CONFIGS = {'sem': encoder_imagenet, 'dit': generator_imagenet, 'sedd': code_model_imagenet, 'llada': text_to_code_llada}


def get_config(kind: str):
    check_name('released:', kind, CONFIGS)
    config = CONFIGS[kind].get_config()
    config.model.dtype, config.model.remat = 'float32', 'none'
    with config.unlocked():
        config.weights_only = True  # a checkpoint of the EMA alone: to sample from, not to go on training
        if kind == 'dit':
            # Their pipeline guides by 4 in 250 steps; their guided recipe for 50 000 images, which goes with 1024
            # analytic steps of the code model, by 1.7 in 256. The first DiT, of classes, guides three channels.
            config.sampler.update(dict(num_steps=250, guidance=4.0, guidance_channels=0))
            config.recipes = dict(unconditional=dict(num_steps=256, guidance=1.7), classes=dict(guidance_channels=3))
        if kind == 'llada':
            # Their README: a step a position (512), temperature 0.2, positions at random, no guidance. The image
            # guidance of 3 that it gives never reaches their sampler, whose own 4 is used.
            config.model.dtype = 'bfloat16'
            config.sampler.update(dict(steps=0, remasking='random', temperature=0.2, guidance=0.0))
    if kind == 'sem':
        config.data.num_workers = 0
    elif kind == 'sedd':
        config.sampler.update(dict(name='analytic', num_steps=1024))
    return config
