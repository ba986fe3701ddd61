"""Runs Python source that nobody has read, in a process that can do little: for programs that a model wrote.

The process sees no network (a network namespace of its own), reads no file but Python's and the system's libraries,
writes none but in a temporary folder (Landlock), signals nobody, has bounded memory, files and time, and everything
that it starts dies with it (a process namespace of its own, whose first process is not the program). Linux only; where
the kernel refuses any of this, nothing is run. It is made against mistakes and mischief, not against an attack on the
kernel. Nor can the verdict be held against a program that means to forge it: tests and program share a process, and one
that searches the frames above it for the status of success, or answers with objects that equal everything, passes.

What is bounded: the address space and the processor time of each process; the number of processes and threads, which
are counted for all of them; the folder's files, together (a file system of its own in memory); the memory of all
processes together, at twenty looks a second, a page that two share counted for both. What is not: the memory that all
may take between two looks, or have in no process's pages (memfd, System V shared memory), and, on a kernel without
/proc/PID/task/TID/children, the memory of all together, which then is that of one process times their number.
Where the caller is root, a program that means to can have its processes uncounted.
"""
import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from typing import NamedTuple

FILES = 2 ** 24  # bytes, of all files together
PROCESSES = 32  # and threads, together with the two that wait for the program

# Read by a Python that starts without site-packages. Its first line of standard input is the settings, the rest the
# source. It stays outside and waits; its child is the first process of the namespace, whose end is everybody's; that
# one's child runs the source. What the two have to say goes to a pipe that is closed before the source is run: the
# source's process tells how it ended by its exit status alone, and of a failure the reason on a pipe of its own.
_LAUNCHER = r'''
import ctypes, json, os, resource, signal, struct, sys
settings = json.loads(sys.stdin.readline())
source = sys.stdin.read()
pipe = settings['pipe']

def say(outcome, detail=''):
    os.write(pipe, (json.dumps([outcome, detail[:300]]) + '\n').encode())

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        say('refused', name + ': ' + os.strerror(ctypes.get_errno()))
        os._exit(1)
    return result

def landlock():
    version = call('syscall', 444, None, 0, 1)
    if version < 6:
        say('refused', 'landlock: version 6 is needed, the kernel has %d' % version)
        os._exit(1)
    every, read, on_files = (1 << 16) - 1, 0b1101, 0b1100000000000111
    attributes = struct.pack('QQQ', every, 0b11, 0b11)
    rules = call('syscall', 444, attributes, len(attributes), 0)
    for path, write in settings['paths']:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = (every if write else read) & (every if os.path.isdir(path) else on_files)
        call('syscall', 445, rules, 1, struct.pack('=Qi', allowed, place), 0)
        os.close(place)
    call('prctl', 38, 1, 0, 0, 0)   # no new privileges
    call('syscall', 446, rules, 0)
    os.close(rules)

def run(status, words):
    try:
        exec(compile(source, 'program', 'exec'), {'__name__': '__main__'})
    except BaseException as error:
        os.write(words, (type(error).__name__ + ': ' + str(error)).encode(errors='replace')[:300])
        os._exit(1)
    os._exit(status)

def in_memory():
    pages, found = 0, [os.readlink('/proc/self')]   # in the numbers of this /proc, which is the one outside
    for process in found:
        try:
            for task in os.listdir('/proc/%s/task' % process):
                with open('/proc/%s/task/%s/children' % (process, task)) as file:
                    found += file.read().split()
            with open('/proc/%s/statm' % process) as file:
                _, resident, shared = map(int, file.read().split()[:3])
        except OSError:
            continue   # it ended meanwhile
        pages += resident - shared
    return pages * resource.getpagesize()

signals = {signal.SIGTERM, signal.SIGCHLD}
signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # a caller may have ignored it
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
user, group = os.geteuid(), os.getegid()
if user == 0:
    try:
        os.setresuid(65534, 0, 0)   # the kernel does not count the processes of whose real user is root
    except OSError:
        pass   # a root that knows no other users, of a namespace: its processes are counted
call('unshare', 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x20000)   # user, network, processes, IPC, mounts
try:
    for name, text in ('setgroups', 'deny'), ('uid_map', '65534 %d 1' % user), ('gid_map', '65534 %d 1' % group):
        with open('/proc/self/' + name, 'w') as file:
            file.write(text)   # without a user of its own the namespace makes no file in what it mounts
except OSError as error:
    say('refused', name + ': ' + str(error.strerror))
    os._exit(1)
call('mount', b'tmpfs', os.fsencode(settings['folder']), b'tmpfs', 6, settings['tmpfs'].encode())   # no suid or devices
call('prctl', 1, 9, 0, 0, 0)   # dies with its parent
first = os.fork()
if first:
    os.close(pipe)
    signal.sigwait(signals)   # it ended, or is to end
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)   # returns when the whole namespace has ended
    os._exit(0)
call('prctl', 1, 9, 0, 0, 0)
passed = 2 + int.from_bytes(os.urandom(4), 'big') % 254
reader, words = os.pipe()
child = os.fork()
if child:
    os.close(words)
    ended, most = 0, settings['limits']['RLIMIT_AS']
    while ended != child:
        ended, status = os.waitpid(-1, os.WNOHANG)   # orphans of the namespace are waited for as well
        if not ended:
            if in_memory() > most:
                say('failed', 'MemoryError: its processes hold more than %d bytes' % most)
                os._exit(0)
            signal.sigtimedwait({signal.SIGCHLD}, 0.05)
    status = os.waitstatus_to_exitcode(status)
    os.set_blocking(reader, False)
    try:
        detail = os.read(reader, 300).decode(errors='replace') if status == 1 else ''
    except BlockingIOError:
        detail = ''
    if status == passed:
        say('passed')
    else:
        say('failed', detail or 'ended before its last line')
    os._exit(0)
os.close(reader)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
landlock()
for name, value in settings['limits'].items():
    resource.setrlimit(getattr(resource, name), (value, value))
os.chdir(settings['folder'])
sys.stdin = open(os.devnull)
os.close(pipe)
run(passed, words)
'''


class Outcome(NamedTuple):
    """How a program ended: 'passed', 'failed' or 'timed out', and what is known of a failure."""
    outcome: str
    detail: str = ''


class Unavailable(OSError):
    """This machine cannot confine a process; nothing was run."""


def run_python(source: str, *, seconds: float = 10.0, memory: int = 2 ** 30) -> Outcome:
    """Runs `source` to its end. It passes if it gets there without an exception; leaving early is a failure.

    Args:
        seconds: it may take.
        memory: bytes of address space of each process, and of what all of them hold together.

    Raises:
        Unavailable: the kernel refused a part of the sandbox.
    """
    if sys.platform != 'linux':
        raise Unavailable(f'a sandbox for programs needs Linux, this is {sys.platform}')
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        settings = {'pipe': writer, 'folder': folder, 'paths': [*_readable(), (folder, True)],
                    'limits': {'RLIMIT_CPU': int(seconds) + 1, 'RLIMIT_AS': memory, 'RLIMIT_FSIZE': FILES,
                               'RLIMIT_NOFILE': 64, 'RLIMIT_NPROC': PROCESSES, 'RLIMIT_CORE': 0},
                    'tmpfs': f'mode=700,size={FILES},nr_inodes=1024'}
        process = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', _LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(writer,), start_new_session=True, cwd=folder,
            env={'PATH': '/usr/bin:/bin', 'HOME': folder, 'LC_ALL': 'C.UTF-8', 'OPENBLAS_NUM_THREADS': '1'})
        os.close(writer)
        late = False
        try:
            process.communicate((json.dumps(settings) + '\n' + source).encode(errors='replace'), timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill(process)
        said = _read(reader)
    if said and said[0] == 'refused':
        raise Unavailable(f'programs cannot be confined on this machine ({said[1]}); run it on one with user '
                          'namespaces and Landlock 6 (Linux 6.12), or in a virtual machine')
    if late:
        return Outcome('timed out', f'after {seconds:g} s')
    return Outcome(*said) if said else Outcome('failed', 'ended before its last line')


def _kill(process: subprocess.Popen) -> None:
    """Has the launcher end the first process of the namespace, and with it all others, and wait for that."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:  # it had not come to listen: the first process is still of its group
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(reader: int) -> list[str] | None:
    """The one message in the pipe, which is closed."""
    os.set_blocking(reader, False)
    try:
        content = os.read(reader, 2 ** 16)
    except BlockingIOError:
        content = b''
    finally:
        os.close(reader)
    return json.loads(content.splitlines()[0]) if content else None


@functools.cache
def _readable() -> tuple[tuple[str, bool], ...]:
    """Python's own files and the system's libraries."""
    paths = {sys.base_prefix, sys.prefix, *sysconfig.get_paths().values(), '/lib', '/lib64', '/usr/lib', '/usr/lib64',
             '/usr/share/zoneinfo', '/etc/ld.so.cache', '/dev/null', '/dev/zero', '/dev/urandom'}
    return tuple((path, path == '/dev/null') for path in sorted(paths))
