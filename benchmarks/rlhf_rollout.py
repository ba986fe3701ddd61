"""Rows of `benchmarks/rlhf.py` that need no PyTorch: what the rollout stream costs, and what it gains.

Stub work sleeps, so that it has a fixed duration and competes for no core. Run as a module it is one of the two
processes of the row `processes`.
"""
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rlhf_policy
from benchmarks.measure import Figure, Times, figure, in_turns
from rlhf_jax.generate import Sampling, generate
from rlhf_jax.responses import sample_keys
from rlhf_jax.rollout.processes import Remote, serve
from rlhf_jax.rollout.publish import Files, InProcess
from rlhf_jax.rollout.stream import RolloutStream

OVERHEAD_TARGET = 0.03
WARM = 2  # batches before the clock starts: S = 1 is in its steady state then


# ---- Loops -----------------------------------------------------------------------------------------------------------


def stub_batch(prompts: int = 2, samples: int = 2, prompt: int = 4, response: int = 4) -> dict[str, np.ndarray]:
    shape = prompts, samples
    return {'tokens': np.zeros((*shape, prompt + response), np.int32), 'mask': np.ones((*shape, response), bool),
            'logprobs': np.zeros((*shape, response), np.float32), 'rewards': np.zeros(shape, np.float32)}


def plain_loop(make: Callable, train: Callable, params: Any, steps: int) -> float:
    """Seconds a step of `generate; train`."""
    start = 0.0
    for i in range(steps + WARM):
        if i == WARM:
            start = time.perf_counter()
        params = train(params, jax.device_get(make(params, index=i, version=i)))
    return (time.perf_counter() - start) / steps


def stream_loop(make: Callable, train: Callable, params: Any, steps: int, max_staleness: int,
                threaded: bool = True) -> float:
    """Seconds a step through a `RolloutStream`, publishing included."""
    warm, start = WARM + max_staleness, 0.0
    with RolloutStream(make, InProcess(), max_staleness=max_staleness, threaded=threaded, timeout=120,
                       num_batches=steps + warm) as stream:
        stream.publish(0, params)
        for i in range(steps + warm):
            if i == warm:
                start = time.perf_counter()
            params = train(params, next(stream))
            stream.publish(i + 1, params)
        return (time.perf_counter() - start) / steps


def stubs(g: float, t: float) -> tuple[Callable, Callable, Any]:
    """Generation that takes `g` seconds and training that takes `t`, and parameters."""
    batch = stub_batch()

    def make(params, *, index, version):
        time.sleep(g)
        return batch

    def train(params, batch):
        time.sleep(t)
        return params
    return make, train, {'w': jnp.zeros(16)}


def _own_times(loops: dict[str, Callable[[], float]], repeats: int, progress: Callable[[str], None]) -> Times:
    """Of loops that time themselves, in turns."""
    times: Times = {name: [] for name in loops}
    for turn in range(repeats):
        progress(f'turn {turn + 1} of {repeats}')
        for name, loop in loops.items():
            times[name].append(loop())
    return times


# ---- Rows ------------------------------------------------------------------------------------------------------------


def overhead(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """The stream over a plain loop: in series at S = 0, 1, 4; threaded at S = 0, and at S = 1, 4 over the longer half.

    Where generation and training overlap, the plain loop does only one of the two, which take equally long.
    """
    steps, sleep = sizes.stream['steps'], sizes.stream['sleep']
    stub = stubs(sleep, sleep)
    alone = (lambda params, *, index, version: None, *stub[1:])
    policy = SmallPolicy(sizes.small)
    real = *policy.works(), policy.params
    loops = {'plain': lambda: plain_loop(*stub, steps), 'longer half': lambda: plain_loop(*alone, steps)}
    for s in (0, 1, 4):
        loops[f'S={s}'] = functools.partial(stream_loop, *stub, steps, s)
        loops[f'S={s} in series'] = functools.partial(stream_loop, *stub, steps, s, threaded=False)
    loops['real plain'] = lambda: plain_loop(*real, steps)
    loops['real S=0'] = lambda: stream_loop(*real, steps, 0)
    loops['real plain'](), loops['real S=0']()  # compile
    times = _own_times(loops, run.repeats, run.progress)
    over = lambda ours, plain: ours / plain - 1
    bound = dict(target=OVERHEAD_TARGET, at_most=True, form='.2%')
    figures = [figure(f'overhead S={s}{how}', over, times[f'S={s}{how}'], times[base],
                      note=f'{1e3 * statistics.median(times[f"S={s}{how}"]):.4g} ms a step, {base} '
                           f'{1e3 * statistics.median(times[base]):.4g}', **bound)
               for s, how, base in ((0, '', 'plain'), (0, ' in series', 'plain'), (1, ' in series', 'plain'),
                                    (4, ' in series', 'plain'), (1, '', 'longer half'), (4, '', 'longer half'))]
    figures.append(figure('overhead S=0, jitted work', over, times['real S=0'], times['real plain'],
                          note=f'{1e3 * statistics.median(times["real plain"]):.4g} ms a step in the plain loop',
                          **bound))
    return times, figures


def overlap(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """A step's time over max(g, t) at S = 1, for stub generation of g and training of t seconds."""
    sleep, steps = sizes.stream['sleep'], sizes.stream['steps']
    works = {f'g={1e3 * g * sleep:g} t={1e3 * t * sleep:g} ms': (g * sleep, t * sleep)
             for g, t in ((1, 1), (2, 1), (1, 2), (1.25, 1))}
    times = _own_times({name: functools.partial(stream_loop, *stubs(*gt), steps, 1) for name, gt in works.items()},
                       run.repeats, run.progress)
    return times, [figure(f'overlap {name}', lambda x, m=max(gt): x / m - 1, times[name], target=OVERHEAD_TARGET,
                          at_most=True, form='.2%', note=f'a step over max(g, t), {1e3 * sum(gt):g} ms in series')
                   for name, gt in works.items()]


def publish(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """Milliseconds to publish, and to fetch, a policy of many matrices; nothing here is hidden behind other work."""
    mib, parts = sizes.stream['publish_mib'], 16
    params = {f'block_{i}': jax.random.normal(jax.random.key(i), (mib * 2 ** 18 // parts // 128, 128))
              for i in range(parts)}
    version = iter(range(1_000_000))
    with tempfile.TemporaryDirectory() as folder:
        files, memory, half = Files(folder), InProcess(), InProcess(dtype=jnp.bfloat16)
        last = {}

        def send(name, weights):
            last[name] = next(version)
            weights.publish(last[name], params)
            if weights is not files:
                weights.release(last[name])
        times = in_turns({
            'in process': lambda: send('memory', memory), 'in process, bfloat16': lambda: send('half', half),
            'to a file': lambda: send('files', files),
            'from a file': lambda: jax.block_until_ready(files.fetch(last['files'])),
        }, run.repeats, run.progress)
    return times, [figure(f'publish {name}', lambda x: 1e3 * x, times[name], form='.3g', note=f'ms for {mib} MiB')
                   for name in times if '/' not in name]


# ---- Small policy ----------------------------------------------------------------------------------------------------


class SmallPolicy:
    """Jitted generation with K = 2 and an Online-DPO step, a few tens of milliseconds each."""

    def __init__(self, small: dict):
        self.small = small
        self.module = rlhf_policy.policy(small['shape'])
        self.params = rlhf_policy.params_of(self.module)
        self.sampling = Sampling(small['new'])

    def generate(self, params: Any, *, index: int, version: int) -> dict[str, np.ndarray]:
        """Batch `index`; the reward is the share of even tokens."""
        rows, prompt = self.small['prompts'], self.small['prompt']
        tokens, mask = rlhf_policy.prompts(self.module, rows, prompt, seed=index)
        keys = sample_keys(jax.random.key(0), np.arange(rows) + rows * index, 2, version)
        samples = jax.device_get(generate(self.module, params, tokens, mask, keys, self.sampling, num_samples=2))
        twice = np.repeat(tokens[:, None], 2, 1)
        return {'tokens': np.concatenate([twice, samples.tokens], -1), 'mask': samples.mask,
                'logprobs': samples.logprobs, 'rewards': (samples.tokens % 2 == 0).mean(-1).astype(np.float32)}

    def works(self) -> tuple[Callable, Callable]:
        """Generation, and training; parameters that it returns are gone with the next call."""
        learner = rlhf_policy.Learner(self.module, self.params, self.params)

        def train(params, batch):
            learner.step(batch)
            return learner.params
        return self.generate, train


# ---- Two processes ---------------------------------------------------------------------------------------------------


def processes(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """A learner and a generator, each a process with a core of its own: S = 0 against S = 1, at equal samples."""
    cores = sorted(os.sched_getaffinity(0))
    root, turns = pathlib.Path(__file__).resolve().parents[1], min(run.repeats, 3)
    run.progress('starting two processes')
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps(dict(folder=folder, turns=turns, steps=sizes.small['steps'], small=sizes.small))
        pin = lambda i: str(cores[i % len(cores)])
        start = lambda role, core, **how: subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.rlhf_rollout', role, core, job], cwd=root, text=True,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'}, **how)
        generator = start('generator', pin(0))
        try:
            learner = start('learner', pin(1), stdout=subprocess.PIPE)
            out, _ = learner.communicate(timeout=600)
            if learner.returncode or generator.wait(60):
                raise RuntimeError('a process of the row `processes` failed; its output is above')
        finally:
            for process in (generator, learner):
                process.kill()
    times = json.loads(out)
    share = lambda name: statistics.median(times[name])
    note = (f'S=0 {1e3 * share("S=0"):.4g} ms a step, S=1 {1e3 * share("S=1"):.4g}; generation '
            f'{1e3 * share("generate"):.4g}, training {1e3 * share("train"):.4g}, files and polling '
            f'{1e3 * (share("S=0") - share("generate") - share("train")):.3g} at S=0; '
            f'{len(set((pin(0), pin(1))))} cores, one a process')
    return times, [figure('processes S=0 over S=1', lambda s, a: s / a, times['S=0'], times['S=1'], note=note),
                   figure('processes, overlap could give', lambda g, t: (g + t) / max(g, t), times['generate'],
                          times['train'], note='(g + t) / max(g, t)')]


def _learner(job: dict) -> Times:
    """Seconds a step of every turn; `generate` and `train` are of the steps at S = 0."""
    policy = SmallPolicy(job['small'])
    _, train = policy.works()
    steps, times = job['steps'], {name: [] for name in ('S=0', 'S=1', 'generate', 'train')}
    for turn, s, weights, batches in _turns(job):
        remote = Remote(batches, weights, max_staleness=s, poll=.002)
        params, made, trained, start = policy.params, [], [], 0.0
        with RolloutStream(remote, remote, max_staleness=s, timeout=300, num_batches=steps + WARM + s) as stream:
            stream.publish(0, params)
            for i in range(steps + WARM + s):
                if i == WARM + s:
                    start = time.perf_counter()
                batch = next(stream)
                begun = time.perf_counter()
                params = train(params, batch)
                trained.append(time.perf_counter() - begun)
                made.append(stream.metrics['generate'])
                stream.publish(i + 1, params)
            wall = (time.perf_counter() - start) / steps
        if turn >= 0:
            times[f'S={s}'].append(wall)
            if s == 0:
                times['generate'].append(statistics.mean(made[WARM:]))
                times['train'].append(statistics.mean(trained[WARM:]))
    return times


def _generator(job: dict) -> None:
    policy = SmallPolicy(job['small'])
    for _, _, weights, batches in _turns(job):
        serve(policy.generate, weights, batches, poll=.002, idle_timeout=300)


def _turns(job: dict) -> Any:
    """(turn, S, weights, folder for batches); turn -1 compiles."""
    folder = pathlib.Path(job['folder'])
    for turn in range(-1, job['turns']):
        for s in (0, 1):
            place = folder / f'{turn}-{s}'
            yield turn, s, Files(place / 'weights', keep=s + 1, timeout=300, poll=.002), place / 'batches'


if __name__ == '__main__':
    os.sched_setaffinity(0, {int(sys.argv[2])})  # before JAX starts its threads
    if sys.argv[1] == 'learner':
        print(json.dumps(_learner(json.loads(sys.argv[3]))))
    else:
        _generator(json.loads(sys.argv[3]))
