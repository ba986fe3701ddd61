"""How many cores a process may use. Imports no JAX, for workers of a loader come here too."""
import os

_sharing = 1  # processes that have the cores of this one


def bound() -> frozenset[int]:
    """The cores that a launcher bound this process to; empty where the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else frozenset()


def share(processes: int) -> None:
    """From now on this process has the cores it is bound to together with others, `processes` of them in all."""
    global _sharing
    _sharing = processes


def usable() -> int:
    """Cores for this process: those its launcher bound it to, or its share of those that it has with others."""
    return max((len(bound()) or os.cpu_count() or 1) // _sharing, 1)
