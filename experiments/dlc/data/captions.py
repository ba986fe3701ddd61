"""Captions: where those of images come from, and as tokens beside the codes of a store."""
import json
import logging
import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from dlc_jax import text_to_code
from experiments.dlc.data.codestore import open_code_store
from experiments.dlc.data.image_files import FolderImages
from experiments.dlc.data.images import ImageSource
from experiments.dlc.data.printable import printable
from experiments.runtime import placement
from experiments.runtime.stream import ArrayBatches, Batch
from rlhf_jax import tokenizers

log = logging.getLogger(__name__)

NAME_FIELDS, CAPTION_FIELDS = ('file_name', 'name'), ('caption', 'text')  # of a line of a jsonl file


# ---- Captions of images ----------------------------------------------------------------------------------------------

def attach(source: ImageSource, where: str) -> None:
    """Gives `source` captions: from the .txt beside each image ('txt', as LAION and webdataset have them), or from a
    jsonl file of `{"file_name": ..., "caption": ...}`, names as the source has them.

    Raises:
        OSError, ValueError: no such file, a damaged line, or an image without caption.
    """
    names = [source.name(i) for i in range(len(source))]
    if where == 'txt':
        if not isinstance(source, FolderImages):
            raise ValueError('--captions=txt: only images in a folder (--data=folder) have files beside them; give a '
                             'jsonl file')
        captions = {name: _beside(source.root / name) for name in names}
    else:
        captions = read_jsonl(where)
    missing = [name for name in names if not captions.get(name)]
    if missing:
        first = printable(missing[0])
        hint = f'no {pathlib.Path(first).with_suffix(".txt")} with text' if where == 'txt' else f'not in {where}'
        raise ValueError(f'--captions={where}: {len(missing)} of {len(names)} images have no caption, the first is '
                         f'{first} ({hint})')
    source.captions = {name: captions[name] for name in names}


def clean(text: str) -> str:
    """`text` on one line, without the control characters that a terminal would obey and a tokenizer never learnt."""
    return ' '.join(''.join(' ' if unicodedata.category(c) == 'Cc' else c for c in text).split())


def _beside(image: pathlib.Path) -> str:
    """Caption in the .txt file beside `image`, '' where there is none."""
    path = image.with_suffix('.txt')
    try:
        return clean(_read_text(path))
    except FileNotFoundError:
        return ''


def _read_text(path: pathlib.Path) -> str:
    """The whole of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file, or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f'{printable(str(path))}: not a file of text')
    try:
        return path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{printable(str(path))}: not UTF-8 text (byte {error.start})') from None


def read_jsonl(path: str | os.PathLike) -> dict[str, str]:
    """{name of the image: caption}; of several captions of one image the last, and a warning."""
    file, captions, again = pathlib.Path(path).expanduser(), {}, 0
    if not file.is_file():
        raise FileNotFoundError(f"--captions={path}: no such file; give a jsonl file, or 'txt' for files beside images")
    for number, line in enumerate(_read_text(file).split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = ([row[field] for field in fields if field in row][0]
                             for fields in (NAME_FIELDS, CAPTION_FIELDS))
            caption.encode(), name.encode('utf-8', 'surrogateescape')  # no halves of characters
            again += name in captions
            captions[name] = clean(caption)
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError(f'{path}: line {number} is not {{"file_name": "...", "caption": "..."}} of whole '
                             'characters') from None
    if again:
        log.warning('%s: %d lines repeat the name of an image; the last caption of each is used', path, again)
    return captions


# ---- As tokens -------------------------------------------------------------------------------------------------------

def open_tokenizer(config: ml_collections.ConfigDict) -> Any:
    """The tokenizer of a text_to_code config, checked against its words.

    Raises:
        FileNotFoundError, ValueError: no such file, or a vocabulary of another size.
    """
    name = config.tokenizer or config.pretrained
    if not name:
        raise ValueError("tokenizer='' is the one beside the pretrained weights, but pretrained is empty too; set "
                         '--config.tokenizer to a tokenizer.json or its folder')
    if name in ('bytes', 'words'):
        found = tokenizers.ByteTokenizer() if name == 'bytes' else tokenizers.WordTokenizer(config.vocabulary)
    else:
        found = tokenizers.JsonTokenizer(name)
    size, words = found.vocab_size, config.words
    extended = isinstance(found, tokenizers.JsonTokenizer) and found.id_of(START) is not None
    separator = found.id_of(START) if extended else size
    if separator != words.separator:
        raise ValueError(f'tokenizer={name} has {separator} tokens before {START}, but words.separator='
                         f'{words.separator}; set --config.words.separator={separator}, and mask_token and pad_token '
                         'to those of the model')
    if extended and size != separator + 1 + config.model.vocab_size:
        raise ValueError(f'tokenizer={name} has {size - separator - 1} code tokens, but model.vocab_size='
                         f'{config.model.vocab_size}')
    return found


START = '<|start_sem|>'  # the separator, in released tokenizers


class CaptionedCodes(ArrayBatches):
    """Batches of a code store with captions: `codes` int32 [B, L], `captions` int32 and `caption_mask` bool [B, N].

    Captions are made into tokens when their row comes up, so that a store of millions opens at once. Those of more than
    N tokens are cut on the right, as the original does, and counted in `cut`.

    Raises:
        ValueError: no captions, an empty one, or codes of another L x V.
    """

    def __init__(self, path: str, config: ml_collections.ConfigDict, tokenizer: Any, words: text_to_code.Words,
                 **kwargs: Any):
        m = config.model
        store = open_code_store(path, num_codes=m.num_codes, vocab_size=m.vocab_size)
        self._captions, self._tokenizer, self._words = store.captions, tokenizer, words
        self._length, self.cut, self.seen = config.caption_length, 0, 0
        super().__init__({'codes': store.array('codes'), 'row': np.arange(len(store))}, config.batch_size,
                         seed=config.seed, casts={'codes': np.int32}, **kwargs)

    def _draw(self) -> Batch:
        batch = super()._draw()
        return {'codes': batch['codes'], **self.tokens([self._captions[i] for i in batch['row']])}

    def rows(self, start: int, stop: int) -> Batch:
        """Rows of the store in their own order."""
        return {'codes': self._arrays['codes'][start:stop].astype(np.int32),
                **self.tokens([self._captions[i] for i in range(start, stop)])}

    def __len__(self) -> int:
        return len(self._captions)

    def tokens(self, captions: Sequence[str]) -> Batch:
        encoded = [self._tokenizer.encode(caption) for caption in captions]
        cut = sum(len(ids) > self._length for ids in encoded)
        # Said whenever their number has doubled: not once a batch.
        if cut and (self.cut + cut).bit_length() > self.cut.bit_length():
            log.warning('%d of %d captions so far had more than caption_length=%d tokens and were cut', self.cut + cut,
                        self.seen + len(encoded), self._length)
        self.cut, self.seen = self.cut + cut, self.seen + len(encoded)
        tokens, mask = text_to_code.pad_captions(encoded, self._words, length=self._length)
        return {'captions': tokens, 'caption_mask': mask}


def open_batches(path: str, config: ml_collections.ConfigDict, words: text_to_code.Words,
                 share: placement.Share = placement.WHOLE) -> CaptionedCodes:
    """This process's stream of the store `path`."""
    return CaptionedCodes(path, config, open_tokenizer(config), words, share=share)
