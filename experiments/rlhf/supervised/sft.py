"""Supervised fine-tuning on demonstrations (`rlhf_jax.losses.supervised.sft`)."""
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.models import architecture
from experiments.rlhf.supervised import experiment as supervised
from experiments.runtime.experiment import Experiment
from rlhf_jax.losses.supervised import sft, trained_tokens


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    if config.packing and config.pack_batch:
        raise ValueError('pack_batch=True packs the texts of a batch, but packing=True has packed the whole data set; '
                         'set one of them to False')
    model = architecture.decoder(config.model)

    def what_counts(batch):
        packed = jnp.issubdtype(batch['mask'].dtype, jnp.integer)
        return dict(prompt_mask=None if config.train_on_prompt else batch['prompt_mask'],
                    segment_ids=batch['mask'] if packed else None)

    def cross_entropy(logits, batch):
        return sft(logits, batch['tokens'], batch['mask'], **what_counts(batch))

    def loss(params, _, batch):
        value, metrics = cross_entropy(model.apply({'params': params}, batch['tokens'], mask=batch['mask']), batch)
        if 'tokens_per_row' not in batch:
            return value, {'accuracy': metrics['accuracy'], 'tokens': metrics['tokens']}
        # A microbatch counts by its tokens: the mean over microbatches is then that over all tokens of the batch.
        share = metrics['tokens'] / (batch['tokens_per_row'][0] * len(batch['tokens']))
        return value * share, {'accuracy': metrics['accuracy'] * share, 'tokens': batch['tokens_in_all'][0]}

    def prepare(batch):
        if config.accumulate == 1:
            return batch
        rows = len(batch['tokens'])
        count = trained_tokens(batch['mask'], **what_counts(batch)).sum().astype(jnp.float32)
        return batch | {'tokens_per_row': jnp.full(rows, jnp.maximum(count, 1) / rows),
                        'tokens_in_all': jnp.full(rows, count)}

    def rows(params, _, batch):
        logits = model.apply({'params': params}, batch['tokens'], mask=batch['mask'])
        one = lambda *row: cross_entropy(*jax.tree.map(lambda x: x[None], row))
        value, metrics = jax.vmap(one)(logits, dict(batch))
        return {'loss': value, 'tokens': metrics['tokens'], 'accuracy': metrics['accuracy']}

    def reduce(rows):
        share = rows['tokens'] / max(rows['tokens'].sum(), 1)
        value = (rows['loss'] * share).sum()
        return {'loss': value, 'perplexity': jnp.exp(value), 'accuracy': (rows['accuracy'] * share).sum()}

    shape = (config.batch_size, config.max_length)
    batch = {'tokens': jax.ShapeDtypeStruct(shape, jnp.int32),
             'mask': jax.ShapeDtypeStruct(shape, jnp.int32 if config.packing or config.pack_batch else bool),
             'prompt_mask': jax.ShapeDtypeStruct(shape, bool)}
    return supervised.build(config, mesh, supervised.Objective(
        init=lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))['params'], loss=loss, rows=rows, reduce=reduce,
        open=supervised.open_demonstrations, batch=batch, prepare=prepare))
