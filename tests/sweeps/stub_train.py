"""Stands for `experiments.train` where the sweep itself is tested: a curve that depends on the flags alone, resumed
where it was stopped, in milliseconds a step. It reads its flags without `experiments.runtime.launch`, which takes a
second to import."""
import json
import pathlib
import runpy
import signal
import sys
import time

from absl.flags import FlagValues
from ml_collections import config_flags

flags = [argument for argument in sys.argv[1:] if argument.startswith('--config.')]
file = next(argument.removeprefix('--config=') for argument in sys.argv if argument.startswith('--config='))
workdir = pathlib.Path(next(argument.removeprefix('--workdir=') for argument in sys.argv if '--workdir=' in argument))
values, argv = FlagValues(), ['train', *flags]
config_flags.DEFINE_config_dict('config', runpy.run_path(file)['get_config'](), flag_values=values, sys_argv=argv)
values(argv)
config = values.config
rate, seed = config.optimizer.learning_rate.peak, config.seed
if rate > 100:
    print('error: loss is nan at step 1', flush=True)
    sys.exit(2)

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
workdir.mkdir(parents=True, exist_ok=True)
(workdir / 'config.json').write_text(json.dumps(config.to_dict()))
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
