"""Groups of fields that the configs of images and of language share, with their units."""


def runner() -> dict:
    """What every run has."""
    return dict(
        seed=0,
        num_steps=0,  # optimizer steps in all
        batch_size=0,  # images, codes, texts or prompts a step, over all devices
        accumulate=1,  # microbatches a step
        mesh=dict(data=1, fsdp=-1, tensor=1),  # devices along each axis; one -1 takes the rest
        log_every=50,  # steps
        checkpoint_every=1000,  # steps; 0: only at the end
        keep_checkpoints=2,  # newest steps kept
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
        remat='none',  # none | full | dots | dots_no_batch
        unroll=False,  # emit blocks one after another: slower to compile, at times faster to run
        attention_impl='auto',  # auto: the fused kernel where there is one | xla | cudnn
    )
