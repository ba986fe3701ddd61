"""Sizes of the image benchmark: tiny for its tests, `cpu` for two cores, `gpu` at the published configurations."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. `dit`, `sedd`, `encoder`: fields of `config.model`; `batch`: rows of each measurement."""
    dit: dict
    sedd: dict
    encoder: dict
    batch: dict
    steps: dict  # of the samplers
    crops: dict  # fields of `config.data`
    head: dict
    gemm: int  # side of the matrix product that sets the peak


_CODES = dict(num_codes=32, vocab_size=256)
SIZES = {
    'tiny': Sizes(
        dit=dict(size='S', width=32, depth=2, num_heads=2, input_size=8, num_codes=4, vocab_size=8),
        sedd=dict(size='small', width=32, depth=2, num_heads=2, num_codes=8, vocab_size=16, cond_dim=16),
        encoder=dict(size='S', width=32, depth=2, num_heads=2, patch_size=4, pos_grid=4, num_codes=4, vocab_size=8),
        batch=dict(dit_forward=2, dit_sampling=2, dit_training=2, sedd_sampling=2, encoder_training=4),
        steps=dict(dit=3, sedd=3), crops=dict(global_size=16, local_size=8, num_local=2),
        head=dict(hidden=32, bottleneck=16, prototypes=32), gemm=64),
    'cpu': Sizes(
        dit=dict(size='S', **_CODES),
        sedd=dict(size='small', width=384, depth=6, num_heads=6, num_codes=128, vocab_size=1024),
        encoder=dict(size='S', depth=4, patch_size=8, pos_grid=8, **_CODES),
        batch=dict(dit_forward=8, dit_sampling=1, dit_training=8, sedd_sampling=4, encoder_training=8),
        steps=dict(dit=50, sedd=32), crops=dict(global_size=64, local_size=32, num_local=4),
        head=dict(hidden=384, bottleneck=128, prototypes=1024), gemm=2048),
    'gpu': Sizes(
        dit=dict(size='XL', num_codes=512, vocab_size=256),
        sedd=dict(size='medium', num_codes=512, vocab_size=256),
        encoder=dict(size='L', patch_size=14, pos_grid=37, num_codes=512, vocab_size=256),
        batch=dict(dit_forward=256, dit_sampling=64, dit_training=256, sedd_sampling=128, encoder_training=32),
        steps=dict(dit=50, sedd=64), crops=dict(global_size=224, local_size=98, num_local=8),
        head=dict(hidden=2048, bottleneck=256, prototypes=65536), gemm=8192),
}
