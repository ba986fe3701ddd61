"""Text <-> token ids: bytes or given words, which need no file, or the `tokenizer.json` of a released model.

All have `encode(text) -> list[int]`, `decode(ids) -> str`, `vocab_size`, `bos`, `eos` and `pad` (ids, or None).
Special tokens are not added by `encode` and not special in its input: a prompt that says `<|endoftext|>` cannot end
itself. Special tokens that are meant, those of a chat template, come in a `chat.Chat` through `encode_chat`.

With `start=False` text and ids continue what came before them. Sentencepiece tokenizers put a space in front of a text
and take it off again; what continues another text gets and loses none, so that ids of a prompt and of its response
decode to the prompt and its response.

Padding is told by a mask everywhere in this library, never by its id, so `pad` may be `eos`, as in models that were
released without a padding token.
"""
import difflib
import functools
import json
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax import chat
from rlhf_jax.weights.json_file import read_json

log = logging.getLogger(__name__)


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; then pad, bos and eos."""
    pad, bos, eos = 256, 257, 258
    vocab_size = 259
    stops = (258,)
    adds_bos = False
    chat_template = None
    names = {'pad_token': '<pad>', 'bos_token': '<bos>', 'eos_token': '<eos>'}
    special_tokens = {'<pad>': 256, '<bos>': 257, '<eos>': 258}

    @functools.cached_property
    def tokens(self) -> dict[int, str]:
        """id -> token."""
        return {i: f'<0x{i:02X}>' for i in range(256)} | {i: token for token, i in self.special_tokens.items()}

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of the bytes of `text`.

        Raises:
            ValueError: half of a surrogate pair, which UTF-8 cannot write.
        """
        return list(_utf8(text))

    def encode_chat(self, text: chat.Chat) -> list[int]:
        """Ids of a text with special tokens."""
        ids: list[int] = []
        for part, is_special in text.parts():
            ids += [_special_id(self.special_tokens, part)] if is_special else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, start: bool = True) -> str:
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

    Its neighbours `tokenizer_config.json` and `special_tokens_map.json` say which tokens are bos, eos and pad; where
    they do not, `generation_config.json` and `config.json`.

    Args:
        path: the file, or a folder that holds it.
        bos, eos, pad: tokens (text) to use instead. Without a padding token `pad` is `eos`.

    Attributes:
        adds_bos: whether texts of this tokenizer begin with BOS: its post-processor puts one there, or, where it has
            none, `add_bos_token` in tokenizer_config.json is true.
        stops: ids that end a response: `eos`, and what else `eos_token_id` in generation_config.json lists.
        chat_template: the Jinja source of its conversations, or None.
        names: `bos_token`, `eos_token`, ... -> token, those it has.
        special_tokens: token -> id, those that only `encode_chat` reads.
        vocab_size: ids are below it, those of added tokens included. The model's vocabulary may be padded to a larger
            size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer, or a special token that its vocabulary does not have.
        ImportError: the package tokenizers is not installed.
    """

    def __init__(self, path: str | pathlib.Path, *, bos: str | None = None, eos: str | None = None,
                 pad: str | None = None):
        path = pathlib.Path(path)
        path = path / 'tokenizer.json' if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file')
        self._tokenizer = open_file(path)
        settings = _settings(path.parent)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.tokens: dict[int, str] = {i: token for token, i in vocabulary.items()}
        self.vocab_size = max(self.tokens, default=-1) + 1
        self.special_tokens = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()
                               if token.special}
        self.names = _names(path.parent, settings) | {
            name: token for name, token in (('bos_token', bos), ('eos_token', eos), ('pad_token', pad)) if token}
        ids, ends = _ids_of_model(path.parent)
        self.bos, self.eos, self.pad = (self._named(path, name, ids)
                                        for name in ('bos_token', 'eos_token', 'pad_token'))
        self.pad = self.eos if self.pad is None else self.pad
        self.stops = tuple(dict.fromkeys(i for i in (self.eos, *ends) if i in self.tokens))
        self.adds_bos = self._begins_with_bos(path, settings)
        self.chat_template = _chat_template(path.parent, settings)

    def id_of(self, token: str) -> int | None:
        """Id of one token, special or not; None where the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of `text`, no special token before, after or within.

        Args:
            start: whether the text begins here, or continues another.

        Raises:
            ValueError: half of a surrogate pair, which no tokenizer reads.
        """
        _utf8(text)
        tokenizer = self._tokenizer if start else self._continuing
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if self._control.isdisjoint(ids):
            return ids
        # A Unigram model has control tokens among its pieces: their spelling is encoded in two parts.
        token = chat.spells(text, [self.tokens[i] for i in ids if i in self._control])
        if token is None:
            return ids
        place = text.index(token) + 1
        return self.encode(text[:place], start=start) + self.encode(text[place:], start=False)

    def encode_chat(self, text: chat.Chat) -> list[int]:
        """Ids of a text with special tokens, as `transformers` gives them where nobody typed one."""
        _utf8(text.marked)
        for part, is_special in text.parts():
            if is_special:
                _special_id(self.special_tokens, part)
        tokenizer, meant = self._marking
        return [meant.get(i, i) for i in tokenizer.encode(text.marked, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int], *, start: bool = True) -> str:
        """Text of `ids` without the special ones.

        Args:
            start: whether the text begins here, or continues another.
        """
        tokenizer = self._tokenizer if start else self._continuing
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    # ---- The library's tokenizer, twice more -------------------------------------------------------------------------

    @functools.cached_property
    def _continuing(self) -> Any:
        """The tokenizer without the space that a text of its own begins with."""
        import tokenizers
        saved = json.loads(self._tokenizer.to_str())
        changed = saved | {name: _without_prefix(saved.get(name)) for name in ('normalizer', 'pre_tokenizer')}
        changed['decoder'] = _without_prefix(saved.get('decoder'), decoder=True)
        if changed == saved:
            return self._tokenizer
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _marking(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with each special token between marks as a further token, and the ids these stand for."""
        import tokenizers
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        # Not special for the library, which would not look for them: the flags that say what they swallow stay.
        tokenizer.add_tokens([tokenizers.AddedToken(
            chat.special(token.content), single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
            normalized=token.normalized, special=False) for token in special.values()])
        to_id: Any = tokenizer.token_to_id
        return tokenizer, {to_id(chat.special(token.content)): i for i, token in special.items()}

    @functools.cached_property
    def _control(self) -> frozenset[int]:
        """Ids that plain text never becomes; the unknown token is one that it may."""
        unknown = json.loads(self._tokenizer.to_str())['model']
        names = {unknown.get('unk_token'), self.tokens.get(unknown.get('unk_id'))}
        return frozenset(i for token, i in self.special_tokens.items() if token not in names)

    # ---- Special tokens ----------------------------------------------------------------------------------------------

    def _named(self, path: pathlib.Path, name: str, ids: dict[str, int]) -> int | None:
        """Id of the token called `name`; the text of one that only the model's files name is noted."""
        if name in self.names:
            number = self._tokenizer.token_to_id(self.names[name])
            if number is None:
                raise ValueError(f'{path}: special token {self.names[name]!r} is not in the vocabulary')
            return number
        number = ids.get(name)
        if number in self.tokens:
            self.names[name] = self.tokens[number]
            return number
        return None

    def _begins_with_bos(self, path: pathlib.Path, settings: dict[str, Any]) -> bool:
        asked = settings.get('add_bos_token')
        if self._tokenizer.post_processor is None:
            return asked is True and self.bos is not None
        first = self._tokenizer.encode('', add_special_tokens=True).ids[:1]
        if self.bos is None and first and first[0] != self.eos:
            self.bos, self.names['bos_token'] = first[0], self.tokens[first[0]]
        begins = bool(first) and first[0] == self.bos
        if isinstance(asked, bool) and asked != begins:
            log.warning('%s: its post-processor %s BOS, though add_bos_token in tokenizer_config.json is %s; the '
                        'post-processor is followed, as transformers 5 does; bos=True or False decides', path,
                        'adds a' if begins else 'adds no', str(asked).lower())
        return begins


def set_bos(folder: pathlib.Path, tokenizer: JsonTokenizer, bos: bool) -> None:
    """Changes the files of `tokenizer` in `folder` so that whoever reads them begins texts with BOS, or does not."""
    path = folder / 'tokenizer.json'
    token, saved = tokenizer.names.get('bos_token'), read_json(path)
    sequence = lambda name, kind: {'Sequence': {'id': name, 'type_id': kind}}
    first = {'SpecialToken': {'id': token, 'type_id': 0}}
    saved['post_processor'] = {
        'type': 'TemplateProcessing', 'single': [first, sequence('A', 0)],
        'pair': [first, sequence('A', 0), sequence('B', 1)],
        'special_tokens': {token: {'id': token, 'ids': [tokenizer.bos], 'tokens': [token]}}} if bos else None
    path.write_text(json.dumps(saved, ensure_ascii=False), encoding='utf-8')
    settings = _read_object(folder / 'tokenizer_config.json') | {'add_bos_token': bos}
    if str(settings.get('tokenizer_class', '')).startswith('GPTNeoX'):  # transformers 5 gives it no BOS, come what may
        settings['tokenizer_class'] = 'PreTrainedTokenizerFast'
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings, indent=1), encoding='utf-8')


# ---- Files -----------------------------------------------------------------------------------------------------------

def open_file(path: pathlib.Path) -> Any:
    """The tokenizer of the `tokenizers` library in a tokenizer.json, without what the file says of lengths.

    Text that spells a special token is text to it.

    Raises:
        ValueError: not a tokenizer.
        ImportError: the package tokenizers is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{path}: needs tokenizers; `pip install 'dlc-jax[text]'`") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # nothing narrower is raised, and a panic of the library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(f'{path}: not a tokenizer.json ({error})') from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file, {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    return _read_object(folder / 'special_tokens_map.json') | _read_object(folder / 'tokenizer_config.json')


def _names(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like -> token, which is written as itself or as an object with its flags."""
    names = {}
    for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get('content')
        if token is None:
            continue
        if not isinstance(token, str):
            raise ValueError(f'{folder}: {name} in tokenizer_config.json or special_tokens_map.json is a '
                             f'{type(token).__name__}, not text')
        try:
            _utf8(token)
        except ValueError as error:
            raise ValueError(f'{folder}: {name}: {error}') from None
        names[name] = token
    return names


def _ids_of_model(folder: pathlib.Path) -> tuple[dict[str, int], list[int]]:
    """`bos_token` and its like -> id, as the files of the model say it, the first of several; and all of `eos_token`.

    generation_config.json may name several ends, such as that of a turn and that of a text.
    """
    saved = _read_object(folder / 'config.json') | _read_object(folder / 'generation_config.json')
    ids = {}
    for name in ('bos_token', 'eos_token', 'pad_token'):
        numbers = saved.get(f'{name}_id')
        numbers = numbers if isinstance(numbers, list) else [numbers]
        ids[name] = [i for i in numbers if isinstance(i, int) and not isinstance(i, bool)]
    return {name: numbers[0] for name, numbers in ids.items() if numbers}, ids['eos_token']


def _chat_template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else `chat_template` of tokenizer_config.json: one, or the default of several."""
    if (folder / 'chat_template.jinja').is_file():
        try:
            return (folder / 'chat_template.jinja').read_bytes().decode('utf-8')
        except UnicodeDecodeError as error:
            raise ValueError(f'{folder}/chat_template.jinja: is not UTF-8 ({error})') from None
    template = settings.get('chat_template')
    if isinstance(template, list):
        several = {entry.get('name'): entry.get('template') for entry in template if isinstance(entry, dict)}
        template = several.get('default')
    if template is not None and not isinstance(template, str):
        raise ValueError(f'{folder}/tokenizer_config.json: chat_template is a {type(template).__name__}, not text')
    return template


def _without_prefix(part: Any, decoder: bool = False) -> Any:
    """A normalizer, pre-tokenizer or decoder of tokenizer.json without the space at the beginning of a text."""
    if not isinstance(part, dict):
        return part
    kind = part.get('type')
    if kind == 'Sequence':
        name = next(name for name in ('normalizers', 'pretokenizers', 'decoders') if name in part)
        inner = (_without_prefix(one, decoder) for one in part[name])
        return part | {name: [one for one in inner if one is not None]}
    if kind == 'Prepend':
        return None
    if kind == 'Metaspace':
        return part | {'prepend_scheme': 'never'}
    if kind == 'ByteLevel' and not decoder:
        return part | {'add_prefix_space': False}
    return part | {'start': 0} if kind == 'Strip' and decoder else part


def _special_id(special_tokens: dict[str, int], token: str) -> int:
    if token not in special_tokens:
        raise ValueError(f'{token!r} is no special token of this tokenizer; it has {sorted(special_tokens)[:20]}')
    return special_tokens[token]


def _utf8(text: str) -> bytes:
    try:
        return text.encode('utf-8')
    except UnicodeEncodeError as error:
        raise ValueError(f'text holds U+{ord(text[error.start]):04X}, half of a surrogate pair, at character '
                         f'{error.start}; a cut emoji?') from None
