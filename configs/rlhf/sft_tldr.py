"""Pythia fine-tuned on TL;DR summaries (arXiv 2410.18252): where policy and reward model of a size start.

    python -m experiments.train --config=configs/rlhf/sft_tldr.py:410m --workdir=runs/tldr_410m/sft \\
        --config.data.path=tldr --config.weights=pythia-410m-deduped --config.tokenizer=pythia-410m-deduped

Data: a folder with the splits train and validation of the OpenAI TL;DR comparison's fine-tuning set (116,722 training
rows), raw (subreddit, title, post, summary) or prepared (query, reference_response). One epoch; all tokens are trained
on, those of the prompt as well. Batches are those of one GPU of the published scripts, which do not say how many there
were; they compute in float16 (410m: bfloat16), here it is bfloat16 over float32 weights. Texts have at most 562 tokens
and longer ones are left out; the published script cuts at 580. It packs no rows; here the texts of a batch are
packed, each by itself, which leaves the batch and its loss what they are.

Without the released folders, `experiments.train --dry_run` still says what a run needs: every parameter costs 16 bytes
(weight, two moments, gradient), spread over the devices of mesh axis fsdp.
"""
from configs.parts import check_name
from configs.rlhf import base

ROWS = 116_722
BATCH = {'410m': (16, 1), '1b': (32, 4), '2.8b': (32, 8)}  # texts a step, microbatches


def get_config(size: str = '410m'):
    check_name('sft_tldr:', size, BATCH)
    config = base.sft()
    config.batch_size, config.accumulate = BATCH[size]
    config.num_steps = ROWS // config.batch_size
    config.model.update(dict(kind='gpt_neox', size=size, dtype='bfloat16', remat='full'))
    config.weights = config.tokenizer = f'models/pythia-{size}-deduped'
    config.data.update(dict(task='tldr', path='data/tldr', heldout='validation'))
    config.max_length = 562
    config.pack_batch = True
    config.optimizer.learning_rate.update(dict(peak=1e-5, decay='cosine'))
    config.eval_every = 500
    return config
