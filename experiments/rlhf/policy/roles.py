"""Which devices train and which generate, and what the settings of rollouts may say together."""
from collections.abc import Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from experiments.runtime import checks
from experiments.runtime import mesh as mesh_lib

TRANSPORTS = ('devices', 'files', 'transfer')
MOST_DIVIDED_V5E = 16  # chips of a v5e slice of whose parts libtpu (JAX 0.10.2) compiles programs; other TPUs: any


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for rollout settings that cannot work, before any data is read."""
    rollout = config.rollout
    if rollout.max_staleness < 0:
        raise ValueError(f'rollout.max_staleness={rollout.max_staleness} must be at least 0')
    checks.choice('rollout.transport', rollout.transport, TRANSPORTS)
    if rollout.devices and rollout.transport != 'devices':
        raise ValueError(f'rollout.devices={rollout.devices}: with rollout.transport={rollout.transport!r} generators '
                         'have devices of their own process; set it to 0')
    for name in ('devices', 'chunk', 'slots', 'memory', 'timeout'):
        if rollout[name] < 0:
            raise ValueError(f'rollout.{name}={rollout[name]} must be at least 0')
    host, colon, port = rollout.address.rpartition(':')
    if not (host and colon and port.isdigit()):
        raise ValueError(f'rollout.address={rollout.address!r} must be host:port, with port 0 for any that is free')
    if host in ('0.0.0.0', '[::]'):
        raise ValueError(f'rollout.address={rollout.address!r} is no address that generators can be told; give the one '
                         'of this machine in the network that they share with it')
    if rollout.num_generators < 1:
        raise ValueError(f'rollout.num_generators={rollout.num_generators} must be at least 1')
    if rollout.newest and rollout.transport != 'devices':
        raise ValueError(f'rollout.newest=True with rollout.transport={rollout.transport!r}: generators in processes '
                         'of their own are told beforehand which version each batch is of; set it to False')
    if rollout.transport == 'transfer':
        if rollout.num_generators > 1:
            raise ValueError(f"rollout.num_generators={rollout.num_generators} with rollout.transport='transfer': a "
                             'version is held until each of them has pulled it, and they would pull only those of '
                             "their own batches; set it to 1, or take 'files'")
        if rollout.chunk and rollout.max_staleness > 1:
            raise ValueError(f"rollout.chunk={rollout.chunk} with rollout.transport='transfer' and "
                             f'rollout.max_staleness={rollout.max_staleness}: a version can be pulled once, and one '
                             'taken up within a batch may be needed again for a later one; set it to 0, or take '
                             "'files'")
    if rollout.chunk and not rollout.max_staleness:
        raise ValueError(f'rollout.chunk={rollout.chunk} looks for newer weights while generating, but with '
                         'rollout.max_staleness=0 none come meanwhile; set one of them')
    if rollout.chunk and not rollout.threaded:
        raise ValueError('rollout.threaded=False generates in the loop, where no newer weights can come; set '
                         'rollout.chunk=0')
    if jax.process_count() > 1:
        check_processes(rollout)


def check_processes(rollout: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for what one process can do and several cannot."""
    count = jax.process_count()
    if rollout.slots:
        raise ValueError(f'rollout.slots={rollout.slots} of {count} processes: which rows have ended is read between '
                         'chunks by one process that has them all; set it to 0')
    if rollout.timeout:
        raise ValueError(f'rollout.timeout={rollout.timeout} of {count} processes: none may give up a batch that the '
                         'others wait for; bound the reward instead (reward.timeout) and set it to 0')
    if rollout.transport == 'transfer':
        raise ValueError(f"rollout.transport='transfer' goes from one process to one, here are {count}; use 'files', "
                         'or hosts apart in one job (rollout.devices)')
    if not rollout.devices:
        return
    for name in ('newest', 'chunk'):
        if rollout[name]:
            raise ValueError(f'rollout.{name}={rollout[name]} with hosts apart: weights pass between two batches, at a '
                             f'place that both sides know beforehand; leave it at its default')
    devices = jax.devices()
    generating = {device.process_index for device in devices[len(devices) - rollout.devices:]}
    split = generating & {device.process_index for device in devices[:len(devices) - rollout.devices]}
    if split:
        raise ValueError(f'rollout.devices={rollout.devices} divides the devices of process {min(split)}: of several '
                         f'processes whole ones generate; use a multiple of its {jax.local_device_count()} devices')


def learner_devices(config: ml_collections.ConfigDict,
                    devices: Sequence[jax.Device] | None = None) -> list[jax.Device]:
    """Devices that train, of `devices` (default: all there are): all but the last `rollout.devices`.

    Raises:
        ValueError: none would be left, or they are a part of a slice of which no part can be used.
    """
    devices, generating = list(jax.devices() if devices is None else devices), config.rollout.devices
    if generating and devices[0].device_kind == 'TPU v5 lite' and len(devices) > MOST_DIVIDED_V5E:
        raise ValueError(f'rollout.devices={generating}: programs for a part of a v5e slice of more than '
                         f'{MOST_DIVIDED_V5E} chips cannot be compiled ("limited ICI routing"), and here are '
                         f'{len(devices)}; set it to 0, or train and generate on two slices '
                         "(rollout.transport='files')")
    if generating >= len(devices):
        raise ValueError(f'rollout.devices={generating} leaves none of {len(devices)} devices to the learner; 0 shares '
                         'them')
    return devices[:len(devices) - generating]


def generator_mesh(config: ml_collections.ConfigDict, learner: Mesh | None = None,
                   devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the devices that generate, of `devices` (default: all there are); the learner's own unless
    `rollout.devices` sets some apart."""
    devices = list(jax.devices() if devices is None else devices)
    if config.rollout.devices:
        devices = devices[-config.rollout.devices:]
    elif learner is not None:
        return mesh_lib.reshaped(learner, config.rollout.mesh)
    return mesh_lib.make_mesh(config.rollout.mesh, devices)
