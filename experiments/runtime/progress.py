"""Progress bars."""
from collections.abc import Callable

import jax
from tqdm import tqdm


def bar(description: str, total: int, unit: str = 'sample') -> Callable[[int], None]:
    """Shows a bar on the terminal of the first process; what is returned takes how many of `total` are done."""
    shown = tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, disable=jax.process_index() != 0)

    def update(done: int) -> None:
        shown.update(done - shown.n)
        if done >= total:
            shown.close()
    return update
