"""The launch wrappers against stand-ins for `gcloud`, `srun` and `scontrol`."""
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'launch'
CONTINUE = 'run the same command to continue'  # what runtime/loop.py says when a signal stopped it


@pytest.fixture
def tools(tmp_path):
    """Call it with {program: bash body}; returns an environment that finds these programs first."""
    def install(**bodies):
        for name, body in bodies.items():
            path = tmp_path / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n')
            path.chmod(0o755)
        return {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'WAIT': '0', 'TMPDIR': str(tmp_path)}
    return install


def calls(tmp_path):
    return [line for line in (tmp_path / 'calls').read_text().splitlines() if ' describe ' not in line]


def bash(*command, env=None, **kw):
    return subprocess.run(['bash', *map(str, command)], env=env, capture_output=True, text=True, timeout=60, **kw)


@pytest.mark.parametrize('script', sorted(p.name for p in LAUNCH.iterdir() if p.suffix in ('.sh', '.sbatch')))
def test_syntax(script):
    assert bash('-n', LAUNCH / script).returncode == 0


def test_the_message_the_wrappers_look_for_is_the_one_the_loop_prints():
    assert CONTINUE in (LAUNCH.parent / 'runtime' / 'loop.py').read_text()
    for script in ('tpu_vm.sh', 'slurm.sbatch', 'resumable.sh'):
        assert f"grep -q '{CONTINUE}'" in (LAUNCH / script).read_text()


def test_tpu_vm_dry_run_prints_every_step_and_runs_none(tools, tmp_path):
    out = bash(LAUNCH / 'tpu_vm.sh', '--dry_run', '--config=a.py', '--config.name=two words', '--dry_run',
               env={**tools(gcloud='exit 1'), 'NFS': '10.0.0.2:/share', 'NAME': 'x'})
    assert out.returncode == 0, out.stderr
    assert not (tmp_path / 'calls').exists()
    steps = [line for line in out.stdout.splitlines() if line.startswith('+')]
    for step, words in zip(steps, ('tpu-vm create x', 'tpu-vm scp', 'mount -t nfs 10.0.0.2:/share'.replace(' ', r'\ '),
                                   'uv', r'experiments.train\ --distributed\ --config=a.py', 'tpu-vm delete x'),
                           strict=True):
        assert words in step
    command = next(a for a in shlex.split(steps[4]) if a.startswith('--command='))
    assert shlex.split(command)[-3:] == ['--config=a.py', '--config.name=two words', '--dry_run']


@pytest.mark.parametrize('accelerator, flags, image', [
    ('v5e-16', '--accelerator-type=v5litepod-16', 'v2-alpha-tpuv5-lite'), ('v4-16', '--accelerator-type=v4-16',
                                                                           'tpu-ubuntu2204-base'),
    ('v5litepod-8', '--accelerator-type=v5litepod-8', 'v2-alpha-tpuv5-lite')])
def test_tpu_vm_names_slices_and_images_as_the_cloud_does(tools, accelerator, flags, image):
    out = bash(LAUNCH / 'tpu_vm.sh', '--dry_run', '--config=a', env={**tools(), 'ACCELERATOR': accelerator})
    assert out.returncode == 0, out.stderr
    assert flags in out.stdout and f'--version={image}' in out.stdout


def test_tpu_vm_refuses_other_accelerators(tools):
    out = bash(LAUNCH / 'tpu_vm.sh', '--dry_run', '--config=a', env={**tools(), 'ACCELERATOR': 'h100-8'})
    assert out.returncode == 2 and 'ACCELERATOR=h100-8 is none of v4-N, v5e-N, v5p-N and v6e-N' in out.stderr


@pytest.mark.parametrize('workdir, extras', [('/mnt/runs/a', 'runner,tpu'), ('gs://bucket/a', 'runner,tpu,gcs')])
def test_tpu_vm_installs_what_the_command_needs_and_keeps_the_connection(tools, workdir, extras):
    out = bash(LAUNCH / 'tpu_vm.sh', '--dry_run', '--config=a', f'--workdir={workdir}', env=tools())
    assert f".[{extras}]" in out.stdout.replace('\\', '')
    assert all('ServerAliveInterval=30' in line for line in out.stdout.splitlines() if 'tpu-vm ssh' in line)


def gcloud(train):
    """A cloud with one slice, whose state is a file; `train` is what the training command does there."""
    return f'''
    state=$TMPDIR/state
    case "$*" in
      *"tpu-vm describe"*) cat $state 2>/dev/null || exit 1 ;;
      *"tpu-vm create"*) echo READY > $state ;;
      *"tpu-vm delete"*) rm $state ;;
      *experiments.train*--config*) n=$(grep -c -- --config $TMPDIR/calls); {train} ;;
    esac'''


def verbs(tmp_path):
    return ['train' if '--config' in line else line.split()[4] for line in calls(tmp_path)]


@pytest.mark.parametrize('lost', ['echo PREEMPTED > $state; exit 255', f'echo "… {CONTINUE}"; exit 0'])
def test_tpu_vm_replaces_a_lost_slice_and_continues(tools, tmp_path, lost):
    out = bash(LAUNCH / 'tpu_vm.sh', '--config=a', env=tools(gcloud=gcloud(f'if [ $n = 1 ]; then {lost}; fi')))
    assert out.returncode == 0, out.stderr
    again = ['delete', 'create'] if 'PREEMPTED' in lost else []
    assert verbs(tmp_path) == ['create', 'scp', 'ssh', 'train', *again, 'scp', 'ssh', 'train', 'delete']


def test_tpu_vm_does_not_retry_a_failure_on_a_healthy_slice(tools, tmp_path):
    out = bash(LAUNCH / 'tpu_vm.sh', '--config=a', env=tools(gcloud=gcloud('exit 3')))
    assert out.returncode == 3 and 'healthy slice' in out.stderr
    assert verbs(tmp_path) == ['create', 'scp', 'ssh', 'train']


def test_tpu_vm_waits_for_capacity_and_gives_up_in_the_end(tools, tmp_path):
    out = bash(LAUNCH / 'tpu_vm.sh', '--config=a', env={**tools(gcloud='exit 1'), 'ATTEMPTS': '3'})
    assert out.returncode == 1 and 'gave up after 3' in out.stderr
    assert verbs(tmp_path) == ['create'] * 3


def test_tpu_vm_queued_resources(tools, tmp_path):
    body = '''
    state=$TMPDIR/state
    case "$*" in
      *"tpu-vm describe"*) [ "$(cat $state 2>/dev/null)" = ACTIVE ] && echo READY ;;
      *"queued-resources describe"*) cat $state 2>/dev/null || exit 1
                                     [ $(cat $state) = WAITING ] && echo ACTIVE > $state; true ;;
      *"queued-resources create"*) [ -e $state ] && exit 1
                                   n=$(grep -c "resources create" $TMPDIR/calls)
                                   [ $n = 1 ] && echo FAILED > $state || echo WAITING > $state ;;
      *"queued-resources delete"*) rm $state ;;
    esac'''
    out = bash(LAUNCH / 'tpu_vm.sh', '--config=a', env={**tools(gcloud=body), 'QUEUED': '1', 'ATTEMPTS': '4'})
    assert out.returncode == 0, out.stderr
    assert verbs(tmp_path) == ['create', 'delete', 'create', 'scp', 'ssh', 'train', 'delete']


@pytest.mark.parametrize('srun, status, requeued', [
    ('echo done', 0, False), (f'echo "{CONTINUE}"', 0, True), (f'echo "{CONTINUE}"; exit 9', 9, False)])
def test_slurm_requeues_only_what_was_stopped(tools, tmp_path, srun, status, requeued):
    env = {**tools(srun=f"printf '%s\\n' \"$@\"; {srun}", scontrol=''), 'SLURM_JOB_ID': '17', 'PYTHON': 'py'}
    out = bash(LAUNCH / 'slurm.sbatch', '--config=a', '--config.name=two words', env=env)
    assert out.returncode == status, out.stderr
    assert out.stdout.splitlines()[1:7] == ['py', '-m', 'experiments.train', '--distributed', '--config=a',
                                            '--config.name=two words']
    assert calls(tmp_path)[1:] == (['scontrol requeue 17'] if requeued else [])


def test_slurm_gives_its_cpus_to_the_tasks(tools):
    env = tools(srun='echo "cpus $SRUN_CPUS_PER_TASK"', scontrol='')
    env |= {'SLURM_JOB_ID': '1', 'SLURM_CPUS_PER_TASK': '12'}
    assert 'cpus 12' in bash(LAUNCH / 'slurm.sbatch', '--config=a', env=env).stdout


CHILD = f'''
import signal, sys, time
def stop(*_):
    time.sleep(0.5)  # writes a checkpoint
    print('{CONTINUE}', file=sys.stderr)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print('ready', flush=True)
time.sleep(30)
'''


def test_resumable_passes_the_signal_on_and_counts_a_stopped_run_as_unfinished():
    process = subprocess.Popen(['bash', LAUNCH / 'resumable.sh', sys.executable, '-c', CHILD], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == 'ready\n'
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and time.monotonic() - start < 15
    assert CONTINUE in process.stdout.read()


@pytest.mark.parametrize('status', [0, 3])
def test_resumable_keeps_other_statuses(status):
    out = bash(LAUNCH / 'resumable.sh', sys.executable, '-c', f'print("out"); raise SystemExit({status})')
    assert (out.returncode, out.stdout) == (status, 'out\n')


def test_gpu_jobset_joins_one_process_a_node():
    jobset = yaml.safe_load((LAUNCH / 'gke_gpu_jobset.yaml').read_text())
    replicated = jobset['spec']['replicatedJobs'][0]
    job = replicated['template']['spec']
    command = job['template']['spec']['containers'][0]['command']
    assert command[:5] == ['experiments/launch/resumable.sh', 'python', '-m', 'experiments.train', '--distributed']
    name = jobset['metadata']['name']
    assert f'--coordinator={name}-{replicated["name"]}-0-0.{name}:8476' in command
    assert f'--num_processes={job["parallelism"]}' in command and job['parallelism'] == job['completions']
    config = next(a for a in command if a.startswith('--config='))
    assert (LAUNCH.parents[1] / config.removeprefix('--config=').split(':')[0]).is_file()


@pytest.mark.parametrize('file', ['gke_jobset.yaml', 'gke_gpu_jobset.yaml'])
def test_jobsets_have_shared_memory(file):
    job = yaml.safe_load((LAUNCH / file).read_text())['spec']['replicatedJobs'][0]['template']['spec']
    pod = job['template']['spec']
    mounts = {m['mountPath']: m['name'] for m in pod['containers'][0]['volumeMounts']}
    assert {'name': mounts['/dev/shm'], 'emptyDir': {'medium': 'Memory'}} in pod['volumes']


def test_jobset_runs_the_command_once_a_machine():
    jobset = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
    job = jobset['spec']['replicatedJobs'][0]['template']['spec']
    assert jobset['kind'] == 'JobSet' and job['parallelism'] == job['completions'] and job['backoffLimit'] == 0
    pod = job['template']['spec']
    rows, columns = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
    container = pod['containers'][0]
    assert job['parallelism'] * container['resources']['limits']['google.com/tpu'] == rows * columns
    assert container['command'][:5] == ['experiments/launch/resumable.sh', 'python', '-m', 'experiments.train',
                                        '--distributed']
    mounts = {m['mountPath'] for m in container['volumeMounts']}
    assert any(a.startswith(f'--workdir={m}/') for a in container['command'] for m in mounts)
    config = next(a for a in container['command'] if a.startswith('--config='))
    assert (LAUNCH.parents[1] / config.removeprefix('--config=').split(':')[0]).is_file()
    assert os.access(LAUNCH / 'resumable.sh', os.X_OK) and os.access(LAUNCH / 'tpu_vm.sh', os.X_OK)
