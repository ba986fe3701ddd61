"""State dicts on disk: those of the language half, see `rlhf_jax.convert.files`."""
from rlhf_jax.convert.files import load_state_dict, read_config, save, save_state_dict

__all__ = ['load_state_dict', 'read_config', 'save', 'save_state_dict']
