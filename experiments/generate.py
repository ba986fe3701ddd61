"""A generator process of an asynchronous run: makes the batches that a learner elsewhere trains on.

    python -m experiments.train    --config=FILE --workdir=DIR --config.rollout.max_staleness=1 \\
        --config.rollout.transport=files
    python -m experiments.generate --workdir=DIR        # on other devices, or another machine that sees DIR

Start it before or after the learner. It takes the config of the run, waits for weights in DIR/rollouts, and leaves when
the learner is done. Killed, it is simply started again; several share the work (`--generator=1`, ... of
rollout.num_generators). A run that is rewarded by a function (reward.kind=function) has its name in DIR/config.json;
add `--trust`, for code is run at your word and not at a folder's.
"""
import importlib
import logging
import time

from experiments.rlhf.policy import rewards, roles, rollouts, waves
from experiments.runtime import config_files, fitting, launch, storage
from experiments.runtime import processes as job
from experiments.runtime.programs import placed
from experiments.train import EXPERIMENTS
from rlhf_jax.rollout import processes

log = logging.getLogger(__name__)

POLICIES = ('policy', 'align')  # experiments whose module has a `KIND`


def wait_for_config(workdir: str, timeout: float) -> None:
    """Returns when the learner has written its config.

    Raises:
        TimeoutError: it did not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (storage.resolve(workdir) / 'config.json').exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f'--workdir={workdir}: no learner has started in it within --wait={timeout:g} s')
        time.sleep(0.2)


def generate(workdir: str, *, generator: int = 0, idle_timeout: float | None = None, trust: bool = False,
             address: str = '127.0.0.1:0') -> int:
    """Serves the learner of `workdir` until it is done, and returns how many batches it made.

    Args:
        trust: call a reward function that the work directory names.
        address: of this machine, `host:port`, for `rollout.transport='transfer'`.

    Raises:
        ValueError: the run has no generator processes, data that does not fit, or a reward function without `trust`.
    """
    config = config_files.read(workdir)
    if config.get('experiment') not in POLICIES or config.rollout.transport == 'devices':
        raise ValueError(f"--workdir={workdir}: its run does not ask for generator processes; train it with "
                         '--config.rollout.transport=files')
    if not 0 <= generator < config.rollout.num_generators:
        raise ValueError(f'--generator={generator} must be in 0..{config.rollout.num_generators - 1} '
                         '(rollout.num_generators)')
    names = {'reward.function': rewards.reward_name(config.reward), 'reward.gold': config.reward.gold}
    rewards.check_code(names, f'--workdir={workdir}', trust)
    folder, mesh = storage.resolve(workdir) / 'rollouts', roles.generator_mesh(config)
    kind = importlib.import_module(EXPERIMENTS[config.experiment]).KIND
    decoding = kind.decoding(config, mesh)
    if kind.has_waves:
        version = placed(decoding.shapes, decoding.shardings)
        config = waves.budgeted(config, fitting.usable_bytes(mesh), [kind.models(config, mesh)] + [version] * (
            config.rollout.max_staleness + 1))
    weights = rollouts.open_weights(config, decoding.shardings, decoding.shapes, folder, reader=generator,
                                    address=address)
    make = kind.generator(config, mesh, weights)
    log.info('%s: generator %d of %d is ready', workdir, generator, config.rollout.num_generators)
    return processes.serve(make, weights, folder / 'batches', generator=generator,
                           num_generators=config.rollout.num_generators, idle_timeout=idle_timeout,
                           share=rollouts.share_of(mesh), is_own_fault=lambda error: not job.is_loss(error))


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--workdir', required=True, metavar='DIR', help="the learner's")
    p.add_argument('--generator', type=int, default=0, metavar='I', help='which of rollout.num_generators this is')
    p.add_argument('--wait', type=float, default=600.0, metavar='SECONDS', help='for the learner to start')
    p.add_argument('--idle_timeout', type=float, default=0.0, metavar='SECONDS',
                   help='leave after so long with nothing to do (the learner is gone); 0: wait for ever')
    p.add_argument('--address', metavar='HOST:PORT', default='127.0.0.1:0',
                   help='of this machine, where weights are transferred between machines '
                        '(rollout.transport=transfer); port 0: any that is free')
    p.add_argument('--trust', action='store_true',
                   help="call the run's reward function (reward.kind=function), which stands in DIR/config.json")
    args, _ = launch.parse(p)
    launch.initialize(args)
    wait_for_config(args.workdir, args.wait)
    made = generate(args.workdir, generator=args.generator, idle_timeout=args.idle_timeout or None,
                    trust=args.trust, address=args.address)
    print(f'made {made} batches')


if __name__ == '__main__':
    launch.main(main)
