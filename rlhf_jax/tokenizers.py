"""Text <-> token ids: bytes or given words, which need no file, or the `tokenizer.json` of a released model.

All have `encode(text) -> list[int]`, `decode(ids) -> str`, `vocab_size`, `bos`, `eos` and `pad` (ids, or None).
Special tokens are not added by `encode` and not special in its input: a prompt that says `<|endoftext|>` cannot end
itself.

Padding is told by a mask everywhere in this library, never by its id, so `pad` may be `eos`, as in models that were
released without a padding token.
"""
import difflib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; then pad, bos and eos."""
    pad, bos, eos = 256, 257, 258
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes of `text`."""
        return list(text.encode('utf-8'))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without the special ones; bytes that are not UTF-8 read as U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f'tokenizer: id {next(i for i in ids if not 0 <= i < self.vocab_size)} is not one of '
                             f'{self.vocab_size}')
        return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')


class WordTokenizer:
    """Words between spaces, those of a list and no others: pad, mask, then the words in the order given.

    Attributes:
        mask: id of the token that stands for any word, in masked models.
    """
    pad, mask, bos, eos = 0, 1, None, None

    def __init__(self, words: Sequence[str]):
        self._words = ('<pad>', '<mask>', *words)
        self._ids = {word: i for i, word in enumerate(self._words) if i > 1}
        if len(self._ids) != len(words) or any(word.split() != [word] for word in words):
            raise ValueError('tokenizer: words must differ and hold no spaces')

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`.

        Raises:
            ValueError: a word that is not in the list, with the nearest one that is.
        """
        ids = []
        for word in text.split():
            if word not in self._ids:
                near = difflib.get_close_matches(word, self._ids, 1)
                raise ValueError(f'{text!r}: no word {word!r} here' + (f'; did you mean {near[0]!r}?' if near else
                                                                       f'; the words are {", ".join(self._ids)}'))
            ids.append(self._ids[word])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without pad and mask."""
        return ' '.join(self._words[int(i)] for i in ids if int(i) > 1)


class JsonTokenizer:
    """`tokenizer.json` as Hugging Face writes it, read by the `tokenizers` library.

    Args:
        path: the file, or a folder that holds it. Its neighbours `tokenizer_config.json` and `special_tokens_map.json`
            say which tokens are bos, eos and pad.
        bos, eos, pad: tokens (text) to use instead. Without a padding token `pad` is `eos`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer, or a special token that its vocabulary does not have.
        ImportError: the package tokenizers is not installed.
    """

    def __init__(self, path: str | pathlib.Path, *, bos: str | None = None, eos: str | None = None,
                 pad: str | None = None):
        try:
            import tokenizers
        except ImportError:
            raise ImportError(f"{path}: needs tokenizers; `pip install 'dlc-jax[text]'`") from None
        path = pathlib.Path(path)
        path = path / 'tokenizer.json' if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file')
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f'{path}: not a tokenizer.json ({error})') from None
        # Lengths are the caller's: a file may ask for truncation or padding.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is text
        named = _special_tokens(path.parent)
        self.bos, self.eos, self.pad = (self._id(path, token or named.get(name)) for name, token in
                                        (('bos_token', bos), ('eos_token', eos), ('pad_token', pad)))
        self.pad = self.eos if self.pad is None else self.pad

    @property
    def vocab_size(self) -> int:
        """Ids are below it, those of added tokens included. The model's vocabulary may be padded to a larger size."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int | None:
        """Id of one token, special or not; None where the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special token before or after."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without the special ones."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _id(self, path: pathlib.Path, token: str | None) -> int | None:
        if token is None:
            return None
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f'{path}: special token {token!r} is not in the vocabulary')
        return number


def _special_tokens(folder: pathlib.Path) -> dict[str, str]:
    out: dict[str, Any] = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
        if (folder / name).exists():
            out |= json.loads((folder / name).read_text())
    tokens = {name: out.get(name) for name in ('bos_token', 'eos_token', 'pad_token')}
    # A token is written as itself, or as an object with its flags.
    tokens = {name: token['content'] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if token is not None}
