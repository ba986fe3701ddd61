"""What becomes of a job when one of its processes cannot write its part of a checkpoint."""
import pytest

import runs
import struck
from experiments.runtime import config_files

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('victim', [pytest.param(0, marks=pytest.mark.slow_harness), 1])
def test_a_save_beside_the_steps_that_one_cannot_write_ends_all_and_they_go_on(victim, tmp_path):
    """The job trains two runs; nothing happens to the first, and in the second a disk is full under checkpoint 2."""
    config = runs.config_of('sft', None)
    config.model.width, config.eval_every, config.num_steps, config.checkpoint_every = 64, 0, 3, 1
    whole, full = tmp_path / 'whole' / 'run', tmp_path / 'full' / 'run'
    for workdir in (whole, full):
        config_files.save(config, workdir)
    programs = f'--programs={tmp_path / "programs"}'
    job = struck.Job(tmp_path / 'logs', 'tests.processes.several', f'--workdirs={whole},{full}', programs,
                     processes=2, devices=1, own={victim: ('--full_after=5',)})
    try:
        assert job.wait(struck.END_SECONDS), f'processes {job.alive()} still run\n{job.report()}'
    finally:
        job.end()
    line = f'could not write checkpoint 2 to {full / "checkpoints"} ('
    assert job.statuses()[victim] == 2 and f'error: {line}' in job.text(victim), job.report()
    assert job.statuses()[1 - victim] == 1, job.report()
    assert f'error: process {victim} of 2 failed: {line}' in job.text(1 - victim), job.report()
    assert 'checkpoint 1 is intact' in job.text(1 - victim), job.report()

    struck.succeed(struck.Job(tmp_path / 'logs', 'tests.processes.several', f'--workdirs={full}', programs,
                              processes=2, devices=1))
    struck.assert_same(struck.outcome(full), struck.outcome(whole))
    assert not struck.left_behind(full)
