"""Digests see every bit, and nothing of how an array is laid out."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.runtime import mesh as mesh_lib
from experiments.runtime.digest import digests, fingerprint, json_digest

VALUES = np.random.default_rng(0).normal(size=(8, 6))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'int32', 'bool'])
def test_one_flipped_bit_changes_the_digest(dtype):
    x = np.asarray(jnp.asarray(VALUES * 50).astype(dtype))
    before = digests({'x': x})['x']
    for bit in range(1 if dtype == 'bool' else 8 * x.itemsize):
        damaged = x.copy()
        damaged.view(np.uint8)[3, 5 * x.itemsize + bit // 8] ^= 1 << bit % 8
        assert digests({'x': damaged})['x'] != before, bit
        assert fingerprint({'x': damaged}) != fingerprint({'x': x}), bit


def test_the_place_of_an_element_counts():
    x = np.asarray(VALUES, np.float32)
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({digests({'x': y})['x'] for y in (x, swapped, x.T, x[::-1])}) == 4


def test_the_layout_does_not_count():
    x, key = np.asarray(VALUES, np.float32), jax.random.key(3)
    mesh = mesh_lib.make_mesh({'fsdp': 4, 'tensor': 2})
    tree = {'x': x, 'key': key, 'scalar': np.int32(7)}
    for spec in (P(), P('fsdp'), P('fsdp', 'tensor'), P(None, 'tensor')):
        assert digests(tree | {'x': jax.device_put(x, NamedSharding(mesh, spec))}) == digests(tree)


def test_json_digest():
    assert json_digest({'a': 1, 'b': [0.1, None]}) == json_digest({'b': [0.1, None], 'a': 1})
    assert json_digest({'position': 8}) != json_digest({'position': 9})


def test_arrays_of_other_devices_than_those_of_the_mesh_that_is_set():
    """A run is read on one device, or on some, by a program that works over others."""
    x = np.arange(8, dtype=np.float32)
    mesh = mesh_lib.make_mesh({'fsdp': 4}, jax.devices()[4:])
    on_one, on_four = jax.device_put(x, jax.devices()[0]), jax.device_put(x, NamedSharding(mesh, P('fsdp')))
    with jax.set_mesh(mesh_lib.make_mesh({'data': 2}, jax.devices()[:2])):
        assert digests({'x': on_one}) == digests({'x': on_four}) == digests({'x': x})
