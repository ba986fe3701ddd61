"""What cannot be done in several processes is said in a line, before anything is compiled."""
import sys

import jax
import pytest

from configs.rlhf import base
from experiments import evaluate_translation, lewis, quickstart
from experiments.rlhf.policy import roles


@pytest.mark.parametrize('fields, message', [
    (dict(slots=4), 'rollout.slots=4 of 2 processes'),
    (dict(timeout=9.0), r'rollout.timeout=9.0 of 2 processes: .* \(reward.timeout\)'),
    (dict(transport='transfer'), "rollout.transport='transfer' goes from one process to one, here are 2"),
    (dict(devices=4, newest=True), 'rollout.newest=True with hosts apart'),
    (dict(devices=4, chunk=2, max_staleness=1), 'rollout.chunk=2 with hosts apart'),
    (dict(devices=3), 'rollout.devices=3 divides the devices of process 1: .* multiple of its 4 devices'),
])
def test_settings_of_one_process(fields, message, monkeypatch):
    class Device:
        def __init__(self, i):
            self.process_index = i // 4
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(jax, 'devices', lambda: [Device(i) for i in range(8)])
    monkeypatch.setattr(jax, 'local_device_count', lambda: 4)
    config = base.policy().copy_and_resolve_references()
    roles.check(config)
    config.rollout.update(dict(devices=4))
    roles.check(config)
    config.rollout.update(dict(devices=0) | fields)
    with pytest.raises(ValueError, match=message):
        roles.check(config)


@pytest.mark.parametrize('address, message', [('8476', 'must be host:port'), ('host:', 'must be host:port'),
                                              ('0.0.0.0:0', 'no address that generators can be told')])
def test_an_address_that_nobody_can_reach(address, message):
    config = base.policy().copy_and_resolve_references()
    config.rollout.address = address
    with pytest.raises(ValueError, match=f'rollout.address=.* {message}'):
        roles.check(config)


@pytest.mark.parametrize('command, flag', [(lewis, 'workdir'), (quickstart, 'workdir'), (evaluate_translation, 'game')])
def test_commands_of_one_process(command, flag, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(sys, 'argv', ['command', f'--{flag}={tmp_path}'])
    with pytest.raises(ValueError, match='runs in one process, here are 2; start it once, without --distributed'):
        command.main()
    assert not list(tmp_path.iterdir())
