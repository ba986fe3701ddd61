"""What the configs of images and of language share: groups of fields, with their units, and the check of a name."""
import difflib
from collections.abc import Iterable


def runner() -> dict:
    """What every run has."""
    return dict(
        seed=0,
        num_steps=0,  # optimizer steps in all
        batch_size=0,  # images, codes, texts or prompts a step, over all devices
        accumulate=1,  # microbatches a step; 0: the least whose step fits the devices' memory
        mesh=dict(data=1, fsdp=-1, tensor=1),  # devices along each axis; one -1 takes the rest
        log_every=50,  # steps
        checkpoint_every=1000,  # steps; 0: only at the end
        keep_checkpoints=2,  # newest checkpoints kept
        keep_every=0,  # steps: checkpoints at multiples of it are kept too; 0: none
        keep='',  # 'best:METRIC' keeps the best one too, by a metric of metrics.jsonl (best:METRIC:min, :max)
    )


def schedule(peak: float, **fields) -> dict:
    """Linear warm-up, then constant, cosine or linear; see `runtime.optim.schedule`."""
    return dict(peak=peak, final=0.0, init=0.0, warmup_steps=0, decay='constant', decay_steps=0, first_step=0) | fields


def adamw(learning_rate: dict, weight_decay: dict, **fields) -> dict:
    """AdamW; see `runtime.optim.adamw`."""
    return dict(
        learning_rate=learning_rate,  # a step
        weight_decay=weight_decay,  # decoupled, times the learning rate
        b1=0.9, b2=0.999, eps=1e-8,
        clip_norm=0.0,  # L2; 0: off
        clip_per_module=False,  # clip each top-level entry of the parameters by itself
        groups=(),  # ((path regex, {learning_rate, weight_decay, frozen_steps, layer_decay}), ...); first match wins
    ) | fields


def precision() -> dict:
    """How a model computes."""
    return dict(
        dtype='float32',  # compute: float32 | bfloat16; parameters stay float32
        remat='none',  # what the backward pass recomputes: none | full | dots | dots_no_batch | auto: as little as fits
        unroll=False,  # emit blocks one after another: slower to compile, at times faster to run
        attention_impl='auto',  # auto: the fused kernel where there is one | xla | cudnn | splash
    )


def learning() -> dict:
    """How a policy learns from what it samples, whatever it writes (arXiv 2410.18252, arXiv 2312.07551)."""
    return dict(
        algorithm=dict(
            name='online_dpo',  # online_dpo | ppo | rloo | proximal_rloo | grpo | best_of_n
            num_samples=2,  # K completions a prompt
            num_minibatches=1,  # N updates a batch, one after another
            num_epochs=1,  # T passes over a batch
            stop_kl=0.0,  # nats a token from a batch's sampler (k3), past which its other updates are left out; 0: off
            beta=0.1, loss_type='sigmoid', ties='drop',  # of Online DPO; drop | order | same
            kl_coefficient=0.05,  # price of KL: in the reward; GRPO: in the loss, estimated by k3
            kl_estimator='k1',  # of KL in the reward: k1 | k2 | k3
            kl_target=0.0, kl_rate=0.1, kl_unit='token',  # coefficient that seeks a KL a token | sequence; 0: fixed
            clip=0.2, clip_high=0.0,  # of ratios; 0: as clip
            gamma=1.0, lam=0.95,  # of PPO's advantages
            value_coefficient=0.1, value_clip=0.2, whiten=True,
            critic='separate',  # a network of its own | shared: a head on the policy's trunk
            critic_weights='',  # a reward model to start the critic from; '': the policy's own weights, a fresh head
            # Weights of stale samples, the learner's policy before the batch over the sampler's: those above the cap
            # are cut down to it or masked; PPO's decoupled is truncate by its paper's name (arXiv 2110.00641).
            correction='none',  # none | truncate | mask | decoupled
            correction_cap=2.0,
            scale_rewards=True,  # GRPO: by the group's standard deviation
            mean_over='sequence',  # GRPO: sequence | token
            after_eos=False,  # PPO: the score one position past EOS, as published runs had it
            # NLPO (arXiv 2210.01241): PPO that draws only among the likeliest tokens of an earlier policy, the mask.
            mask=dict(
                top_p=0.0,  # their probability together; 0: all tokens may be drawn
                min_tokens=100,  # and the so many likeliest in any case
                every=50,  # rollout batches after which the policy becomes the mask
            ),
        ),
        reference=dict(dtype='float32'),  # in which frozen weights are kept: float32 | bfloat16
        rollout=dict(
            max_staleness=0,  # S, versions; 0: synchronous, 1: asynchronous
            devices=0,  # the last so many devices generate; 0: the learner's own
            mesh=dict(data=-1, fsdp=1, tensor=1),  # of the generating devices
            transport='devices',  # devices | files | transfer: generators are other processes (experiments.generate)
            address='127.0.0.1:0',  # of this machine, that a transfer's learner listens on: host:port, 0 for any port
            num_generators=1,  # processes, where they are (transfer: one)
            threaded=True,  # False: the same batches, generated in the loop
            newest=False,  # each batch with the newest weights there are (devices)
            chunk=0,  # tokens between looks for new weights while generating (in-flight updates); 0: not looked for
            slots=0,  # rows that decode at a time, refilled as they end; 0: waves of whole prompts, as many as fit
            memory=0.0,  # GiB a device that a wave may take beside its weights; 0: what the device has left
            timeout=0.0,  # seconds the learner waits for a batch; 0: for ever
        ),
        elastic=dict(
            method='',  # '' | elastic_reset, or one of the others in rlhf_jax.elastic_reset.METHODS
            period=0, decay=0.995,  # between resets, counted in reset_on; of the average, a tick
            tick_on='step', tick_every=1, tick_offset=1,  # iteration | epoch | step
            reset_on='iteration', reset_offset=1, reset_skip_first=False,
            ema_period=0,  # 0: as period
            reset_optimizer=False, reset_critic=False,
            kl_reference='init',  # init | ema
        ),
        eval_every=0,  # steps between evaluations on data.heldout, and at the end; 0: none
        eval_prompts=256,  # of it, the first so many
        lr_per='step',  # the learning rate moves each update | batch: each rollout batch, ahead of it (published runs)
    )


def check_name(what: str, given: str, names: Iterable[str]) -> None:
    """Raises a ValueError with the nearest of `names` where `given`, of `--config=FILE:GIVEN`, is none of them."""
    names = tuple(names)
    if given not in names:
        near = difflib.get_close_matches(given, names, 1)
        raise ValueError(f'{what} {given!r} is not one of {names}' + (f'; did you mean {near[0]!r}?' if near else ''))
