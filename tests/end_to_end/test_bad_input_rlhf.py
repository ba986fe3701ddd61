"""What a user of policy runs may get wrong, through the real commands: one line that names the field and the fix.

What a config or its files say is told before anything is computed; what a reward function does, at the first batch.
"""
import json
import re
import sys

import jax
import pytest

from experiments import generate, train
from experiments.rlhf.models import architecture
from experiments.rlhf.policy import experiment as policy
from experiments.rlhf.policy import generator as generator_lib
from experiments.rlhf.policy import rollouts
from experiments.runtime import config_files, launch, loop
from experiments.runtime.metrics import read_metrics
from policy_runs import config_of, devices, shared_steps
from rlhf_jax import convert
from rlhf_jax.weights import files

COMMANDS = {'train': train, 'generate': generate}
CONFIG = """
from policy_runs import config_of

def get_config(task='arithmetic'):
    path = {at!r} + dict(gsm8k='/sums.jsonl', imdb='/texts.jsonl').get(task, '')
    fields = dict(data__task=task, data__path=path, data__options={{}}, data__num_rows=0)
    return config_of(**(fields if task != 'arithmetic' else {{}})).lock()
"""


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """Names that stand in the arguments below -> what is there."""
    from tokenizers import Tokenizer, models
    root = tmp_path_factory.mktemp('places')
    (root / 'tiny.py').write_text(CONFIG.format(at=str(root)))
    words = Tokenizer(models.WordLevel({'a': 0, 'b': 1, '[UNK]': 2}, unk_token='[UNK]'))
    (root / 'endless').mkdir()
    words.save(str(root / 'endless' / 'tokenizer.json'))
    rows = [{'question': f'What is {i} + 1?', 'answer': f'{i + 1} #### {i + 1}'} for i in range(6)]
    del rows[3]['answer']
    (root / 'sums.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    (root / 'texts.jsonl').write_text('\n'.join(json.dumps({'text': f'Film {i}.', 'label': 1}) for i in range(20)))
    config = config_of()
    config_files.save(config, root / 'in_one_process')
    config_files.save(config_of(rollout__transport='files'), root / 'in_processes')
    module = architecture.decoder(config.model)
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), jax.eval_shape(
        architecture.init_decoder(config), jax.random.key(0)))
    files.save(root / 'hf', convert.to_torch('gpt_neox', module, zeros), convert.config_of('gpt_neox', module))
    return root


@pytest.fixture
def call(places, monkeypatch, capfd):
    """Runs a command in this process: exit status and what it said on stderr."""
    def run(command, arguments):
        monkeypatch.setattr(sys, 'argv', [command, *arguments.format(at=places).split()])
        capfd.readouterr()
        try:
            launch.main(COMMANDS[command].main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, capfd.readouterr()[1]
    return run


@pytest.fixture
def nothing_computed(monkeypatch):
    """Running a function compiled for the run, or its loop, before the error is a defect and keeps its traceback."""
    assert policy  # the runner imports it late; its own compiled functions are not to be made under the patch
    def refuse(*unused, **also):
        raise AssertionError('computed something before the error')
    monkeypatch.setattr(jax, 'jit', lambda *unused, **also: refuse)
    monkeypatch.setattr(loop, 'run', refuse)


POLICY = '--config={at}/tiny.py --workdir={at}/new --config.'
TASKS = {'field missing': 'gsm8k', 'no path': 'gsm8k', 'no rule': 'imdb'}  # others are of arithmetic
BAD = {
    # ---- Names -------------------------------------------------------------------------------------------------------
    'algorithm': ('algorithm.name=online_dop', "algorithm.name='online_dop' is not one of .*did you mean 'online_dpo'"),
    'task': ('data.task=arithmetics', "data.task='arithmetics' is not one of .*did you mean 'arithmetic'"),
    'method': ('elastic.method=elastic_rest --config.elastic.period=2',
               "elastic.method='elastic_rest' is not one of .*did you mean 'elastic_reset'"),
    'reward kind': ('reward.kind=modle', "reward.kind='modle' is not one of .*did you mean 'model'"),
    'transport': ('rollout.transport=file', "rollout.transport='file' is not one of .*did you mean 'files'"),
    'learning rate of what': ('lr_per=epoch', r"lr_per='epoch' is not one of \('step', 'batch'\)"),
    'correction of pairs': ('algorithm.correction=truncate',
                            r"algorithm.correction='truncate': online_dpo has \('none',\)"),
    'loss type': ('algorithm.loss_type=hinge', r"algorithm.loss_type='hinge' is not one of \('sigmoid', 'ipo'\)"),
    'reference dtype': ('reference.dtype=float8', "dtype='float8'"),
    # ---- Numbers -----------------------------------------------------------------------------------------------------
    'one sample of a pair': ('algorithm.num_samples=1',
                             'algorithm.num_samples=1: online_dpo needs at least 2 completions'),
    'one sample of rloo': ('algorithm.name=rloo --config.algorithm.num_samples=1',
                           'num_samples=1: rloo needs at least 2'),
    'batch and minibatches': ('algorithm.num_minibatches=3', 'batch_size=8 prompts is not divisible by 8 batch '
                              'shards x accumulate=1 x algorithm.num_minibatches=3; use a multiple of 24'),
    'batch and mesh': ('batch_size=12', 'batch_size=12 is not divisible by 8 batch shards'),
    'batch and learner': ('rollout.devices=3', 'batch_size=8 is not divisible by 5 batch shards'),
    'beta': ('algorithm.beta=0', 'algorithm.beta=0.0 must be positive'),
    'clip above 1': ('algorithm.name=ppo --config.algorithm.clip=1.5', r'algorithm.clip=1.5 must .*1'),
    'greedy': ('sampling.temperature=0', 'sampling.temperature=0.0 must be positive'),
    'no token': ('sampling.max_new_tokens=0', 'max_new_tokens=0 must be at least 1'),
    'buckets': ('sampling.buckets=(8,99)', r'sampling.buckets=\(8, 99\) must be lengths up to sampling.max_prompt=14'),
    'staleness negative': ('rollout.max_staleness=-1', 'rollout.max_staleness=-1 must be at least 0'),
    'staleness fractional': ('rollout.max_staleness=0.5', 'rollout.max_staleness=0.5'),
    'devices': ('rollout.devices=8', 'rollout.devices=8 leaves none of 8 devices to the learner'),
    'devices of processes': ('rollout.devices=1 --config.rollout.transport=files --config.batch_size=14',
                             "rollout.devices=1: with rollout.transport='files' .*set it to 0"),
    'newest elsewhere': ('rollout.newest=True --config.rollout.transport=files',
                         "rollout.newest=True with rollout.transport='files': generators in processes of their own"),
    'transfer to two': ('rollout.num_generators=2 --config.rollout.transport=transfer',
                        "rollout.num_generators=2 with rollout.transport='transfer': a version is held"),
    'transfer in chunks': ('rollout.chunk=4 --config.rollout.transport=transfer --config.rollout.max_staleness=2',
                           "rollout.chunk=4 with rollout.transport='transfer' and rollout.max_staleness=2"),
    'generators': ('rollout.num_generators=0', 'rollout.num_generators=0 must be at least 1'),
    'chunk in step': ('rollout.chunk=4', 'rollout.chunk=4 looks for newer weights .*set one of them'),
    'chunk in the loop': ('rollout.chunk=4 --config.rollout.max_staleness=1 --config.rollout.threaded=False',
                          'set rollout.chunk=0'),
    'no period': ('elastic.method=elastic_reset', 'elastic.period=0: elastic_reset needs how many iterations'),
    'reference never renewed': ('elastic.method=reference_reset --config.elastic.period=9',
                                'elastic.period=9 is longer than the run of 8 iterations: the reference would never'),
    'period longer than the run': ('elastic.method=elastic_reset --config.elastic.period=9',
                                   'elastic.period=9 is longer than the run of 8 iterations'),
    'critic of no critic': ('elastic.method=elastic_reset --config.elastic.period=2 --config.elastic.reset_critic=True',
                            'reset_critic has nothing to reset'),
    'critic weights of no critic': ('algorithm.critic_weights={at}/hf',
                                    "algorithm.critic_weights=.*hf: .*online_dpo"),
    # ---- Texts -------------------------------------------------------------------------------------------------------
    'prompt and context': ('sampling.max_prompt=25', 'sampling.max_prompt=25 and sampling.max_new_tokens=8 exceed the '
                           'context of the model, 32; lower one'),
    'no prompt short enough': ('sampling.max_prompt=4',
                               'sampling.max_prompt=4: none of 20 prompts is that short; raise it'),
    'vocabulary': ('model.vocab_size=200', 'tokenizer=bytes has 259 ids, the model model.vocab_size=200'),
    'tokenizer without end': ('tokenizer={at}/endless', 'endless: it names no eos token.*add eos_token'),
    'tokenizer absent': ('tokenizer={at}/nowhere', 'nowhere'),
    'field missing': ('seed=0', "sums.jsonl: row 3: .*answer.*data.skip_bad_rows=True leaves such rows out"),
    'no path': ('data.path=', "data.path is empty: data.task='gsm8k' needs a file"),
    'split': ('data.split=dev', "split 'dev' of arithmetic is not one of"),
    'weights absent': ('weights={at}/nowhere', 'weights=.*nowhere: no config.json there'),
    # ---- Rewards -----------------------------------------------------------------------------------------------------
    'model not given': ('reward.kind=model', "reward.model is empty, but reward.kind='model' needs it"),
    'model absent': ('reward.kind=model --config.reward.model={at}/nowhere', 'nowhere is neither a folder'),
    'no reward model': ('reward.kind=model --config.reward.model={at}/hf',
                        'hf: holds a language model without a score'),
    'module absent': ('reward.function=nowhere:f', 'cannot import nowhere:f .*No module'),
    'function absent': ('reward.function=policy_rewards:nope', "cannot import policy_rewards:nope .*nope"),
    'no rule': ('reward.kind=task', "the task 'imdb' has no rule to reward by"),
    'penalty': ('reward.missing_eos=much', "reward.missing_eos='much' must be a number, or '' for none"),
    'replacement': ('reward.replacement=x', "reward.replacement='x' must be a number"),
}


def one_line(status, said, message):
    assert status == 2, said
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and 'Traceback' not in said, said
    assert re.search(message, errors[0]), errors[0]


@pytest.mark.parametrize('case', BAD)
def test_one_line_before_anything_is_computed(case, call, places, nothing_computed):
    arguments, message = BAD[case]
    policy = POLICY.replace('.py', f'.py:{TASKS[case]}') if case in TASKS else POLICY
    status, said = call('train', policy + arguments)
    one_line(status, said, message)
    assert not (places / 'new' / 'config.json').exists(), 'a run that did not start has claimed the work directory'


@pytest.mark.parametrize('arguments,message', [
    ('--workdir={at}/in_one_process', 'in_one_process: its run does not ask for generator processes; train it with '
     '--config.rollout.transport=files'),
    ('--workdir={at}/in_processes --generator=1', r'--generator=1 must be in 0..0 \(rollout.num_generators\)'),
    ('--workdir={at}/nowhere --wait=0.1', 'nowhere: no learner has started in it within --wait=0.1 s'),
    ('', '--workdir'),
])
def test_generator_processes_that_cannot_work(arguments, message, call, nothing_computed):
    status, said = call('generate', arguments)
    one_line(status, said, message)


def test_processes_meet_in_a_folder():
    with pytest.raises(ValueError, match="gs://bucket/run: rollout.transport='files' needs a folder that all"):
        rollouts.open_rollouts(policy.KIND, config_of(rollout__transport='files'), devices(1), 'gs://bucket/run')


def test_bad_rows_may_be_left_out(places, caplog):
    at = str(places / 'sums.jsonl')
    config = config_of(data__task='gsm8k', data__path=at, data__options={}, data__num_rows=0, data__skip_bad_rows=True,
                       sampling__max_prompt=100, model__max_length=128)
    generator = generator_lib.Generator(config, devices(1))
    assert len(generator._prompts) == 5
    assert 'left out 1 rows of 6' in caplog.text and 'answer' in caplog.text


# ---- What a reward function does -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def steps():
    with shared_steps():
        yield


@pytest.fixture
def policy_call(call, steps, monkeypatch, tmp_path):
    """The training command on one device: status, stderr, rows of its metrics."""
    monkeypatch.setattr(train, 'mesh_of', lambda config: devices(1))

    def run(*arguments):
        fields = ' '.join(f'--config.{x}' for x in ('num_steps=2', *arguments))
        status, said = call('train', f'--config={{at}}/tiny.py --workdir={tmp_path} {fields}')
        path = tmp_path / 'metrics.jsonl'
        return status, said, read_metrics(path) if path.exists() else []
    return run


@pytest.mark.parametrize('arguments,message', [
    ('function=policy_rewards:infinite', 'rewards: 1 of 16 are not finite'),
    ('function=policy_rewards:no_rewards', r'rewards: all 16 are missing \(None or NaN\)'),
    ('function=policy_rewards:too_few', r'rewards have shape \(15,\), expected \(16,\), one a completion'),
    ('function=policy_rewards:too_few replacement=0', r'rewards have shape \(15,\), expected \(16,\)'),
    ('function=policy_rewards:hangs timeout=0.2', 'the reward function did not return within timeout=0.2 s'),
])
def test_rewards_that_are_none(arguments, message, policy_call):
    status, said, _ = policy_call(*(f'reward.{x}' for x in arguments.split()))
    one_line(status, said, message)


def test_a_reward_function_that_raises_keeps_its_own_error(policy_call):
    with pytest.raises(ZeroDivisionError, match='the reward divides by zero') as error:
        policy_call('reward.function=policy_rewards:raises')
    assert 'while generating batch 0 with version 0' in error.value.__notes__


@pytest.mark.parametrize('function,replaced', [('raises', 1), ('nan', 1 / 16), ('hangs', 1)])
def test_a_run_goes_on_with_replacements_and_counts_them(function, replaced, policy_call):
    status, said, rows = policy_call(f'reward.function=policy_rewards:{function}', 'reward.replacement=-1',
                                     'reward.timeout=0.2')
    assert status == 0, said
    assert rows and all(row['replaced'] == pytest.approx(replaced) for row in rows)
    assert all(row['reward'] == -1 for row in rows) == (replaced == 1)


def test_rewards_that_are_all_the_same_are_no_pairs(policy_call):
    status, said, rows = policy_call('reward.function=policy_rewards:same')
    assert status == 0, said
    for row in rows:
        assert (row['tied'], row['pairs'], row['loss'], row['grad_norm']) == (1, 0, 0, 0)


def test_weights_of_another_vocabulary(policy_call, places):
    status, said, _ = policy_call(f'weights={places}/hf', 'model.vocab_size=272')
    one_line(status, said, 'model.vocab_size=272, but weights=.*hf have 264')
