"""Stands for `experiments.train` where the sweep itself is tested: a curve that depends on the flags alone, resumed
where it was stopped, in milliseconds a step."""
import json
import pathlib
import signal
import sys
import time

from experiments.runtime import launch

flags = [argument for argument in sys.argv[1:] if argument.startswith('--config.')]
file = next(argument.removeprefix('--config=') for argument in sys.argv if argument.startswith('--config='))
workdir = pathlib.Path(next(argument.removeprefix('--workdir=') for argument in sys.argv if '--workdir=' in argument))
config = launch.load_config(file, flags)
rate, seed = config.optimizer.learning_rate.peak, config.seed
if rate > 100:
    print('error: loss is nan at step 1', flush=True)
    sys.exit(2)

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
launch.save_config(config, workdir)
metrics = workdir / 'metrics.jsonl'
start = len(metrics.read_text().splitlines()) if metrics.exists() else 0
for step in range(start + 1, config.num_steps + 1):
    time.sleep(float(config.data.options.get('num_heldout', 0)) / 1000)  # milliseconds a step
    with open(metrics, 'a') as out:
        out.write(json.dumps({'step': step, 'reward': rate * step + seed, 'kl': rate, 'seconds_per_step': time.time()})
                  + '\n')
    if stopped and step < config.num_steps:
        print('stopped by signal; run the same command to continue', flush=True)
        sys.exit(0)
(workdir / 'checkpoints' / str(config.num_steps)).mkdir(parents=True)
