"""The command: runs, failures, interruptions, and the report that they end in."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments import sweep as command
from experiments.runtime import launch
from experiments.sweeps import here, report, results, scripts

STUB = pathlib.Path(__file__).with_name('stub_train.py')
SFT = 'configs/rlhf/sft_arithmetic.py'
GRID = (f'--config={SFT}', '--config.num_steps=4', '--config.batch_size=8', '--seeds=2',
        '--sweep.optimizer.learning_rate.peak=1,2')
REPORT = ('report.json', 'report.md', 'report.html')


@pytest.fixture
def stub(monkeypatch):
    """Sweeps start the stand-in for the trainer, as often as the list that this gives says."""
    started = []

    def module(name, *flags):
        started.append(flags)
        return (sys.executable, str(STUB), *flags)
    monkeypatch.setattr(here, 'module', module)
    return started


def sweep(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['sweep', *arguments])
    launch.main(command.main)


def contents(workdir):
    return [(workdir / name).read_bytes() for name in REPORT]


def test_a_sweep_measures_what_its_runs_did(stub, monkeypatch, tmp_path, capsys):
    sweep(monkeypatch, *GRID, f'--workdir={tmp_path}', '--parallel=3')
    summary = json.loads((tmp_path / 'report.json').read_text())
    assert (summary['settings_tried'], summary['runs'], summary['finished'], summary['unfinished']) == (2, 4, 4, {})
    assert summary['settings']['peak=2'] == {  # 2 * 4 steps + seed
        'seeds': 2, 'reward': 8.5, 'reward_std': pytest.approx(0.5 ** 0.5), 'kl': 2.0, 'kl_std': 0.0}
    assert summary['differences'] == {'peak=2': {
        'reward': dict(mean=4.0, std=0.0, low=4.0, high=4.0, above=2, pairs=2),  # the seeds' own share drops out
        'kl': dict(mean=1.0, std=0.0, low=1.0, high=1.0, above=2, pairs=2)}}
    assert summary['trade_off']['front'] == ['peak=1', 'peak=2']
    out = capsys.readouterr().out
    assert '2 settings were tried in 4 runs, of which 4 have finished.' in out and '| peak=2 | 2 | 8.50 ± 0.71 |' in out
    assert (tmp_path / 'report.html').read_text().count('<img') == 3  # the trade-off, and a curve of reward and of kl


def test_stopped_and_run_again_the_report_is_the_same(stub, monkeypatch, tmp_path):
    slow = (*GRID, '--config.data.options.num_heldout=150')  # ms a step
    sweep(monkeypatch, *slow, f'--workdir={tmp_path / "whole"}', '--parallel=4')
    stub.clear()
    second = tmp_path / 'stopped' / 'peak=2' / 'seed=0' / 'metrics.jsonl'

    def stop():
        while not second.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        sweep(monkeypatch, *slow, f'--workdir={tmp_path / "stopped"}')
    thread.join()
    assert stopped.value.code == 0 and not (tmp_path / 'stopped' / 'report.json').exists()
    # The run under way was told to stop, and saved: it has rows, and no end.
    rows = second.read_text().splitlines()
    assert 1 <= len(rows) < 4 and 'run the same command' in second.with_name('log.txt').read_text()
    assert not (tmp_path / 'stopped' / 'peak=1' / 'seed=1').exists()
    before = (tmp_path / 'stopped' / 'peak=1' / 'seed=0' / 'metrics.jsonl').read_bytes()
    sweep(monkeypatch, *slow, f'--workdir={tmp_path / "stopped"}', '--parallel=2')
    assert (tmp_path / 'stopped' / 'peak=1' / 'seed=0' / 'metrics.jsonl').read_bytes() == before
    # What carries the folder's own name is the title.
    for name, whole, again in zip(REPORT, contents(tmp_path / 'whole'), contents(tmp_path / 'stopped')):
        assert whole == again.replace(b'Sweep: stopped', b'Sweep: whole'), name


def test_a_run_that_fails_costs_itself_alone_and_is_counted(stub, monkeypatch, tmp_path, capsys):
    grid = [flag.replace('=1,2', '=1,1000,2') for flag in GRID]
    with pytest.raises(SystemExit) as stop:
        sweep(monkeypatch, *grid, f'--workdir={tmp_path}')
    assert stop.value.code == 2
    assert '2 of 6 runs did not finish: peak=1000/seed=0: error: loss is nan at step 1' in capsys.readouterr().err
    summary = json.loads((tmp_path / 'report.json').read_text())
    assert (summary['settings_tried'], summary['finished']) == (3, 4)
    assert summary['unfinished'] == {f'peak=1000, seed {seed}': 'not begun (error: loss is nan at step 1)'
                                     for seed in (0, 1)}
    assert summary['settings']['peak=1000'] == {'seeds': 0} and 'peak=1000' not in summary['trade_off']['points']


def test_processes_have_their_devices_and_their_share_of_time(tmp_path):
    code = 'import os, sys, time; open(sys.argv[1], "w").write(os.environ["CUDA_VISIBLE_DEVICES"]); time.sleep(0.5)'

    def job(name):
        path = tmp_path / name
        return here.Job(name, (here.Stage((sys.executable, '-c', code, str(path)), path.exists),), tmp_path / 'log')
    assert here.run_all([job(name) for name in 'abc'], parallel=2, gpus=['0', '1', '2', '3']) == {}
    assert [(tmp_path / name).read_text() for name in 'ab'] == ['0,1', '2,3']
    assert (tmp_path / 'c').read_text() in ('0,1', '2,3')


def test_a_process_that_ends_early_is_not_finished(tmp_path):
    stage = here.Stage((sys.executable, '-c', 'print("bye")'), lambda: False)
    assert here.run_all([here.Job('a', (stage,), tmp_path / 'log')]) == {'a': 'stopped before its end'}
    stage = here.Stage((sys.executable, '-c', 'raise SystemExit(3)'), lambda: False)
    assert here.run_all([here.Job('a', (stage,), tmp_path / 'log')]) == {'a': 'ended with status 3'}


def test_slurm_starts_the_run_of_its_task(tmp_path, monkeypatch, capsys):
    sweep(monkeypatch, *GRID, '--workdir=/shared/my runs', '--script=slurm')
    script = capsys.readouterr().out
    assert '#SBATCH --array=0-3\n' in script and '#SBATCH --requeue\n' in script and script.count('--output') == 1
    (tmp_path / 'srun').write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    (tmp_path / 'sweep.sbatch').write_text(script)
    ran = subprocess.run(['bash', tmp_path / 'sweep.sbatch'], capture_output=True, text=True, env={
        **os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_ARRAY_TASK_ID': '2', 'PYTHON': 'py'})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        '--kill-on-bad-exit=1', 'py', '-m', 'experiments.train', '--distributed', f'--config={SFT}',
        '--config.num_steps=4', '--config.batch_size=8', '--config.optimizer.learning_rate.peak=1', '--config.seed=1',
        '--workdir=/shared/my runs/peak=1/seed=1']
    assert set(scripts.SCRIPTS) == {'slurm', 'jobset', 'commands'}


# ---- Reports of any folders ------------------------------------------------------------------------------------------

def write_run(folder, seed, rows, **fields):
    config = dict(experiment='policy', num_steps=2, batch_size=4, seed=seed, algorithm=dict(beta=0.1)) | fields
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps({'step': i + 1} | row) + '\n'
                                                  for i, row in enumerate(rows)))
    (folder / 'checkpoints' / '2').mkdir(parents=True)


def test_loose_runs_are_labelled_by_what_differs(tmp_path):
    for seed in (0, 1):
        for beta in (0.1, 0.5):
            write_run(tmp_path / f'{beta}_{seed}', seed, [{'reward': 1.0}, {'reward': beta, 'kl': 1.0}],
                      algorithm={'beta': beta}, weights=f'place{seed}')
    found = results.collect([str(tmp_path)])
    assert [(r.setting, r.seed) for r in found] == [('beta=0.1', 0), ('beta=0.1', 1), ('beta=0.5', 0), ('beta=0.5', 1)]
    summary = report.summarize(found, baseline='beta=0.5')
    assert summary['differences']['beta=0.1']['reward']['mean'] == pytest.approx(-0.4)
    with pytest.raises(ValueError, match=r"--baseline='x' is not one of \['beta=0.1', 'beta=0.5'\]"):
        report.summarize(found, baseline='x')
    with pytest.raises(ValueError, match="--metrics: no run has 'rewards'"):
        report.summarize(found, metrics=['rewards'])
    with pytest.raises(ValueError, match="--trade_off: no finished run has 'gold'"):
        report.summarize(found, trade_off=['gold', 'kl'])
    with pytest.raises(ValueError, match='have the same setting and seed; leave one out'):
        write_run(tmp_path / 'again', 0, [{'reward': 1.0}], algorithm={'beta': 0.5})
        results.collect([str(tmp_path)])


def test_loose_runs_are_labelled_by_places_where_nothing_else_tells_them_apart(tmp_path):
    """A scripted sweep over reward models, whose seeds each start from weights of their own."""
    for seed in (0, 1):
        for size in ('small', 'large'):
            write_run(tmp_path / f'{size}_{seed}', seed, [{'reward': 1.0}], reward={'model': size},
                      weights=f'place{seed}')
    found = results.collect([str(tmp_path)])
    assert [(r.setting, r.seed) for r in found] == [(f'model={size}', seed) for size in ('large', 'small')
                                                    for seed in (0, 1)]
    write_run(tmp_path / 'again', 0, [{'reward': 1.0}], reward={'model': 'small'}, weights='place0')
    with pytest.raises(ValueError, match='again and .*small_0 have the same setting and seed; leave one out'):
        results.collect([str(tmp_path)])


def test_runs_of_different_kinds_are_not_compared(tmp_path):
    write_run(tmp_path / 'a', 0, [{'reward': 1.0}])
    write_run(tmp_path / 'b', 0, [{'reward': 1.0}], experiment='sft')
    with pytest.raises(ValueError, match='different experiments are not comparable: policy, sft'):
        results.collect([str(tmp_path)])


def test_curves_count_items_where_batches_differ_and_bands_are_deviations(tmp_path):
    for seed, values in ((0, [1.0, 2.0]), (1, [3.0, 6.0])):
        write_run(tmp_path / f'small_{seed}', seed, [{'reward': v} for v in values])
        write_run(tmp_path / f'large_{seed}', seed, [{'reward': v} for v in values], batch_size=8)
    found = results.collect([str(tmp_path)])
    lines, bands, x = report.curves_of(found, 'reward')
    assert x == 'items trained on'
    np.testing.assert_allclose(lines['batch_size=4'], ([4, 8], [2, 4]))
    np.testing.assert_allclose(lines['batch_size=8'][0], [8, 16])
    np.testing.assert_allclose(bands['batch_size=4'], ([2 - 2 ** .5, 4 - 8 ** .5], [2 + 2 ** .5, 4 + 8 ** .5]))
    lines, _, x = report.curves_of([r for r in found if r.config['batch_size'] == 4], 'reward')
    assert x == 'step' and lines['batch_size=4'][0] == [1, 2]


def test_gains_over_interpolation_are_at_the_same_drift_and_paired(tmp_path):
    """A setting on the line between start and end of the baseline gains nothing, however high its reward."""
    for seed in (0, 1):
        write_run(tmp_path / f'plain_{seed}', seed, [{}, {}])
        write_run(tmp_path / f'on_{seed}', seed, [{}, {}], algorithm={'beta': 0.2})
        write_run(tmp_path / f'above_{seed}', seed, [{}, {}], algorithm={'beta': 0.3})
        for name, task, drift in (('plain', 1.0, 4.0), ('on', 0.5, 2.0), ('above', 0.6, 1.0)):
            (tmp_path / f'{name}_{seed}' / 'evaluation.json').write_text(
                json.dumps({'reward': task + seed, 'kl': drift, 'num_prompts': 5}))
        (tmp_path / f'plain_{seed}' / 'interpolation.json').write_text(json.dumps([
            {'alpha': a, 'reward': a + seed, 'kl': 4 * a} for a in (0.0, 0.5, 1.0)]))
    summary = report.summarize(results.collect([str(tmp_path)]), baseline='beta=0.1')
    assert summary['metrics'] == ['evaluate.reward', 'evaluate.kl']
    trade_off = summary['trade_off']
    assert (trade_off['task'], trade_off['drift']) == ('evaluate.reward', 'evaluate.kl')
    gains = trade_off['gains_over_interpolation']
    assert gains['beta=0.2']['mean'] == pytest.approx(0) and gains['beta=0.2']['above'] == 0
    assert gains['beta=0.3']['mean'] == pytest.approx(0.35) and gains['beta=0.3']['above'] == 2
    assert trade_off['interpolation']['0.5'] == {'drift': 2.0, 'drift_std': 0.0, 'task': 1.0,
                                                 'task_std': pytest.approx(0.5 ** 0.5)}
    assert trade_off['front'] == ['beta=0.3', 'beta=0.1']  # 'on' has less reward and more drift than 'above'
    assert 'Gain over that interpolation' in report.markdown(summary)
    # What was interpolated without the drift, or at some shares alone, counts where it was measured.
    for seed, rows in ((0, [{'alpha': 0.75, 'reward': 0.5}]), (1, [{'alpha': a, 'reward': a + 1} for a in (0.0, 1.0)])):
        path = tmp_path / f'plain_{seed}' / 'interpolation.json'
        path.write_text(json.dumps((json.loads(path.read_text()) if seed == 0 else []) + rows))
    trade_off = report.summarize(results.collect([str(tmp_path)]), baseline='beta=0.1')['trade_off']
    assert trade_off['interpolation'].keys() == {'0', '0.5', '1'}
    assert trade_off['gains_over_interpolation']['beta=0.3']['pairs'] == 1
    (tmp_path / 'plain_0' / 'interpolation.json').unlink()
    summary = report.summarize(results.collect([str(tmp_path)]), baseline='beta=0.1')
    assert 'interpolation' not in summary['trade_off'] and 'Gain over' not in report.markdown(summary)


def test_gains_over_checkpoints_of_the_baseline(tmp_path):
    """Where the baseline was measured at every checkpoint, a setting is compared with stopping it early."""
    for seed in (0, 1):
        write_run(tmp_path / f'plain_{seed}', seed, [{'reward': 5.0, 'kl': 1.0}, {'reward': 6.0, 'kl': 2.0}])
        write_run(tmp_path / f'above_{seed}', seed, [{'reward': 5.0, 'kl': 1.0}], algorithm={'beta': 0.3})
        curve = [{'step': step, 'reward': task + seed, 'kl': drift}
                 for step, task, drift in ((1, 0.5, 1.0), (2, 1.0, 4.0))]
        (tmp_path / f'plain_{seed}' / 'evaluation.json').write_text('\n'.join(map(json.dumps, curve)))
        (tmp_path / f'above_{seed}' / 'evaluation.json').write_text(json.dumps({'reward': 0.9 + seed, 'kl': 2.5}))
    found = results.collect([str(tmp_path)])
    summary = report.summarize(found, baseline='beta=0.1')
    gain = summary['trade_off']['gains_over_stopping']
    assert gain.keys() == {'beta=0.3'} and gain['beta=0.3']['mean'] == pytest.approx(0.9 - 0.75)
    assert 'Gain over checkpoints of beta=0.1' in report.markdown(summary)
    assert 'gains_over_stopping' not in report.summarize(found, baseline='beta=0.3')['trade_off']  # measured once
    noisy = report.summarize(found, baseline='beta=0.1', trade_off=('reward', 'kl'))  # of the batches of training
    assert 'gains_over_stopping' not in noisy['trade_off']


def test_evaluations_of_every_checkpoint_are_curves_and_are_finished(tmp_path):
    write_run(tmp_path / 'a', 0, [{'reward': 1.0}, {'reward': 2.0}])
    (tmp_path / 'a' / 'checkpoints' / '1').mkdir()
    path = tmp_path / 'a' / 'evaluation.json'
    assert not here.is_measured(tmp_path / 'a', True)
    path.write_text('{"step": 1, "hours": 0.1, "reward": 0.5, "settings": "s"}\n')
    assert here.is_measured(tmp_path / 'a', False) and not here.is_measured(tmp_path / 'a', True)
    with open(path, 'a') as file:
        file.write('{"step": 2, "hours": 0.2, "reward": 0.75, "settings": "s"}\n')
    assert here.is_measured(tmp_path / 'a', True)
    found = results.collect([str(tmp_path)])
    assert found[0].final == {'reward': 2.0, 'evaluate.reward': 0.75}
    assert report.curves_of(found, 'evaluate.reward')[0]['all'][1].tolist() == [0.5, 0.75]
    earlier, = results.collect([str(tmp_path)], at=1)
    assert earlier.final == {'reward': 1.0, 'evaluate.reward': 0.5} and earlier.rows == found[0].rows
    assert 'Measured at step 1, or last before it.' in report.markdown(report.summarize([earlier], at=1))
    assert 'Measured' not in report.markdown(report.summarize(found))
    path.write_text('{"reward": 0.75}')  # of the end
    assert [results.collect([str(tmp_path)], at=at)[0].final.get('evaluate.reward') for at in (1, 2)] == [None, 0.75]
    with pytest.raises(ValueError, match='--at=0: no run was measured by that step'):
        results.collect([str(tmp_path)], at=0)
    path.write_text('{"reward"')
    with pytest.raises(ValueError, match='evaluation.json: damaged'):
        results.collect([str(tmp_path)])


@pytest.mark.slow
def test_real_runs_resume_to_the_same_report(monkeypatch, tmp_path):
    """Two tiny fine-tunings and their evaluation; a finished run is not started again."""
    grid = (f'--config={SFT}', '--config.num_steps=3', '--config.batch_size=8', '--config.model.width=16',
            '--config.model.depth=1', '--config.data.num_rows=24', '--config.data.options.num_heldout=4',
            '--sweep.optimizer.learning_rate.peak=1e-3,1e-2', '--evaluate=--num=4 --max_new_tokens=4 --temperature=1',
            f'--workdir={tmp_path}', '--parallel=2')
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
    sweep(monkeypatch, *grid)
    whole = contents(tmp_path)
    summary = json.loads(whole[0])
    assert summary['finished'] == 2 and {'loss', 'evaluate.accuracy'} <= set(summary['metrics'])
    assert summary['settings']['peak=1e-3']['loss'] != summary['settings']['peak=1e-2']['loss']
    for path in (tmp_path / 'peak=1e-2' / 'seed=0' / 'evaluation.json', *(tmp_path / name for name in REPORT)):
        path.unlink()
    begun = []
    process = here.Process
    monkeypatch.setattr(here, 'Process', lambda job, environment: begun.append(job.name) or process(job, environment))
    sweep(monkeypatch, *grid)
    assert begun == ['peak=1e-2/seed=0'] and contents(tmp_path) == whole
