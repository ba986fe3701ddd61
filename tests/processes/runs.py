"""Every trainer in a tiny run, and jobs that train several of them one after another."""
import json
import pathlib
import re
import sys

import jax
import numpy as np

import jobs
from configs.dlc import quickstart, quickstart_text
from configs.rlhf import base, translation
from experiments.dlc.data import codestore_writer, digit_pairs, sources
from experiments.rlhf.models import architecture
from experiments.runtime import config_files
from experiments.runtime.metrics import read_metrics
from rlhf_jax import convert
from rlhf_jax.weights import files

for folder in ('end_to_end', 'align'):
    sys.path.append(str(pathlib.Path(__file__).parents[1] / folder))
import align_runs  # noqa: E402
from policy_runs import config_of as policy  # noqa: E402

STEPS = 5
PPO = dict(algorithm__name='ppo', algorithm__num_minibatches=2, elastic__method='elastic_reset', elastic__period=2,
           eval_every=2, eval_prompts=12, data__heldout='train', reward__gold='task')
APART = dict(rollout__devices=2, rollout__mesh=dict(data=1, fsdp=-1, tensor=1))
LORA = dict(lora__rank=2, lora__alpha=4.0)
POLICIES = {
    'online_dpo': {}, 'online_dpo stale': dict(rollout__max_staleness=1), 'online_dpo lora': LORA,
    'rloo': dict(algorithm__name='rloo'), 'best_of_n': dict(algorithm__name='best_of_n', algorithm__num_samples=4),
    'ppo': PPO, 'ppo stale': PPO | dict(rollout__max_staleness=1),
    'apart': APART | dict(rollout__max_staleness=1), 'apart in turn': APART,
    'apart, two behind': APART | dict(rollout__max_staleness=2),
    'files': dict(rollout__max_staleness=1, rollout__transport='files', rollout__mesh=APART['rollout__mesh']),
}
TEXTS = ('sft', 'sft lora', 'reward_model', 'dpo')
IMAGES = ('encoder', 'generator', 'code_model', 'text_to_code')
GAMES = ('translation_agent', 'translation_game')


def config_of(name, store):
    """The config of a run of `STEPS` steps; `store`: what `make_store` made."""
    if name in POLICIES:
        config = policy(**dict(optimizer__learning_rate__peak=1e-2) | POLICIES[name])
        if config.algorithm.name == 'ppo':
            config.weights, config.algorithm.critic_weights = str(store / 'policy'), str(store / 'reward_model')
            config.reward.update(dict(kind='model', model=str(store / 'reward_model'), batch_size=6))
    elif name in TEXTS:
        config = getattr(base, name.split()[0])().copy_and_resolve_references().unlock()
        config.model = policy().model
        config.model.max_length = config.max_length = 64
        config.model.num_heads = 4  # which `tensor` divides
        config.data = policy(data__num_rows=40, data__heldout='train').data
        config.eval_every, config.batch_size = 3, 8
        if name.endswith('lora'):
            config.lora.update(dict(rank=2, alpha=4.0))
    elif name == 'align':
        config = align_runs.config_of(store, batch_size=8, eval_every=3, eval_prompts=6)
    elif name in GAMES:
        config = translation.get_config('tiny_speaker' if name == 'translation_agent' else 'tiny_game').unlock()
        config.update_from_flattened_dict({
            'model.width': 16, 'data.lengths': (20,), 'message.max_length': 6, 'message.min_length': 2,
            'batch_size': 16, 'evaluation.every': 3, 'evaluation.sentences': 40, 'evaluation.rows': 32})
        if name == 'translation_game':
            config.elastic.update(dict(method='elastic_reset', period=2))
    else:
        whole = quickstart.get_config('tiny').copy_and_resolve_references()
        if name == 'text_to_code':
            config = quickstart_text.get_config('tiny').text_to_code.copy_and_resolve_references().unlock()
            config.model.num_codes = config.model.vocab_size = 16
            config.model.vocab_multiple = 8
            config.data.heldout, config.eval_every = str(store / 'codes'), 3
            config.mesh = whole.encoder.mesh
        else:
            config = whole.generators['code'] if name == 'generator' else whole[name]
        if name == 'encoder':
            config.model.drop_path = 0.25
        else:
            config.data.path = str(store / 'codes')
        config.batch_size = 32
    config.unlock()
    # A gradient that is 0 but for rounding (of the keys' bias, say) must not become a step of the learning rate.
    config.optimizer.eps = 1e-3
    config.num_steps, config.checkpoint_every, config.log_every = STEPS, 2, 1
    config.mesh.update(dict(data=1, fsdp=-1, tensor=1))
    return config


def make_store(folder):
    """Held-out digits with codes, embeddings and captions drawn at random; a language model and a reward model; a
    generator and captions for what writes codes."""
    rng = np.random.default_rng(0)
    source = sources.image_source(quickstart.get_config('tiny').encoder.data, 'heldout')
    meta = dict(num_codes=16, vocab_size=16, captions=True)
    with codestore_writer.writer(folder / 'codes', num=len(source), meta=meta) as opened:
        opened.append({'codes': rng.integers(0, 16, (len(source), 16)), 'labels': source.labels,
                       'images': source.images, 'embeddings': rng.normal(size=(len(source), 32)).astype(np.float32)},
                      names=[source.name(i) for i in range(len(source))],
                      captions=[digit_pairs.caption(*rng.integers(0, (10, 10, 4))) for _ in range(len(source))])
    model = policy().model
    for name, module in (('policy', architecture.decoder(model)), ('reward_model', architecture.reward_model(model))):
        params = jax.jit(module.init)(jax.random.key(5), np.zeros((1, 2), np.int32))['params']
        params = jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.normal(size=x.shape), x.dtype), params)
        files.save(folder / name, convert.to_torch(model.kind, module, params), convert.config_of(model.kind, module))
    align_runs.write_inputs(folder)
    return folder


def finish(workdir, processes, devices):
    """Lets the job of the run in `workdir` come to its end; (arrays of its final state, rows of metrics)."""
    jobs.succeed('tests.processes.several', f'--workdirs={workdir}', processes=processes, devices=devices)
    return dict(np.load(workdir / 'state.npz')), read_metrics(workdir / 'metrics.jsonl')


def train_all(folder, configs, processes, devices, stopped=()):
    """Trains `configs`, {name: config}, in one job, and those named in `stopped` once more, by way of a signal.

    Returns:
        {name: (arrays of the final state, rows of metrics)}; 'NAME stopped' of the latter.
    """
    configs = configs | {f'{name} stopped': configs[name] for name in stopped}
    workdirs = {name: folder / re.sub(r'\W+', '_', name) for name in configs}
    for name, workdir in workdirs.items():
        config_files.save(configs[name], workdir)
        if name.endswith(' stopped'):
            (workdir / 'stop.json').write_text(json.dumps(STEPS - 1))
    jobs.succeed('tests.processes.several', f'--workdirs={",".join(map(str, workdirs.values()))}',
                 processes=processes, devices=devices)
    return {name: (dict(np.load(workdir / 'state.npz')), read_metrics(workdir / 'metrics.jsonl'))
            for name, workdir in workdirs.items()}
