"""What a training step carries from one call to the next."""
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
    """Plain arrays only: everything needed to continue a run bit for bit.

    Attributes:
        step: int32 scalar, optimizer steps taken.
        params: nested dict.
        opt_state: optax state over `params`.
        ema: nested dict like `params` in float32, or None.
        rng: typed key; a step draws from `fold_in(rng, step)` and never replaces it.
        extra: any further arrays a step carries (the encoder's centers), or None.
    """
    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    rng: jax.Array
    extra: Any = None
