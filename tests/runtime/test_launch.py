import importlib
import os
import pathlib
import signal
import subprocess
import sys

import jax
import ml_collections
import pytest

from experiments.runtime import checks, config_files, launch, signals

DIGITS = 'configs/dlc/generator_digits.py'


@pytest.mark.parametrize('path, overrides, message', [
    ('configs/dlc/generator_digit.py', [],
     r'no file configs/dlc/generator_digit.py; did you mean configs/dlc/generator_digits.py'),
    ('configs/dlc/base.py', [], 'get_config'),
    (DIGITS, ['--config.batch_sise=3'], r'config.batch_sise is not a field; did you mean config.batch_size\?'),
    (DIGITS, ['--config.model.widht=3'], r'config.model.widht is not a field; did you mean config.model.width\?'),
    (DIGITS, ['--config.batch_size=abc'], r'config.batch_size=abc.*invalid literal for int'),
    (DIGITS, ['--config.batch_size=3.5'], r'config.batch_size=3.5.*invalid literal for int'),
    (DIGITS, ['--config.model=3'], r'config.model is a group'),
    (DIGITS, ['--config.batch_size.x=3'], r'config.batch_size is a value'),
    ('configs/rlhf/arithmetic.py:onlne_dpo', [], r"arithmetic: 'onlne_dpo' is not .*; did you mean 'online_dpo'\?"),
    ('configs/rlhf/translation.py:smal_game', [], r"'smal_game' is not one of .*; did you mean 'small_game'\?"),
    ('configs/dlc/code_model_imagenet.py:smal_L32', [], r"'smal_L32' is not one of .*; did you mean 'small_L32'\?"),
    ('configs/dlc/generator_imagenet.py:clas', [], r"'clas' is not one of .*; did you mean 'class'\?"),
    ('configs/rlhf/sft_gsm8k.py:foo', [], r'gsm8k.py:foo: this config has no sizes to choose .*; leave out :foo'),
])
def test_config_errors_name_the_field_and_the_fix(path, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        config_files.load(path, overrides)
    assert '\n' not in str(error.value)


def test_configs_are_found_beside_the_runner_from_any_folder(tmp_path, monkeypatch):
    """Also where the current folder has a package `configs` of its own, and from another process."""
    expected = config_files.load(DIGITS).to_dict()
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').write_text('')
    (tmp_path / 'configs' / 'mine.py').write_text(
        'import ml_collections\nfrom configs.dlc import base\n'
        'def get_config(): return ml_collections.ConfigDict({"base": base.__file__})')
    code = ('from experiments.runtime import config_files; '
            f'config = config_files.load("{DIGITS}"); mine = config_files.load("configs/mine.py"); '
            'print(config.num_steps, mine.base)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(config_files.CHECKOUT)})
    base = config_files.CHECKOUT / 'configs' / 'dlc' / 'base.py'
    assert done.stdout.split() == [str(expected['num_steps']), str(base)], done.stderr
    monkeypatch.chdir(tmp_path)
    for takes in ('*args', '*args, **fields', '**fields', 'size="a"'):  # none of which has to be given
        (tmp_path / 'own.py').write_text(f'import ml_collections\ndef get_config({takes}): '
                                         'return ml_collections.ConfigDict({"a": 1})')
        assert config_files.load('own.py').a == 1
    assert config_files.load(DIGITS).to_dict() == expected
    with pytest.raises(ValueError, match='did you mean configs/dlc/generator_digits.py'):
        config_files.load('configs/dlc/generator_digit.py')


def test_an_option_of_a_task_that_the_file_leaves_out_can_be_set():
    options = lambda path, *fields: config_files.load(
        path, [f'--config.data.options.{field}' for field in fields]).data.options.to_dict()
    assert options('configs/rlhf/sft_no_robots.py', 'answers=every', 'date=2024-10-11') == dict(
        answers='every', date='2024-10-11')
    assert options('configs/rlhf/sft_gsm8k.py', 'keep_annotations=True') == dict(keep_annotations=True)
    assert options('configs/rlhf/sft_imdb.py', 'held_out=0.5', 'held_out=0.1') == dict(held_out=0.1)
    before = options('configs/rlhf/sft_arithmetic.py')
    assert options('configs/rlhf/sft_arithmetic.py', 'num_heldout=3', 'seed=1') == before | dict(num_heldout=3, seed=1)
    with pytest.raises(ValueError, match='config.data.options.answers is a value, not a group'):
        options('configs/rlhf/sft_no_robots.py', 'answers=every', 'answers.x=1')


def test_overrides_and_arguments():
    config = config_files.load(
        DIGITS + ':class', ['--config.batch_size=32', '--config.sampler.guidance_interval=(0.1, 0.9)'])
    assert config.model.condition == 'class' and config.batch_size == 32
    assert config.sampler.guidance_interval == (0.1, 0.9)


def test_config_survives_its_json(tmp_path):
    config = config_files.load(DIGITS)
    config_files.save(config, tmp_path)
    assert config_files.read(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match='no config.json'):
        config_files.read(tmp_path / 'elsewhere')


def test_user_errors_are_one_line_and_defects_keep_their_traceback(capsys):
    def user():
        raise ValueError('first line\nsecond line')
    with pytest.raises(SystemExit) as stop:
        launch.main(user)
    assert stop.value.code == 2 and capsys.readouterr().err.strip() == 'error: first line second line'

    def defect():
        raise AssertionError('ours')
    with pytest.raises(AssertionError):
        launch.main(defect)


COMMANDS = ('train', 'encode', 'sample', 'evaluate', 'compile', 'quickstart')


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [command, '--help'])
    with pytest.raises(SystemExit) as stop:
        launch.main(importlib.import_module(f'experiments.{command}').main)
    assert stop.value.code == 0 and 'usage' in capsys.readouterr().out


def test_what_is_no_command_names_the_one_there_is():
    done = subprocess.run([sys.executable, '-m', 'experiments.readiness', '--help'], capture_output=True, text=True,
                          cwd=config_files.CHECKOUT)
    assert done.returncode == 2 and 'python -m experiments.compile --all' in done.stderr, done.stderr


@pytest.mark.parametrize('command, config, says', [
    ('train', 'dlc/quickstart', "no field 'experiment', which this command reads; it is for python -m "
                                'experiments.quickstart'),
    ('train', 'dlc/mixture', 'for python -m experiments.mixture'),
    ('compile', 'rlhf/lewis', 'for python -m experiments.lewis'),
    ('sweep --workdir=w', 'rlhf/quickstart', 'for python -m experiments.quickstart --which=rlhf'),
    ('lewis', 'dlc/quickstart_align', "no field 'game', which this command reads; it is for python -m "
                                      'experiments.quickstart --which=align'),
    ('mixture', 'rlhf/lewis', 'for python -m experiments.lewis'),
    ('quickstart', 'dlc/encoder_digits', 'for python -m experiments.train'),
    ('quickstart', 'dlc/quickstart_text', 'for python -m experiments.quickstart --which=text'),
    ('quickstart --which=rlhf', 'dlc/quickstart', "no field 'sft', which this command reads; it is for python -m "
                                                  'experiments.quickstart'),
    ('convert --kind=sem --src=x --dst=y', 'dlc/quickstart', 'for python -m experiments.quickstart'),
])
def test_the_config_of_another_command_is_refused_with_its_name(command, config, says, tmp_path, monkeypatch, capsys):
    command, *flags = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [command, *flags, f'--config=configs/{config}.py'])
    with pytest.raises(SystemExit) as stop:
        launch.main(importlib.import_module(f'experiments.{command}').main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f'error: --config=configs/{config}.py has no field')
    assert error.endswith(f'{says}\n') and error.count('\n') == 1 and not list(tmp_path.iterdir())


def test_commands_start_without_what_takes_seconds_to_import():
    slow = ('sklearn', 'matplotlib', 'grain', 'tensorboardX', 'tensorflow', 'tensorflow_datasets', 'torch')
    modules = ', '.join(f'experiments.{c}' for c in COMMANDS)
    code = f'import {modules}, sys; print([m for m in {slow} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == '[]', out.stdout + out.stderr


def test_missing_config_is_an_error():
    with pytest.raises(ValueError, match='--config is missing'):
        launch.parse(launch.parser('x', config='y'), [])


def test_check_fields_lists_what_exists():
    checks.fields('data', {'path': 1}, ('path',))
    with pytest.raises(ValueError, match=r"data.zzz is not a field; the fields are \['path'\]"):
        checks.fields('data', ml_collections.ConfigDict({'zzz': 1}), ('path',))


def test_a_config_is_read_afresh_whatever_was_read_before():
    """`configs/dlc/base.py` has no `get_config`, and must not borrow that of another file."""
    config_files.load(DIGITS)
    with pytest.raises(ValueError, match='no get_config'):
        config_files.load('configs/dlc/base.py')


def test_overrides_may_stand_apart_from_their_values():
    p = launch.parser('x', config='y')
    args, config = launch.parse(p, [f'--config={DIGITS}', '--config.batch_size', '16', '--traceback'])
    assert config.batch_size == 16 and args.traceback


def test_a_workdir_tells_what_has_changed(tmp_path, caplog):
    config = config_files.load(DIGITS)
    config_files.save(config, tmp_path)
    config_files.check_workdir(config, tmp_path)
    assert not caplog.records
    changed = config_files.load(DIGITS, ['--config.num_steps=7', '--config.optimizer.b1=0.5'])
    config_files.check_workdir(changed, tmp_path)
    assert 'num_steps (2000 -> 7), optimizer.b1 (0.9 -> 0.5)' in caplog.text


def test_a_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGTERM)
    caught = []
    try:
        signal.signal(signal.SIGTERM, lambda *unused: caught.append(1))
        with pytest.raises(signals.Stopped) as stopped:
            with signals.signals.raising('go on', None):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.code == 128 + signal.SIGTERM and 'go on' in stopped.value.message and caught == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_equal_programs_are_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    monkeypatch.setattr(launch, 'LEAST_SECONDS', 0.0)
    one = jax.devices()[0]
    with launch.equal_programs_once():
        folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
        kept = []
        for _ in range(2):
            jax.jit(lambda x: x * 3 + 1, device=one)(2.0).block_until_ready()
            kept.append(sorted(path.name for path in folder.glob('*-cache')))
            jax.clear_caches()
    assert kept[0] and kept[0] == kept[1]
    assert not folder.exists() and jax.config.jax_compilation_cache_dir is None
    jax.jit(lambda x: x * 5 + 1, device=one)(2.0).block_until_ready()  # nothing is kept any more
    assert not folder.exists()


def test_a_cache_that_was_asked_for_is_the_one_that_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    jax.config.update('jax_compilation_cache_dir', str(tmp_path))
    try:
        with launch.equal_programs_once():
            assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update('jax_compilation_cache_dir', None)


def test_no_compilation_cache_for_several_cpu_devices(tmp_path, caplog):
    launch.initialize(launch.parser('x').parse_args([f'--compilation_cache={tmp_path}']))
    assert 'left off' in caplog.text and jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize('backend, kept', [('cpu', 1), ('tpu', 0), ('gpu', 0)])
def test_freed_memory_is_kept_where_programs_run_on_cpus(monkeypatch, backend, kept):
    calls = []
    monkeypatch.setattr(launch.heap, 'keep', lambda: calls.append(1))
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    launch.initialize(launch.parser('x').parse_args([]))
    assert len(calls) == kept


def test_our_messages_are_shown_although_orbax_has_set_up_logging():
    code = ('import logging, orbax.checkpoint; from experiments.runtime import launch\n'
            'def command():\n'
            '    for name in ("__main__", "experiments.train", "rlhf_jax.rollout", "somebody", "absl"):\n'
            '        logging.getLogger(name).info("info of %s", name)\n'
            '        logging.getLogger(name).warning("warning of %s", name)\n'
            'launch.main(command)')
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr.splitlines()
    assert said == [f'{kind[0].upper()} {kind} of {name}' for name in ('__main__', 'experiments.train',
                    'rlhf_jax.rollout') for kind in ('info', 'warning')] + ['W warning of somebody']


@pytest.mark.parametrize('text', ['', '{', 'null', '[1]', '\x00\x00', '[' * 100_000])
def test_a_damaged_config_is_written_anew_by_the_command_of_the_run(tmp_path, text, caplog):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(config_files.DamagedConfig, match='damaged .*; the command that the run was started with'):
        config_files.read(tmp_path)
    config = config_files.load(DIGITS)
    config_files.check_workdir(config, tmp_path)
    assert 'damaged' in caplog.text
    config_files.save(config, tmp_path)
    assert config_files.read(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize('mode, warns', [(0o700, False), (0o755, False), (0o775, True), (0o777, True)])
def test_a_cache_that_others_can_write_is_said_to_be_code(tmp_path, caplog, monkeypatch, mode, warns):
    tmp_path.chmod(mode)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    monkeypatch.setattr(jax.config, 'update', lambda *unused: None)
    launch.initialize(launch.parser('x').parse_args([f'--compilation_cache={tmp_path}']))
    assert ('others can write there' in caplog.text) == warns
