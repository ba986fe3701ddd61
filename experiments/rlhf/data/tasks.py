"""The data sets of the language experiments behind one interface, each opened from a config's `data`.

    task = tasks.get(config.data, tokenizer.encode)
    for prompt, response in task.demonstrations(config.data, config.data.split): ...

Rows come from files or folders on disk (`rlhf_jax.tasks.rows`), from TensorFlow Datasets on disk (`tfds:NAME`, without
TensorFlow), or are made up on the spot (arithmetic). Nothing is downloaded. A split may be cut, as in 'train[:90%]' or
'train[500:]'.

No text ends in an end-of-text token: whoever tokenises it appends the id.
"""
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.rlhf.data import arithmetic_gold as gold
from experiments.runtime import launch
from rlhf_jax.tasks import arithmetic, gsm8k, imdb, no_robots, rows, stackexchange, tldr

log = logging.getLogger(__name__)

Data = Mapping[str, Any]
Row = Mapping[str, Any]
Tokenize = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Attributes: `text`, which the policy continues; `row`, what reward and metrics need to know about it."""
    text: str
    row: Row


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set; what it does not have is None.

    Attributes:
        demonstrations: (data, split) -> [(prompt, response)].
        preferences: (data, split) -> [(prompt, chosen, rejected)].
        prompts: (data, split) -> prompts of the policy.
        reward: (completions up to their end, rows) -> float32 [N], a rule that can be checked; None: a reward model is
            needed.
        gold: the same, of what is really wanted, where the task knows it: logged and never trained on.
        metrics: (completions, rows) -> reference metrics of the set.
        cut_prompts: prompts that are too long lose their beginning; otherwise they are left out.
    """
    demonstrations: Callable[[Data, str], list[tuple[str, str]]] | None = None
    preferences: Callable[[Data, str], list[tuple[str, str, str]]] | None = None
    prompts: Callable[[Data, str], list[Prompt]] | None = None
    reward: Callable[[Sequence[str], Sequence[Row]], np.ndarray] | None = None
    gold: Callable[[Sequence[str], Sequence[Row]], np.ndarray] | None = None
    metrics: Callable[[Sequence[str], Sequence[Row]], dict[str, float]] | None = None
    cut_prompts: bool = False


def get(data: Data, tokenize: Tokenize | None = None) -> Task:
    """The task that `data.task` names.

    Args:
        tokenize: shortens posts of TL;DR by whole paragraphs; None: they stay as long as they are.

    Raises:
        ValueError: an unknown task or option, with the nearest right name, or a path that is missing.
    """
    launch.check_choice('data.task', data['task'], TASKS)
    make, options = TASKS[data['task']]
    launch.check_fields('data.options', data['options'], tuple(options))
    if not data['path'] and data['task'] != 'arithmetic':
        raise ValueError(f'data.path is empty: data.task={data["task"]!r} needs a file or folder, or tfds:NAME')
    return make(options | dict(data['options']), tokenize)


def require(task: Task, name: str, data: Data) -> Callable[..., Any]:
    """`task.<name>`.

    Raises:
        ValueError: the task has none.
    """
    found = getattr(task, name)
    if found is None:
        raise ValueError(f'data.task={data["task"]!r} has no {name}')
    return found


# ---- Rows ------------------------------------------------------------------------------------------------------------

def read(data: Data, split: str, make: Callable[[Row], Any], fields: Sequence[str] = (), *,
         cut: Callable[[int], Sequence[int]] | None = None) -> list[Any]:
    """`make(row)` of the rows of a split, the first `data.num_rows` of them.

    A row that lacks one of `fields`, or of which `make` raises a ValueError, is an error; with `data.skip_bad_rows` it
    is left out, counted and logged.

    Args:
        cut: number of rows -> those that belong to the split.

    Raises:
        ValueError, FileNotFoundError: a bad row, no row, no such path or split.
    """
    name, low, high = _parse_split(split)
    bad: list[str] | None = [] if data['skip_bad_rows'] else None
    limit = data['num_rows'] if cut is None and not (low or high) else 0
    found = []
    for number, row in enumerate(_rows(data['path'], name, fields, bad)):
        try:
            found.append(make(row))
        except ValueError as error:
            message = f'{data["path"]}: row {number}: {error}'
            if bad is None:
                raise ValueError(message + '; data.skip_bad_rows=True leaves such rows out') from None
            bad.append(message)
        if limit and len(found) >= limit:
            break
    if bad:
        log.warning('%s: left out %d rows of %d; the first: %s', data['path'], len(bad), len(bad) + len(found), bad[0])
    if not found:
        raise ValueError(f'data.path={data["path"]}: split {split!r} has no usable row')
    if cut is not None:
        found = [found[i] for i in cut(len(found))]
    found = found[_place(low, len(found), 0):_place(high, len(found), len(found))]
    if not found:
        raise ValueError(f'data.path={data["path"]}: split {split!r} is empty')
    return found[:data['num_rows'] or None]


def _parse_split(split: str) -> tuple[str, str, str]:
    match = re.fullmatch(r'(\w*)(?:\[(\d+%?)?:(\d+%?)?\])?', split)
    if not match:
        raise ValueError(f'split={split!r} is neither a name nor a cut such as train[:90%] or train[500:]')
    return match[1], match[2] or '', match[3] or ''


def _place(bound: str, num: int, default: int) -> int:
    if not bound:
        return default
    return num * int(bound[:-1]) // 100 if bound.endswith('%') else int(bound)


def _rows(path: str, split: str, fields: Sequence[str], bad: list[str] | None) -> Iterator[Row]:
    if path.startswith('tfds:'):
        yield from _tfds_rows(path, split, fields, bad)
        return
    found = pathlib.Path(path).expanduser()
    if found.is_file() and split != 'train' and not found.name.startswith(split):
        raise ValueError(f'data.path={path} is one file, and {split!r} not a part of it; give a folder that holds '
                         f"{split}.jsonl, or cut the file, as in 'train[90%:]'")
    if not found.exists():
        raise FileNotFoundError(f'data.path={path}: no such file or folder')
    try:
        yield from rows.read(found, fields, split=split or None, bad=bad)
    except rows.BadRow as error:
        raise ValueError(f'{error}; data.skip_bad_rows=True leaves such rows out') from None


def _tfds_rows(path: str, split: str, fields: Sequence[str], bad: list[str] | None) -> Iterator[Row]:
    from experiments.dlc.data import tfds_images# heavy, and wanted only here
    import tensorflow_datasets as tfds
    name, root = path.removeprefix('tfds:'), os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    builder = tfds.builder_from_directory(str(tfds_images.find_prepared(name, root, field='data.path', others=())))
    if split not in builder.info.splits:
        raise ValueError(f'data.path={path}: no split {split!r}; it has {tuple(builder.info.splits)}')
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f'data.path={path} is not stored as array_record; prepare it again with: '
                         f'{tfds_images.prepare_command(name, root)}') from None
    for number in range(len(records)):
        row = _decoded(records[number])
        missing = next((field for field in fields if row.get(field) is None), None)
        if missing is None:
            yield row
        elif bad is None:
            raise ValueError(f'{path}: row {number}: missing field {missing!r}; it has {sorted(row)}')
        else:
            bad.append(f'{path}: row {number}: missing field {missing!r}')


def _decoded(value: Any) -> Any:
    """Bytes as text, arrays of bytes as lists of it."""
    if isinstance(value, bytes):
        return value.decode('utf-8')
    if isinstance(value, Mapping):
        return {name: _decoded(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_decoded(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f'field {field!r} is {"missing" if value is None else "a " + type(value).__name__}, not text; '
                         f'the row has {sorted(k for k, v in row.items() if v is not None)}')
    return value


def _lengths(completions: Sequence[str], references: Sequence[str] | None = None) -> dict[str, float]:
    """Mean words of the completions, and of the human ones beside them."""
    words = lambda texts: float(np.mean([len(text.split()) for text in texts]))
    return {'words': words(completions)} | ({} if not references else {'reference_words': words(references)})


# ---- Arithmetic: made up, with a rule for a reward and a gold reward -------------------------------------------------

def _arithmetic(options: dict[str, Any], _: Tokenize | None) -> Task:
    settings = {name: options[name] for name in ('num_steps', 'max_number', 'operations', 'words')}

    def problems(data, split):
        if data['path']:
            raise ValueError(f'data.path={data["path"]}: arithmetic problems are made up; leave it empty')
        name, low, high = _parse_split(split)
        if name == 'train':
            found = arithmetic.problems(options['seed'], data['num_rows'] or 10_000, **settings)
        elif name in ('validation', 'test'):
            num = options['num_heldout']
            found = arithmetic.problems(options['seed'], 2 * num, held_out=True, **settings)
            found = found[:num] if name == 'validation' else found[num:]
        else:
            raise ValueError(f"data: split {split!r} of arithmetic is not one of 'train', 'validation', 'test'")
        return found[_place(low, len(found), 0):_place(high, len(found), len(found))]

    def exact(completions, rows):
        return arithmetic.exact_match(completions, [row['answer'] for row in rows])

    def metrics(completions, rows):
        answered = np.mean([arithmetic.extract_answer(c) is not None for c in completions])
        return {'accuracy': float(exact(completions, rows).mean()), 'answered': float(answered),
                'gold': float(gold.reward(completions, rows).mean()),
                'characters': float(np.mean([len(c) for c in completions]))}

    return Task(
        demonstrations=lambda data, split: [(p.prompt, gold.demonstration(p, i, options['seed'], options['faults']))
                                            for i, p in enumerate(problems(data, split))],
        preferences=lambda data, split: gold.pairs(problems(data, split), options['seed']),
        prompts=lambda data, split: [Prompt(p.prompt, dataclasses.asdict(p)) for p in problems(data, split)],
        reward=exact, gold=gold.reward, metrics=metrics)


# ---- GSM8K -----------------------------------------------------------------------------------------------------------

def _gsm8k(options: dict[str, Any], _: Tokenize | None) -> Task:
    def prompt(row):
        return Prompt(gsm8k.prompt(row['question']), dict(row) | {'label': gsm8k.label(row)})

    def demonstration(row):
        gsm8k.label(row)
        return (gsm8k.prompt(row['question']),
                gsm8k.demonstration(row['answer'], keep_annotations=options['keep_annotations']))

    def exact(completions, rows):
        return gsm8k.exact_match(completions, [row['label'] for row in rows])

    def metrics(completions, rows):
        answered = np.mean([gsm8k.extract_answer(c) is not None for c in completions])
        return {'accuracy': float(exact(completions, rows).mean()), 'answered': float(answered),
                **_lengths(completions, [row['answer'] for row in rows])}

    return Task(demonstrations=lambda data, split: read(data, split, demonstration, gsm8k.FIELDS),
                prompts=lambda data, split: read(data, split, prompt, gsm8k.FIELDS), reward=exact, metrics=metrics)


# ---- TL;DR -----------------------------------------------------------------------------------------------------------

def _tldr(options: dict[str, Any], tokenize: Tokenize | None) -> Task:
    def query(row):
        for field in ('query', 'prompt'):  # of the prepared sets: summaries, and preferences
            if row.get(field) is not None:
                return _text(row, field)
        row = {field: _text(row, field) for field in tldr.FIELDS[:-1]}
        return tldr.truncated_query(row, tokenize, options['max_prompt']) if tokenize else tldr.query(**row)

    def reference(row):
        if row.get('reference_response') is not None:
            return _text(row, 'reference_response').removesuffix(tldr.END)
        return ' ' + _text(row, 'summary')

    def prompt(row):
        has = any(row.get(field) is not None for field in ('reference_response', 'summary'))
        return Prompt(query(row), dict(row) | ({'reference': reference(row)} if has else {}))

    def pair(row):
        return (query(row), *(_text(row, field).removesuffix(tldr.END) for field in ('chosen', 'rejected')))

    return Task(
        demonstrations=lambda data, split: read(data, split, lambda row: (query(row).strip(), reference(row))),
        preferences=lambda data, split: read(data, split, pair),
        prompts=lambda data, split: read(data, split, prompt),
        metrics=lambda completions, rows: _lengths(completions, [r['reference'] for r in rows if 'reference' in r]))


# ---- No Robots -------------------------------------------------------------------------------------------------------

def _no_robots(options: dict[str, Any], _: Tokenize | None) -> Task:
    def text(messages):
        return no_robots.chat(messages, template='tulu', generate=True, eos=options['eos'])

    def demonstration(row):
        messages, answer = no_robots.split(row)
        return text(messages), answer

    def prompt(row):
        messages, answer = no_robots.split(row)
        return Prompt(text(messages), {'reference': answer} | {k: v for k, v in row.items() if k != 'messages'})

    def pair(row):
        """Answers as texts after `messages`, or as whole conversations that differ in their last turn."""
        if isinstance(row['chosen'], str):
            return text(row['messages']), row['chosen'], _text(row, 'rejected')
        (messages, chosen), (others, rejected) = (no_robots.split({'messages': row[field]})
                                                  for field in ('chosen', 'rejected'))
        if messages != others:
            raise ValueError('chosen and rejected answer different conversations')
        return text(messages), chosen, rejected

    return Task(
        demonstrations=lambda data, split: read(data, split, demonstration, no_robots.FIELDS),
        preferences=lambda data, split: read(data, split, pair, ('chosen', 'rejected')),
        prompts=lambda data, split: read(data, split, prompt, no_robots.FIELDS),
        metrics=lambda completions, rows: _lengths(completions, [row['reference'] for row in rows]))


# ---- IMDB ------------------------------------------------------------------------------------------------------------

def _imdb(options: dict[str, Any], _: Tokenize | None) -> Task:
    def of(data, split, make, fields=imdb.FIELDS):
        """'train' and 'validation' are parts of the data set's own 'train'."""
        name, bracket, rest = split.partition('[')
        cut = None
        if name in ('train', 'validation'):
            part, name = ('train', 'validation').index(name), 'train'
            cut = lambda num: imdb.split(num, held_out=options['held_out'])[part]
        return read(data, name + bracket + rest, make, fields, cut=cut)

    def prompt(row):
        first, rest = imdb.halves(row['text'])
        if not first:
            raise ValueError(f'text: {row["text"][:40]!r} has no first half')
        return Prompt(first, dict(row) | {'reference': rest})

    def preferences(data, split):
        """Whole reviews, a positive one before a negative one."""
        labelled = of(data, split, lambda row: (int(row['label']), row['text']), (*imdb.FIELDS, 'label'))
        good, bad = ([text for label, text in labelled if label == wanted] for wanted in (imdb.POSITIVE, 0))
        if not (good and bad):
            raise ValueError(f'data.path={data["path"]}: split {split!r} has {len(good)} positive reviews and '
                             f'{len(bad)} negative ones (label 1 and 0); pairs need both')
        return [('', a, b) for a, b in zip(good, bad)]

    def metrics(completions, rows):
        long_enough = any(len(c.split()) >= 3 for c in completions)
        return _lengths(completions) | (imdb.diversity(completions) if long_enough else {})

    return Task(demonstrations=lambda data, split: of(data, split, lambda row: ('', row['text'])),
                preferences=preferences, prompts=lambda data, split: of(data, split, prompt), metrics=metrics,
                cut_prompts=True)


# ---- StackExchange ---------------------------------------------------------------------------------------------------

def _stackexchange(options: dict[str, Any], _: Tokenize | None) -> Task:
    ask = lambda row: stackexchange.prompt(_text(row, 'question'))
    return Task(
        demonstrations=lambda data, split: read(data, split, lambda row: (ask(row), _text(row, 'response_j'))),
        preferences=lambda data, split: read(
            data, split, lambda row: (ask(row), _text(row, 'response_j'), _text(row, 'response_k'))),
        prompts=lambda data, split: read(
            data, split, lambda row: Prompt(ask(row), dict(row) | {'reference': row.get('response_j') or ''}),
            ('question',)),
        metrics=lambda completions, rows: _lengths(completions, [row['reference'] for row in rows]))


# ---- Pairs: any texts ------------------------------------------------------------------------------------------------

def _pairs(options: dict[str, Any], _: Tokenize | None) -> Task:
    def texts(row, *names):
        return tuple(_text(row, options[name]) for name in names)

    def demonstration(row):
        return texts(row, 'prompt', 'response' if row.get(options['response']) is not None else 'chosen')

    return Task(
        demonstrations=lambda data, split: read(data, split, demonstration),
        preferences=lambda data, split: read(data, split, lambda row: texts(row, 'prompt', 'chosen', 'rejected')),
        prompts=lambda data, split: read(data, split, lambda row: Prompt(*texts(row, 'prompt'), dict(row))),
        metrics=lambda completions, rows: _lengths(completions))


# name -> (maker, its options and their defaults)
TASKS: dict[str, tuple[Callable[[dict[str, Any], Tokenize | None], Task], dict[str, Any]]] = {
    'arithmetic': (_arithmetic, dict(num_steps=2, max_number=20, operations='+-', words=True, seed=0,
                                     num_heldout=512, faults=0.0)),
    'gsm8k': (_gsm8k, dict(keep_annotations=False)),
    'tldr': (_tldr, dict(max_prompt=tldr.MAX_PROMPT)),
    'no_robots': (_no_robots, dict(eos=no_robots.END)),
    'imdb': (_imdb, dict(held_out=0.2)),
    'stackexchange': (_stackexchange, dict()),
    'pairs': (_pairs, dict(prompt='prompt', response='response', chosen='chosen', rejected='rejected')),
}
