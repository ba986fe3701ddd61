"""What the C library does with memory that a program on CPUs gives back."""
import ctypes
import os
import sys

# Parameters of glibc's `mallopt` (malloc.h) and what each is set to, in bytes.
_KEEP = {-1: 2 ** 31 - 1,  # M_TRIM_THRESHOLD: free memory at the end of a heap beyond which it goes to the system
         -2: 100 * 2 ** 20,  # M_TOP_PAD: what a heap is grown by at least; above 64 MiB, heaps of threads stay for good
         -3: 2 ** 30}  # M_MMAP_THRESHOLD: an array as large is mapped by itself, and unmapped when it is freed
_CHOSEN = ('GLIBC_TUNABLES', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_TOP_PAD_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_MMAP_MAX_')


def keep() -> bool:
    """From here on the process keeps memory that is freed, for what is allocated next; returns whether it can.

    A compiled program for CPUs allocates its buffers at each run and frees them. glibc returns them to the system in
    between, which clears every page when it is touched again: an eighth of the processor time of the align
    quickstart. Arrays of more than 64 MiB that a thread of XLA's allocates are returned all the same. Not done where
    the environment already says how malloc is to behave, or with another C library.
    """
    if not sys.platform.startswith('linux') or any(name in os.environ for name in _CHOSEN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return all([mallopt(parameter, value) for parameter, value in _KEEP.items()])
