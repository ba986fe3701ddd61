"""Every field of the language experiments, with its unit. A config file starts from one of these and changes lines."""
import ml_collections
from ml_collections import config_dict

from configs.parts import adamw, learning, precision, runner, schedule

ConfigDict = ml_collections.ConfigDict


def model(kind: str, size: str, **fields) -> dict:
    """A decoder: `kind` gpt2 | gpt_neox | llama | mistral | qwen2 | qwen3; `size` of its table, or 'weights': what is
    not set here is read from the config.json of `weights`."""
    return dict(
        kind=kind, size=size,
        # 0 and '' mean: as the size says. A kind has some of these fields.
        vocab_size=0, width=0, depth=0, num_heads=0, num_kv_heads=0, head_dim=0, hidden=0, max_length=0,
        activation='', eps=0.0,
        tied='', attention_bias='', qkv_bias='', mlp_bias='', qk_norm='', parallel='',  # yes | no
        window=0,  # tokens that a token sees, itself included; -1: all
        rope_base=0.0, rotary_fraction=0.0,
        # kind: none | linear | llama3
        rope_scaling=dict(kind='', factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
        init_std=0.02,  # of fresh weights
        **precision(),
    ) | fields


def _language(experiment: str, **sections) -> ConfigDict:
    lora = dict(rank=0, alpha=32.0, targets=())  # 0: train all weights; path regexes, (): the model's own
    if experiment != 'policy':  # whose ratios would compare one draw of the dropped entries with another
        lora |= dict(dropout=0.0)  # of the adapter's inputs while training, a probability
    return ConfigDict(dict(
        experiment=experiment, **runner(),
        model=model('gpt_neox', '410m'),
        lora=lora,
        tokenizer='bytes',  # bytes | a tokenizer.json or its folder
        # Whether texts begin with BOS; None: as those of the run in `weights`, else as the tokenizer's files say.
        bos=config_dict.placeholder(bool),
        weights='',  # to start from: a Hugging Face folder, or the work directory of an earlier stage; '': fresh
        adapter='',  # of PEFT, a folder: merged into `weights` before anything else
        data=dict(
            task='arithmetic',  # see experiments.rlhf.data.tasks
            path='',  # file or folder on disk, or tfds:NAME; '': embedded, where the task is
            split='train', heldout='validation',  # names of splits
            num_rows=0,  # first so many; 0: all (of embedded tasks: how many are made up)
            skip_bad_rows=False,  # leave out rows with missing fields, counted and logged, instead of failing
            options=dict(),  # of the task
        ),
        **sections,
    ))


def sft() -> ConfigDict:
    """Fine-tuning on demonstrations (arXiv 2410.18252, appendix; `sft.py`)."""
    return _language(
        'sft',
        max_length=562,  # tokens of prompt and response; longer ones are left out, counted and logged
        length_buckets=4,  # lengths that a batch may be cut to, the least that holds its longest text; 1: max_length
        eval_every=0,  # steps between evaluations on data.heldout, and at the end; 0: none
        train_on_prompt=True,
        add_eos=True,  # whether texts end with EOS; False: they are pieces of longer ones
        packing=False,  # several texts a row, attention kept within each; batch_size counts rows
        pack_batch=False,  # the texts of a batch, which batch_size counts, in as few rows as hold them: the same loss
        optimizer=adamw(schedule(1e-5, decay='cosine'), schedule(0.0)),
    ).lock()


def reward_model() -> ConfigDict:
    """A scalar reward from preference pairs."""
    return _language(
        'reward_model',
        max_length=638,  # tokens of prompt and response
        add_eos=True,  # read a text at an EOS behind it; False: at its own last token, as of policies that never end
        length_buckets=4,  # lengths that a batch may be cut to, the least that holds its longest text; 1: max_length
        eval_every=0,  # steps between evaluations on data.heldout, and at the end; 0: none
        margin=0.0, centering=0.0,  # of the Bradley-Terry loss
        optimizer=adamw(schedule(1e-5, decay='cosine'), schedule(0.0)),
    ).lock()


def dpo() -> ConfigDict:
    """Direct preference optimisation on given pairs."""
    return _language(
        'dpo',
        max_length=638,
        length_buckets=4,  # lengths that a batch may be cut to, the least that holds its longest text; 1: max_length
        eval_every=0,  # steps between evaluations on data.heldout, and at the end; 0: none
        loss=dict(beta=0.1, loss_type='sigmoid'),  # sigmoid | ipo
        optimizer=adamw(schedule(3e-6, decay='linear'), schedule(0.0)),
    ).lock()


def policy() -> ConfigDict:
    """Reinforcement learning on prompts: batch_size counts prompts, num_steps rollout batches."""
    return _language(
        'policy',
        **learning(),
        sampling=dict(
            max_new_tokens=53, temperature=0.7, top_k=0, top_p=1.0, min_new_tokens=0,
            # What log-probabilities are of, in sampler, learner and reference: drawn, the distribution with the cuts of
            # top_k, top_p and min_new_tokens | all, the whole vocabulary's, though tokens are drawn with the cuts.
            scored='drawn',
            max_prompt=512,  # tokens; longer prompts are left out, counted and logged
            buckets=(),  # prompt lengths to compile for; (): max_prompt alone
        ),
        # Lengths that the learner's prompts may be cut to, and as many of responses: the least that hold the batch's
        # longest. 1: max_prompt and max_new_tokens.
        length_buckets=3,
        reward=dict(
            kind='task',  # task: its rule | model: a reward model | function: 'package.module:function'
            model='',  # a Hugging Face folder, or the work directory of a reward_model run
            label='',  # of a BERT or DistilBERT classifier: the label whose probability is the reward
            batch_size=64,  # rows the reward model reads at once
            mesh=dict(data=1, fsdp=-1, tensor=1),  # of the generating devices, for reward models; where sizes cannot
            # be divided so, each device has all
            function='',
            gold='',  # a second one, logged and never trained on: task | a reward model | package.module:function
            missing_eos='',  # in place of the reward of a response that does not end, such as -1; '': no penalty
            timeout=0.0,  # seconds a batch; 0: none
            replacement='',  # in place of a reward that is missing (None, NaN), infinite or did not come; '': missing
            # ones are left out of their groups and not trained on, the others are errors
        ),
        optimizer=adamw(schedule(3e-6, decay='linear'), schedule(0.0)),
    ).lock()
