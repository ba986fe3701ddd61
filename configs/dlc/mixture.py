"""The toy mixture of arXiv 2507.12318 figure 2: `python -m experiments.mixture --config=configs/dlc/mixture.py:SIZE`.

small  for a CPU, not timed: 1.5 million draws a run. --config.variance=0.01 takes modes that do not overlap.
paper  batch 2048, 300 million draws, as the paper says; on one GPU, time unknown.
tiny   to see that everything runs; its numbers mean nothing.

The paper says: N Gaussians of variance 0.1 at a spacing of 1, a network of four layers, improved DDPM, KL by a Gaussian
kernel estimate with Silverman's bandwidth. The plane, the width, the optimizer and the numbers of modes are ours. Its
other condition, the index that a fitted mixture gives a draw, is not here.
"""
import ml_collections

from configs.parts import check_name

SIZES = ('small', 'paper', 'tiny')


def get_config(size: str = 'small') -> ml_collections.ConfigDict:
    check_name('mixture: size', size, SIZES)
    config = ml_collections.ConfigDict(dict(
        modes=(1, 16, 64, 256),  # numbers of them, each a square number
        variance=0.1, spacing=1.0,  # of a mode along each axis; between neighbours
        width=64, depth=4,
        batch_size=512, num_steps=3000,
        learning_rate=1e-3,  # Adam's, falling to 0 by a cosine
        num_samples=8192, sample_steps=100,
        seeds=(0, 1, 2),  # each its own initial weights, draws and samples
    ))
    if size == 'paper':
        config.width, config.batch_size, config.num_steps = 128, 2048, 146_500
        config.num_samples, config.sample_steps = 65_536, 250
    elif size == 'tiny':
        config.modes, config.width, config.depth, config.seeds = (4,), 16, 2, (0, 1)
        config.batch_size, config.num_steps, config.num_samples, config.sample_steps = 32, 6, 512, 4
    return config.lock()
