"""The whole method on handwritten digits, sized for two CPU cores: `python -m experiments.quickstart`.

`configs/dlc/quickstart.py:tiny` is the same in a few steps, to see that everything runs; its numbers mean nothing.
"""
from configs.dlc import base, code_model_digits, embedding_model_digits, encoder_digits, generator_digits

METHODS = ('code', 'none', 'embedding')


def get_config(size: str = 'full'):
    config = base.ConfigDict(dict(
        encoder=encoder_digits.get_config(),
        generators={condition: generator_digits.get_config(condition) for condition in METHODS},
        code_model=code_model_digits.get_config(),
        embedding_model=embedding_model_digits.get_config(),
        sample_seeds=(0, 1, 2),  # every sample set is drawn once a seed; tables give mean and standard deviation
        composition=dict(pairs=48, samples=4, temperature=0.001),  # pairs of held-out images of different classes
        sample_batch=512,
    ))
    if size == 'tiny':
        for stage in (config.encoder, config.code_model, config.embedding_model, *config.generators.values()):
            stage.num_steps, stage.checkpoint_every, stage.log_every, stage.batch_size = 8, 4, 2, 32
            stage.model.update(dict(width=32, depth=2))
            if 'num_heads' in stage.model:
                stage.model.num_heads = 2
        config.embedding_model.model.embedding_dim = 32
        config.encoder.head.update(dict(hidden=32, bottleneck=16, prototypes=64))
        for stage in config.generators.values():
            stage.model.embedding_dim = 32
            stage.sampler.num_steps = 4
        config.code_model.sampler.num_steps = config.embedding_model.sampler.num_steps = 8
        config.sample_seeds, config.composition.pairs = (0, 1), 6
    elif size != 'full':
        raise ValueError(f"quickstart: size {size!r} is not 'full' or 'tiny'")
    return config.lock()
