"""The data sets of the language experiments behind one interface, each opened from a config's `data`.

    task = tasks.get(config.data, encoder_of(config))
    for prompt, response in task.demonstrations(config.data, config.data.split): ...

Rows come from files or folders on disk (`rlhf_jax.tasks.rows`), from TensorFlow Datasets on disk (`tfds:NAME`, without
TensorFlow), or are made up on the spot (arithmetic). Nothing is downloaded. A split may be cut, as in 'train[:90%]' or
'train[500:]'.

No plain text ends in an end-of-text token: whoever tokenises it appends the id. Conversations come as `chat.Chat`,
with the special tokens of their template.
"""
from collections.abc import Callable
from typing import Any

from experiments.rlhf.data.tasks import arithmetic, chat, gsm8k, imdb, no_robots, pairs, stackexchange, tldr
from experiments.rlhf.data.tasks.task import Data, Prompt, Task, Tokenize
from experiments.runtime import checks

__all__ = ['TASKS', 'Prompt', 'Task', 'get', 'require']

# Each has `make(options, tokenize) -> Task`, and OPTIONS: those of `data.options` that it takes, with their defaults.
TASKS: dict[str, Any] = {'arithmetic': arithmetic, 'gsm8k': gsm8k, 'tldr': tldr, 'no_robots': no_robots, 'imdb': imdb,
                         'chat': chat,
                         'stackexchange': stackexchange, 'pairs': pairs}


def get(data: Data, tokenize: Tokenize | None = None) -> Task:
    """The task that `data.task` names.

    Args:
        tokenize: shortens posts of TL;DR by whole paragraphs; None: they stay as long as they are. Its `tokenizer`
            (`texts.Encoder`) reads and writes chat templates.

    Raises:
        ValueError: an unknown task or option, with the nearest right name, an option of another type, or a path that is
            missing.
    """
    checks.choice('data.task', data['task'], TASKS)
    task = TASKS[data['task']]
    checks.fields('data.options', data['options'], tuple(task.OPTIONS))
    for name, value in data['options'].items():
        default = task.OPTIONS[name]
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(
                value, (int, float) if isinstance(default, float) else type(default)):
            raise ValueError(f'data.options.{name}={value!r} is of type {type(value).__name__}; give one of '
                             f'{type(default).__name__}, such as {default!r}')
    if not data['path'] and data['task'] != 'arithmetic':
        raise ValueError(f'data.path is empty: data.task={data["task"]!r} needs a file or folder, or tfds:NAME')
    return task.make(task.OPTIONS | dict(data['options']), tokenize)


def require(task: Task, name: str, data: Data) -> Callable[..., Any]:
    """`task.<name>`.

    Raises:
        ValueError: the task has none.
    """
    function = getattr(task, name)
    if function is None:
        raise ValueError(f'data.task={data["task"]!r} has no {name}')
    return function
