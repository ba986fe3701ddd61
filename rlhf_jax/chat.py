"""Conversations as one text, in which the special tokens of the template are told from what people typed.

A chat template (Jinja, as `tokenizer_config.json` or `chat_template.jinja` brings it) writes special tokens such as
`<|im_end|>` into the text. What a user typed may spell the same characters and must not become the token. `Chat` keeps
the two apart, tokenizers read it (`encode_chat`), and for conversations in which nobody spells a special token the ids
are those of `transformers`' `apply_chat_template`.
"""
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

# Three of Unicode's noncharacters (no text holds them): around a special token that is meant, and inside typed
# characters that only spell one.
OPEN, CLOSE, _TYPED = '\ufdd0', '\ufdd1', '\ufdd2'
_MARKED = re.compile(f'{OPEN}([^{CLOSE}]*){CLOSE}')


@dataclasses.dataclass(frozen=True)
class Chat:
    """Text with special tokens.

    Attributes:
        marked: the text, each special token between `OPEN` and `CLOSE`.
        has_bos: whether the text brings its BOS where it wants one, so that none is to be put in front of it.
    """
    marked: str
    has_bos: bool = False

    def __str__(self) -> str:
        """The text as `apply_chat_template(tokenize=False)` gives it: special tokens look like typed ones."""
        return self.marked.replace(OPEN, '').replace(CLOSE, '')

    def __add__(self, other: 'Chat | str') -> 'Chat':
        """This text with `other` behind it; of a str all is typed."""
        return dataclasses.replace(self, marked=self.marked + (other.marked if isinstance(other, Chat) else
                                                               typed(other)))

    def without_end(self, token: str) -> 'Chat':
        """This text up to and with its last `token`, where only white space follows it; else unchanged."""
        text, marked, rest = self.marked.rpartition(special(token))
        return dataclasses.replace(self, marked=text + marked) if marked and not rest.strip() else self

    def parts(self) -> list[tuple[str, bool]]:
        """[(text, whether it is a special token)], in order, without empty ones."""
        return [(part, bool(i % 2)) for i, part in enumerate(_MARKED.split(self.marked)) if part]


Text = str | Chat


def concat(first: Text, second: Text) -> Text:
    """Two texts as one, which is plain where both are."""
    if isinstance(first, Chat):
        return first + second
    return Chat(typed(first)) + second if isinstance(second, Chat) else first + second


def special(token: str) -> str:
    """`token` as `Chat.marked` has it."""
    return OPEN + token + CLOSE


def typed(text: str) -> str:
    """`text` as `Chat.marked` has it: nothing in it is special.

    Raises:
        ValueError: it holds one of the noncharacters that mark special tokens.
    """
    for character in (OPEN, CLOSE, _TYPED):
        if character in text:
            raise ValueError(f'text holds U+{ord(character):04X}, which Unicode gives to no character; take it out')
    return text


def write(writer: Callable[[list[Message]], str], messages: Sequence[Message], special_tokens: Sequence[str], *,
          has_bos: bool = False) -> Chat:
    """What `writer` makes of a conversation, with its special tokens told from those that the messages spell.

    Args:
        writer: messages -> text, which copies what the messages say.
        special_tokens: all of the tokenizer's.

    Raises:
        ValueError: a message holds one of the noncharacters that mark special tokens.
    """
    spelled = _pattern(tuple(special_tokens))
    # The first character of what only looks like a special token is set apart until the writer has run.
    guard = lambda text: spelled.sub(lambda m: m[0][0] + _TYPED + m[0][1:], typed(text)) if spelled else typed(text)
    text = writer(_guarded(list(messages), guard))
    if spelled:
        text = spelled.sub(lambda m: special(m[0]), text)
    return Chat(text.replace(_TYPED, ''), has_bos)


def render(template: str, messages: Sequence[Message], *, special_tokens: Sequence[str], names: Mapping[str, str],
           generate: bool = False, date: str = '') -> Chat:
    """A conversation under a Jinja chat template.

    Args:
        messages: `{role, content}` each, and whatever else the template reads.
        special_tokens: all of the tokenizer's.
        names: `bos_token`, `eos_token`, ... -> token, for the template.
        generate: end where the assistant's next answer begins (the template's `add_generation_prompt`).
        date: YYYY-MM-DD, what templates get that ask for today's (`strftime_now`); '': they are told that there is
            none, so that the same data give the same ids tomorrow.

    Raises:
        ValueError: a template that cannot be read, or that refuses the messages.
        ImportError: no jinja2.
    """
    context: dict[str, Any] = dict(names, add_generation_prompt=generate, tools=None, documents=None)
    if date:
        context['strftime_now'] = _day(date).strftime

    def writer(messages):
        try:
            return _compiled(template).render(context | {'messages': messages})
        except ImportError:
            raise
        except Exception as error:  # templates are programs: they may fail in any way
            raise ValueError(f'chat template: {str(error) or type(error).__name__}') from None
    return write(writer, messages, special_tokens, has_bos=True)


def _day(date: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f'date={date!r} must look like 2024-07-26') from None


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """`value` with `guard` of every text in it."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {key: _guarded(inner, guard) for key, inner in value.items()}
    return [_guarded(inner, guard) for inner in value] if isinstance(value, (list, tuple)) else value


@functools.lru_cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """Matches any of `tokens`, the longest where several begin; None where there are none."""
    tokens = tuple(sorted(filter(None, tokens), key=len, reverse=True))
    return re.compile('|'.join(map(re.escape, tokens))) if tokens else None


def spells(text: str, special_tokens: Sequence[str]) -> str | None:
    """The first of `special_tokens` that `text` spells; None: it spells none."""
    pattern = _pattern(tuple(special_tokens))
    match = pattern.search(text) if pattern else None
    return match[0] if match else None


@functools.lru_cache
def _compiled(template: str) -> Any:
    """The template in a sandbox: it comes from a folder that was downloaded."""
    try:
        import jinja2
        from jinja2 import ext, sandbox
    except ImportError:
        raise ImportError("chat templates need jinja2; `pip install 'dlc-jax[text]'`") from None
    if tuple(int(part) for part in re.findall(r'\d+', jinja2.__version__)[:3]) < (3, 1, 6):
        raise ImportError(f'chat templates need jinja2 3.1.6 or later, whose sandbox holds; here is '
                          f'{jinja2.__version__}; `pip install -U jinja2`')

    class Generation(ext.Extension):
        """`{% generation %}` around an answer, which tells trainers what to train on, writes nothing itself."""
        tags = {'generation'}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters['tojson'] = to_json
    environment.globals['raise_exception'] = refuse
    return environment.from_string(template)
