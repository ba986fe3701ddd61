"""Refusal of what would not fit into memory or onto a disk, before any of it is taken."""
import pathlib
import re
import resource
import shutil

SHARE = 0.8  # of the memory that is free; the rest is for everything else


def available() -> float:
    """Bytes that this process may still take: what the machine, its control group and `ulimit -v` leave."""
    import psutil
    limits = [psutil.virtual_memory().available]
    group = pathlib.Path('/sys/fs/cgroup')
    try:
        most, taken = (int((group / name).read_text()) for name in ('memory.max', 'memory.current'))
        cached = re.search(r'^inactive_file (\d+)', (group / 'memory.stat').read_text(), re.MULTILINE)
        limits.append(most - taken + int(cached[1] if cached else 0))
    except (OSError, ValueError):  # no control group, or one without a limit ('max')
        pass
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - psutil.Process().memory_info().vms)
    return float(max(min(limits), 0))


def check(nbytes: float, what: str, cure: str) -> None:
    """Raises a ValueError of one line, naming `what` and `cure`, where `nbytes` are more than there are."""
    free = available()
    if nbytes > SHARE * free:
        raise ValueError(f'{what} would take {nbytes / 2 ** 30:,.1f} GiB of the {free / 2 ** 30:,.1f} GiB of memory '
                         f'that are free; {cure}')


def check_disk(nbytes: float, folder: str | pathlib.Path, what: str, cure: str) -> None:
    """Raises a ValueError of one line, naming `what` and `cure`, where `nbytes` are more than the disk of `folder` has
    free."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ValueError(f'{what} would take {nbytes / 2 ** 30:,.1f} GiB of the {free / 2 ** 30:,.1f} GiB that are '
                         f'free at {folder}; {cure}')
