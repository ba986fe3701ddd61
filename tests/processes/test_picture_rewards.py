"""An encoder rewards the pictures that each process of a job has, however many these are, as it does in one process."""
import argparse
import json

import jax
import numpy as np

import jobs
import runs  # noqa: F401  # which finds the modules of tests/align
from align_runs import SIDE, write_encoder
from experiments.align import rewards
from experiments.runtime import mesh as mesh_lib

NUM = 5


class Rows(list):
    """Rows as a code store gives them: a list that names its fields."""
    fields = ('caption', 'image')


def main():
    """The scores of this process's pictures: the first has all but one of them, and one of three has none."""
    parser = argparse.ArgumentParser()
    parser.add_argument('encoder')
    parser.add_argument('out')
    args = parser.parse_args()
    drawn, wanted = np.random.default_rng(0).integers(0, 256, (2, NUM, SIDE, SIDE, 1), np.uint8)
    rows = Rows({'caption': 'a', 'image': image} for image in wanted)
    mesh = mesh_lib.make_mesh({'data': -1})
    with jax.set_mesh(mesh):  # as generators have it
        reward = rewards.find('reward.kind', args.encoder, rows, (SIDE, SIDE, 1), mesh)
        own = slice(0, NUM)
        if jax.process_count() > 1:
            own = (slice(0, NUM - 1), slice(NUM - 1, NUM), slice(NUM, NUM))[jax.process_index()]
        if rows[own]:
            scores = reward(rewards.Pictures(drawn[own].astype(np.float32) / 255, rows[own], np.ones(NUM, bool)[own]))
            np.save(f'{args.out}-{jax.process_index()}.npy', scores)


def test_three_processes_reward_what_one_rewards(tmp_path):
    write_encoder(tmp_path / 'encoder')
    for processes in (1, 3):
        command = ['tests.processes.test_picture_rewards', f'{tmp_path}/encoder', f'{tmp_path}/{processes}']
        (tmp_path / 'commands.json').write_text(json.dumps([command]))
        jobs.succeed('tests.processes.commands', str(tmp_path / 'commands.json'), processes=processes, devices=2,
                     timeout=60)
    alone = np.load(tmp_path / '1-0.npy')
    found = np.concatenate([np.load(path) for path in sorted(tmp_path.glob('3-*.npy'))])
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert alone.shape == (NUM,) and np.ptp(alone) > 0.01
