"""A BERT or DistilBERT classifier of whole texts as a reward: the probability of a label, such as POSITIVE.

It reads prompt and response as text with a tokenizer of its own, so that it goes with any policy.
"""
import difflib
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import scipy.special
from jax.sharding import Mesh

from experiments.rlhf.data import lengths
from experiments.runtime import exchange, folders, modules, partition, placement, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.digest import digests
from rlhf_jax import tokenizers
from rlhf_jax.convert import bert as convert
from rlhf_jax.models import bert
from rlhf_jax.weights import files

BUCKET = 64  # texts are padded to a multiple of so many tokens


class Scored(Protocol):
    """What is read of completions: their `texts` and, in `rows`, the prompt of each."""
    texts: Any
    rows: Any


def texts_of(completions: Scored) -> list[str]:
    """Each completion after its prompt, which is whole even where it was cut for the policy."""
    prompts = [row.get('whole_prompt', row.get('prompt', '')) for row in completions.rows]
    return [f'{prompt}{text}' for prompt, text in zip(prompts, completions.texts)]


class Labels(NamedTuple):
    """Names of a classifier's outputs; the one that is rewarded, None: the only output, as it is; and whether a text
    has each label or not by itself (multi-label), rather than one of them."""
    names: tuple[str, ...]
    rewarded: int | None
    independent: bool = False


def is_classifier(path: str) -> bool:
    """Whether `path` is a folder of a classifier of this kind."""
    place = storage.resolve(path) / 'config.json'
    return bool(path) and place.exists() and folders.read_json(place).get('model_type') in convert.KINDS


def labels_of(path: str, config: dict[str, Any], num_labels: int, wanted: str) -> Labels:
    """The labels that `config.json` names.

    Args:
        wanted: name of the rewarded one; '' where there is but one output.

    Raises:
        ValueError: no such label, or none is named where there are several.
    """
    given = config.get('id2label')
    given = given if isinstance(given, dict) else {}
    names = tuple(str(given.get(str(i), f'LABEL_{i}')) for i in range(num_labels))
    if num_labels == 1 and not wanted:
        return Labels(names, None)
    independent = config.get('problem_type') == 'multi_label_classification'
    if wanted not in names:
        near = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], 1)
        hint = next((f'; did you mean {name!r}?' for name in names if [name.lower()] == near), '')
        raise ValueError(f'reward.label={wanted!r}: the labels of {path} are {names}{hint or "; choose one of them"}')
    return Labels(names, names.index(wanted), independent)


class TextClassifier:
    """The probability that prompt and response together have a label; of a classifier with one output, that output.

    Texts that are too long lose their beginning, as the published runs on IMDB had it.

    Args:
        path: folder of `BertForSequenceClassification` or `DistilBertForSequenceClassification`, with tokenizer.json.
        mesh: of the devices it runs on; each of its processes reads the parts of the weights that its devices hold.
        label: of `config.json`.
        batch_size: texts it reads at once.
        dtype: to compute in; '': float32.

    Raises:
        FileNotFoundError, ValueError: no classifier there, no tokenizer, or no such label.
    """

    def __init__(self, path: str, mesh: Mesh, *, label: str = '', batch_size: int = 64, dtype: str = ''):
        folder = pathlib.Path(storage.local_copy(path))
        if not (folder / 'tokenizer.json').exists():
            raise FileNotFoundError(f'{path}: has no tokenizer.json; save the tokenizer of the classifier beside it '
                                    '(transformers: AutoTokenizer.from_pretrained(...).save_pretrained)')
        if batch_size < 1:
            raise ValueError(f'reward.batch_size={batch_size} must be at least 1')
        config = files.read_config(folder)
        module, self._params = convert.from_torch(
            files.load_state_dict(folder), config=config, dtype=modules.dtype(dict(dtype=dtype or 'float32')),
            shardings=lambda shapes: partition.param_shardings(shapes, bert.PARTITION_RULES, mesh))
        self.labels = labels_of(path, config, module.num_labels, label)
        self._tokenizer = tokenizers.open_file(folder / 'tokenizer.json')
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > module.vocab_size:
            raise ValueError(f'{path}: its tokenizer has {size} ids, its model {module.vocab_size}; they do not belong '
                             'together')
        self._tokenizer.enable_truncation(module.max_length, direction='left')
        self._longest, self._module = module.max_length, module
        self._lengths = tuple(min(n, self._longest) for n in range(BUCKET, self._longest + BUCKET, BUCKET))
        shards = mesh_lib.batch_shards(mesh)
        self._rows = -(-batch_size // shards) * shards
        self._mesh, self._sharding = mesh, mesh_lib.batch_sharding(mesh)
        self._run = jax.jit(lambda params, tokens, mask: module.apply({'params': params}, tokens, mask))

    def identity(self) -> str:
        """What decides the score of a text: weights, architecture, tokenizer and label."""
        return repr((digests(self._params), self._module, self.labels, self._tokenizer.to_str()))

    def __call__(self, completions: Scored) -> np.ndarray:
        """float32 [N] of this process's completions; all processes of the mesh call it, each with its own."""
        logits = self.logits(texts_of(completions))
        if self.labels.rewarded is None:
            return logits[:, 0]
        if self.labels.independent:
            return scipy.special.expit(logits[:, self.labels.rewarded])
        return scipy.special.softmax(logits, 1)[:, self.labels.rewarded]

    def logits(self, texts: list[str]) -> np.ndarray:
        """float32 [N, labels] of this process's texts, in batches that are as long as their longest text needs."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        tokens = np.zeros((len(ids), self._longest), np.int32)  # the same shape in all processes
        mask = np.zeros(tokens.shape, bool)
        for i, row in enumerate(ids):
            tokens[i, :len(row)], mask[i, :len(row)] = row, True
        process = np.full(len(ids), jax.process_index(), np.int32)
        tokens, mask, owners = exchange.gather_rows(self._mesh, (tokens, mask, process))
        order, out = [], []
        for rows, length in lengths.batches_by_length(mask.sum(1), self._rows, self._lengths):
            part = tokens[rows, :length], mask[rows, :length]
            out.append(self._run(self._params, *placement.place_tree(part, self._sharding)))
            order.append(rows)
        logits = np.zeros((len(tokens), len(self.labels.names)), np.float32)
        logits[np.concatenate(order)] = np.concatenate(exchange.fetch(out))
        return logits[owners == jax.process_index()]
