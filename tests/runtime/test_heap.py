"""Memory that is freed and allocated again, in a process of its own: what is set counts for the whole process."""
import subprocess
import sys

import pytest

COUNT = '''
import ctypes, resource, threading
from experiments.runtime import heap
print(heap.keep() if {keep} else None)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 40 * 2 ** 20
def use():
    for _ in range(10):
        at = libc.malloc(size)
        libc.memset(at, 1, size)
        libc.free(at)
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if {thread}:
        thread = threading.Thread(target=use); thread.start(); thread.join()
    else:
        use()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / size
print(pages())
'''


def times_cleared(keep: bool, thread: bool, **environment: str) -> tuple[str, float]:
    """What `keep` returned, and how often the system handed out the memory of ten arrays in turn."""
    code = COUNT.format(keep=keep, thread=thread)
    out = subprocess.run([sys.executable, '-c', code], env={'PATH': '', 'PYTHONPATH': ':'.join(sys.path)} | environment,
                         capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return out[0], float(out[1])


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc')
@pytest.mark.parametrize('thread', [False, True])
def test_freed_memory_is_used_again(thread):
    kept, times = times_cleared(True, thread)
    assert kept == 'True' and times < times_cleared(False, thread)[1] / 4


def test_an_environment_that_says_otherwise_is_left_alone():
    assert times_cleared(True, False, MALLOC_TRIM_THRESHOLD_='1000000')[0] == 'False'
