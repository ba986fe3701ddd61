"""LLaDA-8B fine-tuned on captioned codes of 512 x 256 (default :L512, the released script) or 128 x 1024 (:L128, the
paper's).

    python -m experiments.encode --sem=SEM_dinov2_L512/ --data=folder --path=laion/ --captions=txt --out=laion_codes
    python -m experiments.train --config=configs/dlc/text_to_code_llada.py:L512 --workdir=… \\
        --config.pretrained=LLaDA-8B-Base/ --config.data.path=laion_codes
    python -m experiments.sample --text "a red fox in the snow" --text_model=RUN --dit=DLC_DiT_L512/ \\
        --vae=sd-vae-ft-ema/ --out=fox.png

arXiv 2507.12318 table 6: AdamW 1e-5, batch 128, 9 M captioned images of LAION-400M seen, about 70 300 steps. The
released script trains all weights in bfloat16 over float32, 4 images on each of 4 GPUs, 8 microbatches; it plans
600 000 steps of a cosine after 5 of warm-up, of which the paper's model saw the beginning: a constant 1e-5, nearly.
Loss: that of the script, over captions and codes, on LLaDA's whole vocabulary, with the padding attended; :L128 without
the weights of 1 / p, which the script got in July 2025, probably after the paper's model was trained. LLaDA's own loss,
on the codes alone: --config.objective.masked=code, normalizer=tokens, softmax=codes, groups=1, attend_padding=False.
"""
import dataclasses

from configs.dlc import base
from configs.dlc.encoder_imagenet import CODES
from configs.parts import check_name
from dlc_jax.text_to_code import AUTHORS, AUTHORS_BEFORE_WEIGHTING

OBJECTIVES = {'L512': AUTHORS, 'L128': AUTHORS_BEFORE_WEIGHTING}


def get_config(codes: str = 'L512'):
    check_name('text_to_code_llada:', codes, OBJECTIVES)
    config = base.text_to_code()
    config.num_steps, config.batch_size, config.accumulate = (600_000 if codes == 'L512' else 70_300), 128, 8
    config.model.num_codes, config.model.vocab_size = CODES[codes]
    config.model.dtype, config.model.remat = 'bfloat16', 'full'
    config.objective.update(dataclasses.asdict(OBJECTIVES[codes]))
    config.objective.groups = 4  # the 4 images of a GPU
    config.optimizer.learning_rate.update(dict(peak=1e-5, warmup_steps=5, decay='cosine', decay_steps=600_000))
    config.sampler.remasking = 'random' if codes == 'L512' else 'low_confidence'
    config.checkpoint_every, config.log_every = 5000, 100
    return config
