"""Fixtures of the commands' tests."""
import jax
import pytest


@pytest.fixture(scope='module')
def on_one_device():
    """As on a laptop; how each stage is laid out over many is tested elsewhere, and takes longer to compile."""
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda *unused: device)
        patch.setattr(jax, 'local_devices', lambda *unused, **also: device)
        yield
