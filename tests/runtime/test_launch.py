import subprocess
import sys

import ml_collections
import pytest

from experiments.runtime import launch

DIGITS = 'configs/dlc/generator_digits.py'


@pytest.mark.parametrize('path, overrides, message', [
    ('configs/dlc/generator_digit.py', [], r'no file configs/dlc/generator_digit.py; did you mean configs/dlc/generator_digits.py'),
    ('configs/dlc/base.py', [], 'get_config'),
    (DIGITS, ['--config.batch_sise=3'], r'config.batch_sise is not a field; did you mean config.batch_size\?'),
    (DIGITS, ['--config.model.widht=3'], r'config.model.widht is not a field; did you mean config.model.width\?'),
    (DIGITS, ['--config.batch_size=abc'], r'config.batch_size=abc.*invalid literal for int'),
    (DIGITS, ['--config.batch_size=3.5'], r'config.batch_size=3.5.*invalid literal for int'),
    (DIGITS, ['--config.model=3'], r'config.model is a group'),
    (DIGITS, ['--config.batch_size.x=3'], r'config.batch_size is a value'),
])
def test_config_errors_name_the_field_and_the_fix(path, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        launch.load_config(path, overrides)
    assert '\n' not in str(error.value)


def test_overrides_and_arguments():
    config = launch.load_config(DIGITS + ':class', ['--config.batch_size=32', '--config.sampler.guidance_interval=(0.1, 0.9)'])
    assert config.model.condition == 'class' and config.batch_size == 32
    assert config.sampler.guidance_interval == (0.1, 0.9)


def test_config_survives_its_json(tmp_path):
    config = launch.load_config(DIGITS)
    launch.save_config(config, tmp_path)
    assert launch.read_config(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match='no config.json'):
        launch.read_config(tmp_path / 'elsewhere')


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


def test_every_command_has_help():
    for command in ('train', 'encode', 'sample', 'evaluate', 'compile', 'quickstart'):
        out = subprocess.run([sys.executable, '-m', f'experiments.{command}', '--help'], capture_output=True, text=True)
        assert out.returncode == 0 and 'usage' in out.stdout, (command, out.stderr)


def test_missing_config_is_an_error():
    with pytest.raises(ValueError, match='--config is missing'):
        launch.parse(launch.parser('x', config='y'), [])


def test_check_fields_lists_what_exists():
    launch.check_fields('data', {'path': 1}, ('path',))
    with pytest.raises(ValueError, match=r"data.zzz is not a field; the fields are \['path'\]"):
        launch.check_fields('data', ml_collections.ConfigDict({'zzz': 1}), ('path',))
