"""Every field of the image experiments, with its unit. A config file starts from one of these and changes
lines.
"""
import ml_collections

from configs.parts import adamw, learning, precision, runner, schedule

ConfigDict = ml_collections.ConfigDict


def encoder() -> ConfigDict:
    """SEM encoder, trained as DINOv2 trains (arXiv 2507.12318 section 5, arXiv 2304.07193)."""
    return ConfigDict(dict(
        experiment='encoder', **runner(),
        model=dict(
            size='L',  # S | B | L | g; width, depth and num_heads override it when not 0
            width=0, depth=0, num_heads=0,
            patch_size=14,  # pixels
            num_registers=4,
            pos_grid=37,  # side of the stored position-embedding grid, patches
            pos_antialias=True,  # how it is resized: True for models with registers, False for DINOv2's first, without
            layer_scale=1e-5, drop_path=0.3,
            init_std=0.02,  # of the blocks' weights; about 1 / sqrt(width) for narrow models from scratch
            pos_init_std=0.02,  # of the position embedding; of the order of a patch's embedding for models from scratch
            form='plain',  # plain | shared | pos_shared
            num_codes=512, vocab_size=256,  # L, V
            temperature=1.0,
            **precision(),
        ),
        head=dict(
            hidden=2048, bottleneck=256, prototypes=65536,
            init_std=0.02,  # of the MLP's weights; about 1 / sqrt(hidden) for narrow heads
            separate_ibot=False,  # a head of its own for patches
        ),
        loss=dict(
            dino=1.0, koleo=0.1, ibot=1.0,  # weights
            centering='center',  # center | sinkhorn_knopp
            center_momentum=0.9,
            student_temperature=0.1,
            teacher_temperature=schedule(0.07, init=0.04, warmup_steps=37_500),
        ),
        ema=dict(decay=0.992, final=1.0),  # teacher, cosine over the run
        optimizer=adamw(schedule(1e-4, warmup_steps=12_500, final=1e-6, decay='cosine'),
                         schedule(0.04, final=0.4, decay='cosine'), clip_norm=3.0, clip_per_module=True),
        groups=0,  # parts of the batch that mask, drop paths and seek neighbours apart; 0: one a device and microbatch
        layer_decay=0.9,  # learning-rate factor from block to block
        patch_embed_lr=0.2,  # learning-rate factor of the patch embedding, on top of layer_decay
        freeze_last_layer=1250,  # steps
        pretrained='',  # released DINOv2 weights, .safetensors or .pth; '': from scratch
        data=dict(
            name='digits',  # digits | digit_pairs | emoji | fake | folder | npz | a TFDS name
            split='train', path='',
            layout='auto',  # auto | classes | splits: what the folders of a folder are
            image_size=0,  # pixels; 0: as stored
            channels=3,
            in_memory=False,  # decode every image once, into memory: for small ones of one size
            exif_orientation='ignore',  # ignore | apply
            transparency='drop',  # drop | white | black: alpha forgotten, or the image on that ground
            deep_pixels='refuse',  # refuse | clip | stretch: images of 32-bit pixels
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
            global_size=224, global_scale=(0.32, 1.0),  # pixels; share of the area
            local_size=98, local_scale=(0.05, 0.32), num_local=8,
            flip=0.5,  # probability
            jitter=0.8, grayscale=0.2, solarize=0.2,  # probabilities
            blur=(0.0, 0.9, 0.5),  # probability for first global, second global, local crops
            mask_share=0.5,  # share of global crops that are masked
            mask_ratio=(0.1, 0.5),  # share of a masked crop's patches
            mask_min_patches=4,  # a block
            num_workers=0,  # processes, at most one a core that this one may use; 0: threads of this one
            heldout=0.25, split_seed=0,  # share kept apart where the data set has no parts, and by which shuffle
        ),
    )).lock()


def generator() -> ConfigDict:
    """DiT conditioned on a code (arXiv 2507.12318 table 4)."""
    return ConfigDict(dict(
        experiment='generator', **runner(),
        model=dict(
            size='XL',  # S | B | L | XL; width, depth and num_heads override it when not 0
            width=0, depth=0, num_heads=0,
            patch_size=2,
            input_size=32, channels=4,  # latent or pixel grid
            condition='code',  # code | class | embedding | none
            num_codes=512, vocab_size=256,
            num_classes=1000, embedding_dim=1024,
            cond_dropout=0.1,  # probability, a sample
            time_init_std=0.02, code_init_std=0.0,  # larger for narrow models; 0: 1 / sqrt(width)
            **precision(),
        ),
        diffusion=dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02),
        ema=dict(decay=0.9999, ramp=False),
        optimizer=adamw(schedule(1e-4), schedule(0.0)),
        data=dict(
            path='',  # code store written by experiments.encode
            target='latents',  # latents | images
        ),
        sampler=dict(name='ddpm', num_steps=250, ddim_eta=0.0,  # ddpm | ddim; its noise, 0 to 1
                     guidance=1.4, guidance_channels=0,  # channels guided; 0: all
                     guidance_interval=(0.0, 1.0)),  # share of the noise levels
    )).lock()


def code_model() -> ConfigDict:
    """SEDD over codes (arXiv 2507.12318 table 5)."""
    return ConfigDict(dict(
        experiment='code_model', **runner(),
        model=dict(
            size='medium',  # small | medium; width, depth and num_heads override it when not 0
            width=0, depth=0, num_heads=0,
            num_codes=512, vocab_size=256,
            cond_dim=128, dropout=0.1,
            shared_embedding=True,  # one table for all positions
            scale_by_sigma=True,
            **precision(),
        ),
        diffusion=dict(process='absorbing', noise='loglinear',  # absorbing | uniform; loglinear | geometric
                       eps=1e-3, sigma_min=1e-4, sigma_max=20.0,  # of the log-linear, of the geometric noise
                       time_sampling='uniform'),  # of training times: uniform | antithetic | stratified
        ema=dict(decay=0.9999, ramp=True),
        optimizer=adamw(schedule(3e-4, warmup_steps=2500, first_step=1), schedule(0.0), clip_norm=1.0),
        data=dict(path=''),  # code store written by experiments.encode
        sampler=dict(name='remasking', num_steps=4096, eta=0.01, window=(0.3, 0.55)),
    )).lock()


def embedding_model() -> ConfigDict:
    """Diffusion over an encoder's embeddings, the code model's rival (arXiv 2312.03701; network of its code)."""
    return ConfigDict(dict(
        experiment='embedding_model', **runner(),
        model=dict(
            size='L12',  # width and depth override it when not 0
            width=0, depth=0,
            embedding_dim=1024,  # of data.path's embeddings
            time_dim=256,
            dtype='float32', remat='none', unroll=False,  # see configs.parts.precision
        ),
        diffusion=dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02),
        ema=dict(decay=0.9999, ramp=True),
        optimizer=adamw(schedule(1e-4), schedule(0.0), clip_norm=1.0),
        data=dict(path=''),  # code store written by experiments.encode
        sampler=dict(name='ddim', num_steps=250, ddim_eta=1.0),  # ddpm | ddim; its noise, 0 to 1
    )).lock()


def text_to_code() -> ConfigDict:
    """LLaDA, fine-tuned to write the code of a caption (arXiv 2507.12318 table 6, arXiv 2502.09992)."""
    return ConfigDict(dict(
        experiment='text_to_code', **runner(),
        model=dict(
            size='LLaDA-8B',  # a size of rlhf_jax.models.llama; the numbers below override it when not 0
            width=0, depth=0, num_heads=0, num_kv_heads=0, hidden=0, max_length=0,
            text_vocab_size=0,  # rows of the text model, before separator and codes are added
            vocab_multiple=1,  # the extended table is rounded up to a multiple of it, to be cut by mesh.tensor
            init_std=0.02,  # of weights from scratch
            num_codes=512, vocab_size=256,  # L, V
            **precision(),
        ),
        words=dict(separator=126349, mask_token=126336, pad_token=126081),  # tokens of LLaDA's tokenizer
        tokenizer='',  # tokenizer.json or its folder | words | bytes; '': beside the pretrained weights
        vocabulary=(),  # of tokenizer 'words'
        caption_length=127,  # tokens; longer captions are cut on the right, counted and logged
        objective=dict(  # see dlc_jax.text_to_code.Objective
            masked='code', normalizer='tokens', groups=1, weighted=True, min_masked=1e-3, softmax='codes',
            drop_caption=0.0, attend_padding=False),
        eval_every=0,  # steps between measurements of the loss on data.heldout, and at the end; 0: none
        optimizer=adamw(schedule(1e-5), schedule(0.0), clip_norm=1.0),
        pretrained='',  # a folder of released LLaDA weights; '': from scratch
        data=dict(
            path='', heldout='',  # code stores with captions, written by experiments.encode --captions
        ),
        sampler=dict(steps=0,  # 0: one a position
                     block_length=0,  # 0: the whole code
                     remasking='random', temperature=0.2, guidance=0.0),  # low_confidence | random; 0: off
    )).lock()


def align() -> ConfigDict:
    """A text-to-code model trained on the codes it writes, by a reward on their images: batch_size counts captions,
    num_steps rollout batches."""
    text = text_to_code()
    of_text = ('model', 'words', 'tokenizer', 'vocabulary', 'caption_length', 'pretrained', 'sampler')
    return ConfigDict(dict(
        experiment='align', **runner(),
        **{name: text[name] for name in of_text},
        weights='',  # the run of text_to_code, or of align, to start from; or released weights in `pretrained`
        lora=dict(rank=0, alpha=32.0, targets=()),  # 0: train all weights; path regexes, (): queries and values
        likelihood=dict(  # see experiments.align.writer
            kind='bound',  # bound: for online_dpo and best_of_n | exact: for rloo and grpo, sampler.remasking=random
            num=8,  # sets of masked positions; of exact, steps of the sampler, 0: all
        ),
        generator=dict(
            path='',  # work directory of a generator, or its released weights; frozen
            config='',  # of compile checks without a path: a config file such as configs/dlc/generator_imagenet.py:L512
            vae='',  # of a generator of latents: folder of the released autoencoder
            sampler=dict(name='', num_steps=0, guidance=0.0),  # '' and 0: as the generator's own config says
            share_noise=True,  # the K codes of a caption are drawn from the same noise
            batch_size=0,  # images drawn at once; 0: all of a batch
        ),
        reward=dict(
            kind='model',  # model: a judge or an encoder | function: 'package.module:function' of images and rows
            model='',  # work directory of the judge or encoder
            function='',
            gold='',  # a second one, logged and never trained on: a judge or encoder | package.module:function
            missing_eos='',  # of texts alone
            timeout=0.0,  # seconds a batch; 0: none
            replacement='',  # in place of a reward that is missing (None, NaN), infinite or did not come; '': missing
            # ones are left out of their groups and not trained on, the others are errors
        ),
        data=dict(
            # Captions: a code store that has them, a .jsonl of {"caption": ..., what rewards need} or a .txt
            path='', heldout='',
        ),
        **learning(),
        optimizer=adamw(schedule(1e-6), schedule(0.0), clip_norm=1.0),
    )).lock()
