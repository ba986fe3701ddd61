"""What a confined program can do and what it cannot, and HumanEval's pass rates of programs run so."""
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from experiments import humaneval as command
from experiments.runtime import launch, sandbox
from rlhf_jax.tasks import humaneval


@pytest.fixture(scope='module', autouse=True)
def confined():
    try:
        sandbox.run_python('pass')
    except sandbox.Unavailable as error:
        pytest.skip(str(error))


def detail(source, **kw):
    found = sandbox.run_python(source, **kw)
    assert found.outcome == 'failed', found
    return found.detail


def test_programs_end_by_themselves():
    assert sandbox.run_python('import math, json, re, collections\nassert math.gcd(4, 6) == 2') == ('passed', '')
    assert detail('assert 1 == 2, "no"') == 'AssertionError: no'
    assert detail('def f(:') .startswith('SyntaxError')
    assert sandbox.run_python('open("mine", "w").write("x"); assert open("mine").read() == "x"').outcome == 'passed'


def test_leaving_early_is_no_success():
    assert detail('import os; os._exit(0)') == 'ended before its last line'
    assert detail('import sys; sys.exit(0)').startswith('SystemExit')
    forged = ('import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b\'["", "passed", ""]\\n\')\n'
              '    except OSError:\n        pass\n')
    assert detail(forged + 'os._exit(0)') == 'ended before its last line'
    assert detail('import os, sys\nsys._getframe(1).f_globals["say"]("passed")\nos._exit(0)').startswith('OSError')
    forked = 'import os\nif os.fork():\n    os.wait()\n    os._exit(0)'  # the child does get to the last line
    assert detail(forked) == 'ended before its last line'
    assert detail('import os; os.kill(0, 9)') == 'ended before its last line'


def test_time_and_memory_are_bounded():
    start = time.monotonic()
    assert sandbox.run_python('while True: pass', seconds=1).outcome == 'timed out'
    assert sandbox.run_python('import time; time.sleep(60)', seconds=1).outcome == 'timed out'
    assert time.monotonic() - start < 20
    assert detail('x = bytearray(2 ** 31)') == 'MemoryError: '
    assert sandbox.run_python('x = bytearray(2 ** 29)').outcome == 'passed'


def test_memory_processes_and_files_are_bounded_together():
    held = ('import os, time\nr, w = os.pipe()\nfor i in range(4):\n    if os.fork() == 0:\n        '
            'b = bytearray(%d * 2 ** 20)\n        for i in range(0, len(b), 4096):\n            b[i] = 1\n        '
            'os.write(w, b"x")\n        time.sleep(2)\n        os._exit(0)\n'
            'while i >= 0:\n    i -= len(os.read(r, 1))\ntime.sleep(0.3)')
    assert detail(held % 150, memory=2 ** 28) == f'MemoryError: its processes hold more than {2 ** 28} bytes'
    assert sandbox.run_python(held % 30, memory=2 ** 28) == ('passed', '')
    many = 'import os, time\nfor i in range(50):\n    if os.fork() == 0:\n        time.sleep(1)\n        os._exit(0)'
    assert detail(many).startswith('BlockingIOError')
    assert detail('for i in range(4):\n    open(f"f{i}", "wb").write(bytes(2 ** 23))').startswith('OSError: [Errno 28]')
    assert sandbox.run_python('for i in range(3):\n    open(f"f{i}", "wb").write(bytes(2 ** 22))') == ('passed', '')


def test_files_outside_are_neither_read_nor_written(tmp_path):
    secret, at = tmp_path / 'secret', str(tmp_path)
    secret.write_text('key')
    assert 'Permission denied' in detail(f'open({str(secret)!r}).read()')
    assert 'Permission denied' in detail(f'open({at!r} + "/new", "w")')
    assert 'Permission denied' in detail(f'import os; os.listdir({at!r})')
    assert 'Permission denied' in detail(f'import os; os.remove({str(secret)!r})')
    assert 'Permission denied' in detail('open("/proc/self/environ").read()')
    assert detail(f'import os; os.symlink({str(secret)!r}, "link"); open("link").read()').startswith('PermissionError')
    assert secret.read_text() == 'key' and list(tmp_path.iterdir()) == [secret]


def test_there_is_no_network():
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        assert 'Error' in detail(f'import socket; socket.create_connection(("127.0.0.1", {port}), 2)')
        udp = f'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))'
        assert 'Network is unreachable' in detail(udp)


def test_the_environment_and_other_processes_are_out_of_reach(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'key')
    assert sandbox.run_python('import os; assert "OPENAI_API_KEY" not in os.environ').outcome == 'passed'
    assert sandbox.run_python('import os; assert os.getpid() == 2').outcome == 'passed'
    assert detail(f'import os; os.kill({os.getpid()}, 0)').startswith('ProcessLookupError')


def test_what_a_program_starts_dies_with_it(tmp_path):
    """A process of its own session that would outlive it, and be seen by its command line."""
    mark = f'left_behind_{os.getpid()}_{threading.get_ident()}'
    source = (f'import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    '
              f'os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60) # {mark}"])\n'
              'time.sleep(1)')
    assert sandbox.run_python(source).outcome == 'passed'
    assert not running(mark)


def test_a_program_that_gave_up_its_parent_ends_in_time():
    mark = f'left_behind_{os.getpid()}_{threading.get_ident()}'
    source = ('import ctypes, os, sys\nos.setsid()\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n'
              f'os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(30) # {mark}"])')
    assert sandbox.run_python(source, seconds=1).outcome == 'timed out'
    assert not running(mark)


def test_a_program_dies_with_the_process_that_runs_it():
    mark = f'left_behind_{os.getpid()}_{threading.get_ident()}'
    source = ('import os, sys\n'
              f'os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(30) # {mark}"])')
    code = 'import sys; from experiments.runtime import sandbox; sandbox.run_python(sys.stdin.read(), seconds=30)'
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE) as process:
        process.stdin.write(source.encode())
        process.stdin.close()
        wait_until(lambda: running(mark))
        process.kill()
    wait_until(lambda: not running(mark))


def running(mark):
    """Whether a process has `mark` in its command line; -ww, or ps cuts the line at 80 columns."""
    return mark in subprocess.run(['ps', '-wweo', 'args'], capture_output=True, text=True, check=True).stdout


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_where_the_kernel_refuses_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, '_LAUNCHER', sandbox._LAUNCHER.replace('version < 6', 'version < 600'))
    with pytest.raises(sandbox.Unavailable, match=r'confined on this machine \(landlock: version 6 is needed'):
        sandbox.run_python('pass')


# ---- HumanEval -------------------------------------------------------------------------------------------------------

PROBLEM = dict(task_id='HumanEval/0', prompt='def double(x):\n    """Twice x."""\n', entry_point='double',
               test='def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n')


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['humaneval', *map(str, arguments)])
    launch.main(command.main)


def test_completions_are_cut_where_the_function_ends():
    assert humaneval.cut('    return 2 * x\n\ndef other():\n    pass\n') == '    return 2 * x\n'
    assert humaneval.cut('    if x:\n        return 1\n    # no\n') == '    if x:\n        return 1\n    # no\n'
    assert humaneval.cut('    return 1\nif __name__ == "__main__":') == '    return 1'


def test_pass_rates_are_unbiased_and_only_of_enough_samples():
    found = humaneval.pass_rates({'a': [True, False, False, False], 'b': [True, True, False, False]}, ks=(1, 2, 10))
    assert found == {'pass_at_1': pytest.approx(0.375), 'pass_at_2': pytest.approx((0.5 + 5 / 6) / 2)}


def test_programs_of_a_policy(tmp_path, monkeypatch, capsys):
    completions = ['    return 2 * x\n\nprint(1/0)', '    return x * x', '    while True: pass', '    return x +']
    rows = [PROBLEM | {'completion': c} for c in completions]
    rows += [PROBLEM | {'task_id': 'HumanEval/1', 'completion': '    return x + x'}] * 4
    (tmp_path / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    run(monkeypatch, f'--samples={tmp_path / "samples.jsonl"}', '--seconds=2', '--parallel=4',
        f'--json={tmp_path / "out.json"}', f'--out={tmp_path / "ends.jsonl"}')
    out = json.loads(capsys.readouterr().out)
    assert out == json.loads((tmp_path / 'out.json').read_text()) == {
        'problems': 2, 'programs': 8, 'timed_out': 0.125, 'pass_at_1': 0.625}
    ends = [json.loads(line) for line in (tmp_path / 'ends.jsonl').read_text().splitlines()]
    assert [end['outcome'] for end in ends] == ['passed', 'failed', 'timed out', 'failed'] + ['passed'] * 4
    assert ends[1]['detail'].startswith('AssertionError') and ends[3]['detail'].startswith('SyntaxError')


@pytest.mark.parametrize('content, argument, message', [
    ('', '', 'holds no row'), ('x', '', 'line 1 is no JSON object'),
    (json.dumps(PROBLEM), '', 'line 1 has no completion'), ('{}', '', 'line 1 has no task_id'),
    ('', '--seconds=0', '--seconds=0.0 must be at least 0.1'), ('', '--parallel=0', '--parallel=0 must be at least 1'),
    ('', '--json=samples.jsonl/x', '--json'), ('', '--samples=none', '--samples=none: cannot be read (No such file')])
def test_bad_input_is_one_line(content, argument, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('samples.jsonl').write_text(content)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, '--samples=samples.jsonl', *filter(None, [argument]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count('\n') == 1
