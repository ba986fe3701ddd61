"""The compared methods on the Lewis game: `python -m experiments.lewis --config=configs/rlhf/lewis.py:SIZE`.

quickstart  a speaker that is rewarded by a listener which knows the language badly and hardly learns: the task is
            learnt and the language drifts. About a minute on one CPU core.
a2c, reinforce, gumbel  the settings of the authors' scripts for the game and for Elastic Reset; the coefficients of the
            KL and the other methods' settings are ours. Minutes a run on one CPU core. Their scripts for the plain game
            (`run_a2c.sh` and its siblings) differ from those for Elastic Reset, which are taken here for all methods:
            a2c at 1e-3 in batches of 64, reinforce at 5e-4 for 50,000 steps, gumbel in batches of 64 at temperature 1
            (10 under Elastic Reset). Their variants of Elastic Reset: decay 0.999 and 0.9995, a period of 1000 and 1500
            steps; the listener reset with the speaker (`--reset_listener ema`): --config.elastic.agents=both.
            Seeded iterated learning (`run_sil_*.sh`): 200 steps of imitation of either agent, 400 under reinforce, and
            a generation every 2000 steps, under reinforce too (here every elastic.period); imitating on self-play
            objects is ours, their code for it was not found.
tiny        to see that everything runs; its numbers mean nothing.
"""
import ml_collections

from configs.parts import check_name

SIZES = ('quickstart', 'a2c', 'reinforce', 'gumbel', 'tiny')


def get_config(size: str = 'quickstart') -> ml_collections.ConfigDict:
    check_name('lewis: size', size, SIZES)
    config = _quickstart()
    if size == 'tiny':
        config.game.update(properties=2, types=3, supervised=0.3, self_play=0.3, held_out=0)
        config.hidden = 6
        config.pretrain.update(speaker_steps=20, listener_steps=5, learning_rate=0.02)
        config.training.update(num_steps=40, batch_size=8, learning_rate=0.02, log_every=10)
        config.elastic.update(period=20, tick_every=5)
        config.imitation.update(speaker_steps=5, listener_steps=5, batch_size=8, learning_rate=0.02)
        config.alphas, config.seeds = (0.0, 0.5, 1.0), (0, 1)
    elif size != 'quickstart':
        config.game.held_out = 0
        config.pretrain.update(speaker_steps=100, listener_steps=50)
        config.training.update(method=size, num_steps=50_000, batch_size=50, learning_rate=1e-4, log_every=500,
                               listener_pace=1.0)
        config.elastic.update(period=2000, tick_every=100, tick_offset=0)
        if size == 'reinforce':
            config.training.update(num_steps=25_000, batch_size=64, learning_rate=1e-3)
            config.elastic.period = 5000
        steps = 400 if size == 'reinforce' else 200
        config.imitation.update(speaker_steps=steps, listener_steps=steps)
        config.training.temperature = 10.0 if size == 'gumbel' else 1.0
        for method in config.methods.values():
            if method.decays:
                method.decays = (0.995,)
    return config.lock()


def _quickstart() -> ml_collections.ConfigDict:
    run = lambda kl_coefficients=(0.0,), decays=(): dict(kl_coefficients=kl_coefficients, decays=decays)
    return ml_collections.ConfigDict(dict(
        game=dict(
            properties=5, types=5,
            supervised=0.0064, self_play=0.0097,  # shares of all objects to learn the language from, and to play with
            held_out=500,  # objects of the others to measure on; 0: all
        ),
        hidden=200,  # width of the agents
        pretrain=dict(speaker_steps=400, listener_steps=8, batch_size=5, learning_rate=1e-3),
        training=dict(
            method='a2c',  # a2c | reinforce | gumbel
            num_steps=1000, batch_size=50,
            learning_rate=2e-3, weight_decay=0.01,
            listener_pace=0.003,  # size of the listener's updates beside the speaker's
            temperature=1.0,  # of gumbel's relaxed symbols
            log_every=50,  # steps
        ),
        # Steps; see rlhf_jax/elastic_reset.py. Who is averaged and reset: speaker | both
        elastic=dict(period=200, tick_every=10, tick_offset=1, agents='speaker'),
        methods=dict(  # one run a coefficient of the KL and a decay; without decays, the method has none
            fixed_reference=run((0.0, 0.01, 0.03, 0.1, 0.3, 1.0)),  # 0: the plain run, which is interpolated
            ema_anchor=run((0.1,), (0.95,)),
            reference_reset=run((0.1,)),
            reset_to_init=run(),
            reset_to_ema=run(decays=(0.95,)),
            elastic_reset=run(decays=(0.995, 0.98, 0.95)),
            imitation=run(),  # seeded iterated learning, a generation every elastic.period
        ),
        imitation=dict(  # see rlhf_jax/tasks/lewis_imitation.py
            speaker_steps=50, listener_steps=50, batch_size=50, learning_rate=1e-3,
            listener_target='teacher',  # teacher | objects
        ),
        alphas=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),  # of the interpolation; with 0 and 1
        seeds=(0, 1, 2, 3, 4),  # each its own split of the objects, pretraining and self-play
    ))
