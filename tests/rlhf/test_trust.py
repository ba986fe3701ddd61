"""Names of code come from the user, never from a folder that was read."""
import json

import pytest

from experiments.rlhf.policy import rewards
from experiments.runtime import tfds_folders


def test_a_folder_may_name_rules_and_models(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    rewards.check_code({'reward.function': 'task', 'reward.gold': '', 'x': str(tmp_path)}, '--policy=x', False)


@pytest.mark.parametrize('name', ['pty:spawn', 'os:system', 'runs.stranger.evil:reward', ':'])
def test_a_folder_may_not_name_code(name):
    with pytest.raises(ValueError, match='--policy=x: its config.json names code to run, reward.gold=.*; add --trust'):
        rewards.check_code({'reward.function': 'task', 'reward.gold': name}, '--policy=x', False)
    rewards.check_code({'reward.gold': name}, '--policy=x', True)


OWN = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'


@pytest.mark.parametrize('features', [
    {'pythonClassName': 'runs.stranger.evil.Feature', 'jsonFeature': {'json': '{}'}},
    {'python_class_name': 'evil.Feature', 'jsonFeature': {'json': '{}'}},
    {'type': 'evil.Feature', 'content': {}},
    {'pythonClassName': OWN, 'featuresDict': {'features': {'a': {'sequence': {'feature': {
        'pythonClassName': 'evil.Feature'}}}}}},
    {'type': OWN, 'content': [{'type': 'tensorflow_datasets_evil.Feature', 'content': {}}]},
])
def test_features_that_are_not_of_tfds(tmp_path, features):
    (tmp_path / 'features.json').write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r'features.json: names the class .*[eE]vil.* which is not one of TFDS'):
        tfds_folders.check_features(tmp_path)


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '\xff'])
def test_features_that_cannot_be_read(tmp_path, text):
    (tmp_path / 'features.json').write_text(text)
    with pytest.raises(ValueError, match='features.json: '):
        tfds_folders.check_features(tmp_path)
