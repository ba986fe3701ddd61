"""Released PyTorch weights in, and trained weights out.

    # a folder or file of released weights -> a work directory for --encoder, --generator, --code_model
    python -m experiments.convert --kind=sem  --src=SEM_dinov2_L512/ --dst=runs/released/encoder
    python -m experiments.convert --kind=dit  --src=DLC_DiT_L512/    --dst=runs/released/generator
    python -m experiments.convert --kind=sedd --src=DLC_SEDD_L512/   --dst=runs/released/code_model
    # the averaged weights of a run -> safetensors and config.json under the originals' names
    python -m experiments.convert --reverse --kind=dit --src=runs/generator --dst=exported/
    # LLaDA and the text-to-code model made of it: a checked folder of its shards; --reverse from a run
    python -m experiments.convert --kind=llada --src=DLC_LLADA_L512/ --dst=checked/
    # a policy, fine-tuned or reward model (LoRA merged; --adapter: as PEFT has it) -> a folder for transformers
    python -m experiments.convert --reverse --kind=gpt_neox --src=runs/tldr_410m/online_dpo --dst=exported/

--src is safetensors or a torch.save file (no code in it is run), one file or shards with their index. sd_vae, inception
and dinov2 become one checked safetensors file in the originals' newest names, for --vae, --inception and
--config.pretrained (--hf: as transformers has a dinov2), llada a checked folder. --config says how the model is to be
sampled and was trained; by default, as published. Language models need no conversion to be trained from:
--config.weights takes their folder. Tensors are read and written one by one.
"""
import argparse
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from dlc_jax import convert
from dlc_jax.convert import dinov2
from experiments.dlc.weights import kinds, llada, reading, writing
from experiments.rlhf.models import export as language
from experiments.runtime import launch, storage
from experiments.runtime import steps as steps_lib
from rlhf_jax.convert import KINDS as LANGUAGE
from rlhf_jax.weights import files

FOLDERS = (*LANGUAGE, 'llada')  # kinds that are used from a folder as it was released, config.json included

# Which kinds take a flag that the tensors do not tell.
TAKES = {'num_heads': ('sem', 'dinov2', 'dit', 'sedd'), 'num_codes': ('sem',), 'vocab_size': ('sem',),
         'temperature': ('sem',)}


def parser() -> argparse.ArgumentParser:
    p = launch.parser(__doc__, config='settings of the work directory (default: configs/dlc/released.py:KIND)')
    p.add_argument('--kind', required=True, choices=(*kinds.KINDS, *FOLDERS))
    p.add_argument('--src', required=True, metavar='DIR|FILE', help='released weights; --reverse: a work directory')
    p.add_argument('--dst', required=True, metavar='DIR', help='what to write; must be empty or new')
    p.add_argument('--reverse', action='store_true', help='from a work directory to released names')
    steps_lib.add_flag(p, '--src')
    p.add_argument('--adapter', action='store_true', help='of a language model, the LoRA adapter alone')
    p.add_argument('--base', metavar='NAME|DIR', help='of --adapter, the model it belongs to (default: the Hugging '
                   'Face folder that the run started from)')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of the tensors written, of a language model or '
                   'llada (default: as they are)')
    p.add_argument('--hf', action='store_true', help='of a dinov2 written: names and config of transformers')
    p.add_argument('--key', help='entry of a file that holds several state dicts, such as teacher')
    p.add_argument('--num_heads', type=int, help='default: as published for that width')
    p.add_argument('--num_codes', type=int, help='L of a sem (default 512)')
    p.add_argument('--vocab_size', type=int, help='V of a sem (default: what num_codes leaves)')
    p.add_argument('--temperature', type=float, help='of a sem (default 1)')
    return p


def check_flags(args: argparse.Namespace, overrides: bool) -> None:
    """Raises a ValueError or OSError for what is wrong whatever the weights turn out to be."""
    for name, takers in TAKES.items():
        value = getattr(args, name)
        if value is not None and (args.reverse or args.kind not in takers):
            raise ValueError(f'--{name}: ' + ('a work directory says it itself' if args.reverse else
                                              f'the tensors of a {args.kind} say it themselves') + '; leave it out')
        if value is not None and value <= 0:
            raise ValueError(f'--{name}={value} must be positive')
    if args.kind in LANGUAGE and not args.reverse:
        raise ValueError(f'--kind={args.kind}: nothing to convert, --config.weights takes the Hugging Face folder; '
                         '--reverse writes one')
    if args.adapter and args.kind not in LANGUAGE:
        raise ValueError(f'--adapter: a {args.kind} has none; leave it out')
    if args.base and not args.adapter:
        raise ValueError('--base: only an --adapter has one; leave it out')
    if args.dtype and args.kind not in FOLDERS:
        raise ValueError(f'--dtype: a {args.kind} is written in float32; leave it out')
    if args.hf and args.kind != 'dinov2':
        raise ValueError('--hf: only a dinov2 has other names in transformers; leave it out')
    to_run = args.kind in kinds.KINDS and kinds.KINDS[args.kind].experiment
    if overrides and (args.reverse or not to_run):
        raise ValueError('--config: only a work directory has one; leave it out')
    if args.key and args.reverse:
        raise ValueError('--key: a work directory has no state dicts; leave it out')
    if not storage.resolve(args.src).exists():
        raise FileNotFoundError(f'--src={args.src}: nothing there')
    if not args.reverse and to_run and not reading.is_released(args.src):
        raise ValueError(f'--src={args.src}: no released weights there (.safetensors, .pth, .bin); from a work '
                         'directory to weights it is --reverse')
    if args.step != 'last' and (not args.reverse or reading.is_released(args.src)):
        raise ValueError(f'--step={args.step}: only a work directory has checkpoints; leave it out')
    steps_lib.check(args.step, args.dst)


def check_dst(dst: str) -> None:
    """Raises a ValueError or OSError unless `dst` is new, or empty, and can be written."""
    folder = storage.resolve(dst)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'--dst={dst}: something is there already; choose another place')
    storage.check_writable(folder, '--dst')


def summary(kind: str, module: Any, params: Any, dst: str) -> str:
    """One line: what, how large, where."""
    count = sum(np.size(x) for x in jax.tree.leaves(params))
    codes = {'sem': ('num_codes', 'vocab_size'), 'sedd': ('length', 'vocab_size')}.get(kind, ())
    if kind == 'dit' and module.condition == 'code':
        codes = ('num_codes', 'vocab_size')
    size = f', L x V = {getattr(module, codes[0])} x {getattr(module, codes[1])}' if codes else ''
    return f'{kind}: {count:,} parameters{size}, {4 * count / 1e9:.3g} GB in float32 -> {dst}'


def parse(argv: list[str]) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
    """Flags and config. Kind and source decide the default config, so they are looked at first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument('--kind', nargs='?')
    first.add_argument('--src', nargs='?')
    known = first.parse_known_args(argv)[0]
    kind = known.kind if known.kind in kinds.CONFIGURED else 'sem'
    noted = reading.noted_settings(kind, known.src) if known.src and '--reverse' not in argv else []
    return launch.parse(parser(), [*noted, *argv], default_config=kinds.published_config(kind))


def main() -> None:
    argv = sys.argv[1:]
    args, config = parse(argv)
    check_flags(args, any(a.startswith('--config') for a in argv))
    launch.initialize(args)
    if jax.process_count() > 1:
        raise ValueError('experiments.convert writes from one process; run it without --distributed')
    wanted = steps_lib.wanted(args.step, args.src, args.dst) if args.reverse else [None]
    places = [steps_lib.placed(args.dst, step) for step in wanted]
    for dst in places:
        check_dst(dst)
    for step, dst in zip(wanted, places):
        convert_one(args, config, dst, step)


def convert_one(args: argparse.Namespace, config: ml_collections.ConfigDict, dst: str, step: int | None) -> None:
    """Converts one set of weights to the folder `dst`; of a work directory, those of its newest checkpoint or of
    `step`."""
    if args.kind in LANGUAGE:
        print(language.export(args.kind, args.src, dst, adapter=args.adapter, base=args.base,
                              dtype=args.dtype or 'float32', step=step))
        return
    if args.kind == 'llada':
        print(llada.write(args.src, dst, reverse=args.reverse, dtype=args.dtype, key=args.key, step=step))
        return
    to_run = '' if args.reverse else kinds.KINDS[args.kind].experiment  # what the work directory will be of
    if to_run and config.get('experiment') != to_run:
        raise ValueError(f'--config: experiment={config.get("experiment")!r}, but a {args.kind} makes {to_run!r}')
    diffusion = None
    if args.reverse and not reading.is_released(args.src):
        module, params, of_run = writing.read_run(args.kind, args.src, step)
        diffusion = of_run.diffusion if args.kind == 'sedd' else None
    else:
        if args.reverse and args.kind in kinds.CONFIGURED:
            raise ValueError(f'--src={args.src}: released weights already; --reverse takes a work directory')
        fields = {name: getattr(args, name) for name, takers in TAKES.items() if args.kind in takers}
        module, params = reading.read(args.kind, args.src, key=args.key, **fields,
                                       **reading.fields_of(args.kind, config))
    if to_run:
        config, params = reading.as_run(args.kind, module, params, config)
        with config.unlocked():
            config.weights_only = True
        writing.write_run(args.kind, config, params, dst)
    elif args.hf:
        with storage.local_folder(dst, last='config.json') as folder:
            files.save(folder, convert.tensors('dinov2', module, params, hf=True), dinov2.config_of(module))
    else:
        writing.write_released(args.kind, module, params, dst, diffusion=diffusion)
    print(summary(args.kind, module, params, dst))


if __name__ == '__main__':
    launch.main(main, stopped='what --dst holds is incomplete; remove it and run the same command again', status=None)
