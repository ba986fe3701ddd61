"""Weights from learner to generator: snapshots, placement, files that are whole or absent, device-to-device pulls."""
import json
import pathlib
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.rollout import publish
from rlhf_jax.rollout.publish import Files, InProcess

ROOT = pathlib.Path(__file__).resolve().parents[2]
WAIT = 20.0


def tree(value=1.0):
    return {'block': {'kernel': jnp.arange(8.0).reshape(4, 2) * value, 'bias': jnp.full(2, value, jnp.bfloat16)},
            'count': jnp.int32(7)}


# Within a process

def test_in_process_hands_over_a_copy_that_survives_donation():
    for shardings in (None, jax.devices()[0], jax.devices()[3]):
        weights, params = InProcess(shardings), tree()
        weights.publish(0, params)
        jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)  # the learner's next step
        chex.assert_trees_all_equal(weights.fetch(0), tree())


def test_in_process_onto_a_disjoint_mesh():
    devices = np.asarray(jax.devices())
    learner, generator = (Mesh(d.reshape(2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
                          for d in (devices[:4], devices[4:]))
    params = jax.device_put(tree(), NamedSharding(learner, P()))
    layout = jax.tree.map(lambda x: NamedSharding(generator, P('data', 'tensor') if x.ndim == 2 else P()), params)
    weights = InProcess(layout)
    weights.publish(0, params)
    placed = weights.fetch(0)
    chex.assert_trees_all_equal(placed, tree())
    assert placed['block']['kernel'].sharding == layout['block']['kernel']
    assert placed['block']['bias'].devices() == set(devices[4:].tolist())


def test_in_process_casts_what_floats():
    weights = InProcess(dtype=jnp.bfloat16)
    weights.publish(0, tree())
    assert {x.dtype for x in jax.tree.leaves(weights.fetch(0)['block'])} == {jnp.dtype('bfloat16')}
    assert weights.fetch(0)['count'].dtype == jnp.int32


def test_in_process_versions():
    weights = InProcess(timeout=.02)
    assert weights.newest() is None
    with pytest.raises(TimeoutError, match='version 0 was not published within timeout=0.02 s'):
        weights.fetch(0)
    for version in (0, 1, 2):
        weights.publish(version, tree(version))
    chex.assert_trees_all_equal(weights.fetch(1), tree(1))
    weights.release(2)
    assert weights.newest() == 2
    with pytest.raises(ValueError, match=r'version 1 is not held any more, only \[2\]'):
        weights.fetch(1)
    with pytest.raises(ValueError, match='version=2 is not newer'):
        weights.publish(2, tree())


def test_snapshots_are_not_copied_again():
    weights, params = InProcess(jax.devices()[0], snapshots=True), jax.device_put(tree(), jax.devices()[0])
    weights.publish(0, params)
    where = lambda tree: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    assert where(weights.fetch(0)) == where(params)
    copies = InProcess(jax.devices()[0])
    copies.publish(0, params)
    assert not set(where(copies.fetch(0))) & set(where(params))


@pytest.mark.parametrize('transport', [lambda d: InProcess(timeout=WAIT), lambda d: Files(d, timeout=WAIT, poll=.005)])
def test_a_reader_waits_for_its_version(transport, tmp_path):
    weights, got = transport(tmp_path), []
    weights.publish(0, tree(0))
    reader = threading.Thread(target=lambda: got.append(weights.fetch(1)))
    reader.start()
    weights.publish(1, tree(5))
    reader.join(WAIT)
    chex.assert_trees_all_equal(got[0], tree(5))


# Files

def test_files_round_trip_bit_for_bit(tmp_path):
    directory = tmp_path / 'new'
    writer, reader = Files(directory), Files(directory, timeout=WAIT)
    assert reader.newest() is None
    writer.publish(0, tree(1 / 3))
    assert reader.newest() == 0
    chex.assert_trees_all_equal(reader.fetch(0), tree(1 / 3))
    on = Files(directory, SingleDeviceSharding(jax.devices()[5])).fetch(0)
    assert on['block']['kernel'].devices() == {jax.devices()[5]}


def test_shards_that_are_seen_after_their_marker(tmp_path):
    """As a shared disk may show them to another machine."""
    from safetensors.numpy import save_file
    (tmp_path / 'weights-000000003.json').write_text(json.dumps({'shards': 2, 'shapes': {'a': [4]}}))

    def appear():
        for i in range(2):
            time.sleep(0.1)
            save_file({f'a@{2 * i}': np.arange(2, dtype=np.float32) + 2 * i},
                      tmp_path / f'shard-000000003-{i}-of-2.safetensors')
    writer = threading.Thread(target=appear)
    writer.start()
    np.testing.assert_array_equal(Files(tmp_path, keep=1).fetch(3)['a'], np.arange(4))
    writer.join()


def test_files_keep_the_newest_and_withdraw_what_a_resumed_learner_undoes(tmp_path):
    weights = Files(tmp_path, keep=2, timeout=.02)
    for version in range(4):
        weights.publish(version, tree(version))
    assert weights.versions() == [2, 3]
    with pytest.raises(ValueError, match=r'is gone, only \[2, 3\] are left; raise keep=2'):
        weights.fetch(1)
    weights.publish(2, tree(9))  # from a checkpoint at 2
    assert weights.versions() == [2]
    chex.assert_trees_all_equal(weights.fetch(2), tree(9))
    with pytest.raises(TimeoutError, match='version 3 was not published'):
        weights.fetch(3)


def test_a_file_half_written_is_never_seen(tmp_path, monkeypatch):
    weights = Files(tmp_path)
    weights.publish(0, tree(0))
    seen = []
    replace = publish.os.replace
    monkeypatch.setattr(publish.os, 'replace', lambda *a: (seen.append(weights.versions()), replace(*a))[1])
    weights.publish(1, tree(1))
    assert seen == [[0]]  # all of version 1 is on disk, under a name that no reader looks at

    def full(*a):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(publish.os, 'replace', full)
    with pytest.raises(OSError, match='No space left'):
        weights.publish(2, tree(2))
    assert weights.versions() == [0, 1] and len(list(tmp_path.iterdir())) == 2
    chex.assert_trees_all_equal(weights.fetch(1), tree(1))


@pytest.mark.parametrize('params, message', [({'a/b': jnp.ones(1)}, "'a/b' is not a name"),
                                             ([jnp.ones(1)], 'are a list')])
def test_files_refuse_what_they_could_not_give_back(params, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Files(tmp_path).publish(0, params)
    with pytest.raises(ValueError, match='keep=0'):
        Files(tmp_path, keep=0)


# Device to device

LEARNER = '''
import sys, jax, jax.numpy as jnp
from rlhf_jax.rollout.publish import Transfer
weights = Transfer(sys.argv[1], keep=3)
for version in range(3):
    params = {'a': jnp.full((3,), version + .5), 'b': {'c': jnp.full((2, 2), version, jnp.bfloat16)}}
    weights.publish(version, params)
    jax.tree.map(lambda x: x.delete(), params)
print('ready', flush=True)
sys.stdin.readline()
'''
GENERATOR = '''
import sys, jax, jax.numpy as jnp
from rlhf_jax.rollout.publish import Transfer
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = {'a': jax.ShapeDtypeStruct((3,), jnp.float32, sharding=here),
        'b': {'c': jax.ShapeDtypeStruct((2, 2), jnp.bfloat16, sharding=here)}}
weights = Transfer(sys.argv[1], like, timeout=30)
for version in range(3):
    for _ in range(2):  # once over the wire, once from memory
        params = weights.fetch(version)
        print(version, params['a'].tolist(), params['b']['c'].dtype, params['b']['c'].tolist(), flush=True)
'''


def test_transfer_between_processes(tmp_path):
    try:
        publish.Transfer(tmp_path)
    except NotImplementedError as error:
        pytest.skip(str(error))
    run = [sys.executable, '-c']
    start = lambda code, **pipes: subprocess.Popen([*run, code, str(tmp_path)], cwd=ROOT, text=True, **pipes)
    learner = start(LEARNER, stdin=subprocess.PIPE)
    try:
        generator = start(GENERATOR, stdout=subprocess.PIPE)
        try:
            out, _ = generator.communicate(timeout=120)
        finally:
            generator.kill()
    finally:
        learner.kill()
        learner.wait()
    assert generator.returncode == 0
    expected = [f'{v} {[v + .5] * 3} bfloat16 {[[float(v)] * 2] * 2}' for v in range(3)]
    assert out.splitlines() == [line for line in expected for _ in range(2)]
