"""Work directories of programs of several stages."""
import logging

import ml_collections
import pytest

from experiments.runtime import config_files, stages


def config_of(**fields):
    return ml_collections.ConfigDict({'model': {'width': 8, 'sizes': (1, 2)}, **fields})


def test_the_same_config_goes_on(tmp_path, caplog):
    for _ in range(2):
        assert stages.claim(config_of(seed=1), tmp_path) == tmp_path
    assert not caplog.records


@pytest.mark.parametrize('other, says', [
    (config_of(seed=2), r'seed \(1 -> 2\)'),
    (config_of(seed=1, model={'width': 9, 'sizes': (1, 2)}), r'model.width \(8 -> 9\)'),
    (config_of(), r'seed \(1 -> None\)'),
])
def test_another_config_is_refused_by_the_names_of_its_fields(other, says, tmp_path):
    stages.claim(config_of(seed=1), tmp_path)
    with pytest.raises(ValueError, match=f'another config: {says}; choose another --workdir or delete it'):
        stages.claim(other, tmp_path)
    assert config_files.read(tmp_path).seed == 1


def test_a_place_that_cannot_be_written_is_named_with_its_flag(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='--workdir: .*file/run cannot be written .*; choose another place'):
        stages.claim(config_of(seed=1), tmp_path / 'file' / 'run')


def test_a_field_that_was_not_there_yet_is_said_and_taken(tmp_path, caplog):
    stages.claim(config_of(seed=1), tmp_path)
    with caplog.at_level(logging.WARNING):
        stages.claim(config_of(seed=1, in_memory=False), tmp_path)
    assert 'begun before these fields existed: in_memory (None -> False)' in caplog.text
    assert config_files.read(tmp_path).in_memory is False
