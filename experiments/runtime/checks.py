"""Checks of config fields whose errors name the nearest thing that would do."""
import difflib
from collections.abc import Iterable, Sequence


def choice(name: str, given: str, choices: Iterable[str]) -> None:
    """Raises a ValueError with the nearest choice where the field `name` holds none of `choices`."""
    choices = tuple(choices)
    if given not in choices:
        near = difflib.get_close_matches(str(given), choices, 1)
        raise ValueError(f'{name}={given!r} is not one of {choices}' + (f'; did you mean {near[0]!r}?' if near else ''))


def fields(name: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    """Raises a ValueError with the nearest allowed name for the first key of `given` that is not allowed."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, list(allowed), 1)
            raise ValueError(f'{name}.{key} is not a field' + (f'; did you mean {name}.{near[0]}?' if near else
                                                                f'; the fields are {sorted(allowed)}'))
