"""Which runs a sweep has, and what is refused before any begins."""
import json
import sys

import pytest
import yaml

from configs import sweeps as named
from experiments import sweep as command
from experiments.runtime import config_files, launch
from experiments.sweeps import here, plan, scripts

SFT = 'configs/rlhf/sft_arithmetic.py'


def runs_of(*arguments, seeds=1):
    flags = command.split_flags(arguments)
    args = command.parser().parse_args(flags.rest)
    axes = plan.axes_of(args.variants, flags.sweeps, flags.zipped)
    fixed = [f'--config.{field}={value}' for field, value in flags.fixed.items()]
    return plan.runs_of(args.config, fixed, axes, range(args.first_seed, args.first_seed + seeds))


def test_axes_multiply_zipped_fields_move_together_and_seeds_are_outermost():
    runs = runs_of(f'--config={SFT}', '--config.accumulate=2', '--sweep.optimizer.learning_rate.peak=1e-3,2e-3',
                   '--zip.batch_size=64,32', '--zip.num_steps=100,200', seeds=2)
    assert [run.name for run in runs[:5]] == [
        'peak=1e-3,batch_size=64/seed=0', 'peak=1e-3,batch_size=32/seed=0', 'peak=2e-3,batch_size=64/seed=0',
        'peak=2e-3,batch_size=32/seed=0', 'peak=1e-3,batch_size=64/seed=1']
    assert len(runs) == 8 and runs[1].setting == 'peak=1e-3, batch_size=32'
    last = runs[-1]
    assert last.flags == (f'--config={SFT}', '--config.accumulate=2', '--config.optimizer.learning_rate.peak=2e-3',
                          '--config.batch_size=32', '--config.num_steps=200', '--config.seed=1')
    config = last.config
    assert (config.accumulate, config.batch_size, config.num_steps, config.seed) == (2, 32, 200, 1)
    assert config.optimizer.learning_rate.peak == 2e-3
    # The flags alone make that config: the run is an ordinary command.
    assert config_files.load(SFT, last.flags[1:]).to_dict() == config.to_dict()


def test_variants_of_a_config_file_and_values_with_commas_and_slashes():
    runs = runs_of('--config=configs/rlhf/arithmetic.py', '--variants=online_dpo,ppo',
                   '--sweep.sampling.buckets=(8,14),()', '--sweep.reward.model=runs/a,runs/b', '--first_seed=7')
    assert [run.config.algorithm.name for run in runs] == ['online_dpo'] * 4 + ['ppo'] * 4
    assert runs[0].flags[0] == '--config=configs/rlhf/arithmetic.py:online_dpo'
    assert runs[0].config.sampling.buckets == (8, 14) and runs[2].config.sampling.buckets == ()
    assert runs[0].name == 'variant=online_dpo,buckets=_8_14_,model=runs_a/seed=7'
    assert runs[0].setting == 'variant=online_dpo, buckets=(8,14), model=runs/a'


def test_equal_last_names_are_written_out():
    assert plan.short_names(['optimizer.learning_rate.peak', 'optimizer.weight_decay.peak', 'seed']) == [
        'optimizer.learning_rate.peak', 'optimizer.weight_decay.peak', 'seed']


@pytest.mark.parametrize('arguments, message', [
    (['--sweep.batch_sise=1,2'], 'config.batch_sise is not a field; did you mean config.batch_size?'),
    (['--sweep.batch_size=1,two'], 'two'),
    (['--sweep.batch_size=1,1'], '--sweep.batch_size=1,1: a value is given twice'),
    (['--sweep.batch_size=1,,2'], 'a value is empty'),
    (['--sweep.batch_size'], '--sweep.batch_size: has no value'),
    (['--sweep.batch_size=1', '--config.batch_size=3'], 'batch_size is swept; drop one of the two'),
    (['--sweep.seed=1,2'], 'seeds are given by --seeds'),
    (['--config.seed=1'], 'seeds are given by --seeds'),
    (['--zip.batch_size=1,2', '--zip.num_steps=1'], 'equally many values; --zip.batch_size: 2, --zip.num_steps: 1'),
    (['--zip.batch_size=1,2', '--sweep.batch_size=3,4'], 'batch_size is given to --sweep and to --zip'),
    (['--variants=a,b', f'--config={SFT}:c'], 'has an argument behind its colon'),
    (['--sweep.weights=a/b,a_b'], 'two settings would share the folder weights=a_b'),
    (['--sweep.batch_size=' + ','.join(map(str, range(101))), '--sweep.num_steps=' + ','.join(map(str, range(101)))],
     '10201 runs; a sweep has at most 10000'),
])
def test_bad_sweeps_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=r'^[^\n]*$') as error:
        runs_of(f'--config={SFT}', *arguments)
    assert message in str(error.value)


@pytest.mark.parametrize('arguments, message', [
    ([], '--workdir is missing'),
    (['--workdir=w'], '--config is missing'),
    (['--workdir=w', '--name=tldr_minibatch_ppo'], "did you mean 'tldr_minibatches_ppo'"),
    (['--workdir=w', '--name', 'no'], "--name='no' is not one of"),
    (['--workdir=w', f'--config={SFT}', '--seeds=0'], '--seeds=0 must be at least 1'),
    (['--workdir=w', f'--config={SFT}', '--parallel=2', '--gpus=0,1,2'], '3 do not divide among --parallel=2'),
    (['--workdir=w', f'--config={SFT}', '--interpolate=0,1'], '--interpolate needs --evaluate'),
    (['--workdir=w', f'--config={SFT}', '--evaluate=', '--interpolate=0,2'], 'between 0 and 1'),
    (['--workdir=w', f'--config={SFT}', '--evaluate=', '--interpolate=0,x'], 'numbers with commas between'),
    (['--workdir=w', f'--config={SFT}', '--baseline=b'], "--baseline='b' is not one of ['all']"),
    (['--workdir=w', f'--config={SFT}', '--trade_off=kl'], 'give two metrics, TASK,DRIFT'),
    (['--workdir=gs://bucket/w', f'--config={SFT}'], 'needs a local folder'),
    (['--report', 'nowhere'], 'nowhere: no run is there'),
    (['--workdri=w'], 'did you mean --workdir?'),
])
def test_bad_commands_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['sweep', *arguments])
    with pytest.raises(SystemExit) as stop:
        launch.main(command.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_config_is_refused_and_more_settings_are_added(tmp_path):
    plan.record(runs_of(f'--config={SFT}', '--sweep.batch_size=8,16'), tmp_path)
    with pytest.raises(ValueError, match="batch_size=8/seed=0 was run with num_steps=800, not 5"):
        plan.record(runs_of(f'--config={SFT}', '--config.num_steps=5', '--sweep.batch_size=8'), tmp_path)
    with pytest.raises(ValueError, match=r"measured with \[\], not \['--num=3'\]"):
        plan.record(runs_of(f'--config={SFT}', '--sweep.batch_size=8'), tmp_path, ['--num=3'])
    plan.record(runs_of(f'--config={SFT}', '--sweep.batch_size=16,32', seeds=2), tmp_path)
    assert list(plan.read_record(tmp_path)['runs']) == [
        f'batch_size={b}/seed={s}' for b, s in ((8, 0), (16, 0), (32, 0), (16, 1), (32, 1))]
    (tmp_path / plan.RECORD).write_text('{"runs"')
    with pytest.raises(ValueError, match='sweep.json: damaged'):
        plan.read_record(tmp_path)


def test_stages_of_a_run(tmp_path):
    run, = runs_of('--config=configs/rlhf/arithmetic.py:ppo', '--config.num_steps=7')
    job = here.job_of(run, tmp_path, common=['--compilation_cache=c'], evaluation=['--num=3'], alphas=(0.0, 0.5))
    folder = tmp_path / 'all' / 'seed=0'
    assert [stage.command[1:3] for stage in job.stages] == [('-m', 'experiments.train')] + 2 * [
        ('-m', 'experiments.evaluate')]
    assert job.stages[0].command[-2:] == (f'--workdir={folder}', '--compilation_cache=c')
    assert job.stages[2].command[3:] == (
        f'--policy={folder}', '--reference=runs/arithmetic/sft', '--num=3', '--interpolate=0,0.5',
        f'--json={folder}/interpolation.json', '--compilation_cache=c')
    assert not any(stage.finished() for stage in job.stages)
    (folder / 'checkpoints' / '6').mkdir(parents=True)
    assert not job.stages[0].finished()
    (folder / 'checkpoints' / '7').mkdir()
    (folder / 'evaluation.json').touch()
    assert [stage.finished() for stage in job.stages] == [True, True, False]
    for content, finished in (('[{"alpha": 0.0}, {"alpha": 0.25}, {"alpha": 0.5}]', True), ('[{"alpha": 0.0}]', False),
                              ('[{"al', False), ('{"step": 1, "alpha_0.alpha": 0.0}', False)):
        (folder / 'interpolation.json').write_text(content)
        assert job.stages[2].finished() is finished, content


def test_a_translation_game_is_measured_by_a_command_of_its_own(tmp_path):
    run, = runs_of('--config=configs/rlhf/translation.py:tiny_game', '--config.speaker=s')
    job = here.job_of(run, tmp_path, evaluation=['--language_model=l', '--step=all'], alphas=(0.0, 0.5))
    folder = tmp_path / 'all' / 'seed=0'
    measure = ('-m', 'experiments.evaluate_translation', f'--game={folder}', '--language_model=l', '--step=all')
    assert [stage.command[1:] for stage in job.stages[1:]] == [
        (*measure, f'--json={folder}/evaluation.json'),
        (*measure, '--step=last', '--interpolate=0,0.5', f'--json={folder}/interpolation.json')]


@pytest.mark.parametrize('step', [['--step=all'], ['--step', 'all'], ['--step=3', '--step=all']])
def test_where_every_checkpoint_is_measured_the_newest_is_interpolated(tmp_path, step):
    run, = runs_of('--config=configs/rlhf/arithmetic.py:ppo', '--config.num_steps=7')
    job = here.job_of(run, tmp_path, evaluation=['--num=3', *step], alphas=(0.0, 0.5))
    flags = [stage.command[stage.command.index('--num=3') + 1:-1] for stage in job.stages[1:]]
    assert flags == [tuple(step), (*step, '--step=last', '--interpolate=0,0.5')]
    assert not here.measures_every(['--step=all', '--step=3']) and not here.measures_every(['--num=3'])


@pytest.mark.parametrize('name', sorted(named.SWEEPS))
def test_named_sweeps_are_ones(name, monkeypatch):
    arguments = command.expand_name([f'--name={name}', '--workdir=w'])
    args = command.parser().parse_args(command.split_flags(arguments).rest)
    command.check(args)
    runs = runs_of(*arguments)
    assert len(runs) >= 2
    assert args.baseline in {'', *(run.setting for run in runs)}
    if name.startswith(('tldr_minibatches', 'arithmetic_minibatches')):
        updates = {run.config.num_steps * run.config.algorithm.num_minibatches for run in runs}
        prompts = {run.config.batch_size // run.config.algorithm.num_minibatches for run in runs}
        assert len(updates) == len(prompts) == 1
        assert all(run.config.batch_size % run.config.algorithm.num_minibatches == 0 for run in runs)


def test_later_flags_replace_those_of_a_name():
    arguments = command.expand_name(['--name=arithmetic_staleness', '--sweep.rollout.max_staleness=8', '--seeds=2'])
    flags = command.split_flags(arguments)
    assert flags.sweeps == {'rollout.max_staleness': '8'}
    assert command.parser().parse_args(flags.rest).seeds == 2


# ---- Clusters --------------------------------------------------------------------------------------------------------

def test_jobsets_are_the_published_file_with_the_runs_commands():
    runs = runs_of(f'--config={SFT}', '--sweep.weights=a b,c')
    documents = list(yaml.safe_load_all(scripts.jobset(runs, '/runs/sweep/')))
    template = yaml.safe_load((scripts.LAUNCH / 'gke_jobset.yaml').read_text())
    for i, (run, document) in enumerate(zip(runs, documents, strict=True)):
        assert document['metadata'].pop('name') == f'sweep-{i}'
        pod, published = (d['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
                          for d in (document, template))
        command_line = pod.pop('command')
        kept = published['command'][:5]
        assert command_line == [*kept, *run.flags, f'--workdir=/runs/sweep/{run.name}']
        assert pod == {name: value for name, value in published.items() if name != 'command'}


def test_commands_are_lines_that_a_shell_takes():
    import shlex
    runs = runs_of(f'--config={SFT}', '--sweep.weights=a b,c')
    lines = scripts.commands(runs, 'w').splitlines()
    assert [shlex.split(line)[3:] for line in lines] == [[*run.flags, f'--workdir=w/{run.name}'] for run in runs]


def test_record_holds_what_json_gives_back(tmp_path):
    run, = runs_of('--config=configs/rlhf/arithmetic.py:ppo')
    plan.record([run], tmp_path)
    plan.record([run], tmp_path)  # tuples have become lists, which is no other config
    assert json.loads((tmp_path / plan.RECORD).read_text())['runs'][run.name]['config'] == plan.plain(run.config)
