"""Conversations as the texts that a policy is trained on and continues, under a chat template."""
import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf_jax import chat
from rlhf_jax.tasks import no_robots

TEMPLATES = ('tokenizer', *no_robots.TEMPLATES)


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template with the tokenizer that reads what it writes.

    Attributes:
        name: `tokenizer`, the tokenizer's own; `tulu` or `llama3`, those of `no_robots.chat`.
        tokenizer: see `rlhf_jax.tokenizers`; None: texts are plain, for those who only look at them.
        eos: special token that ends an answer in `tulu`; '': the tokenizer's EOS.
        date: YYYY-MM-DD, for templates that write today's.

    Raises:
        ValueError: an unknown template, a tokenizer without one, or an `eos` that it does not have.
    """
    name: str
    tokenizer: Any = None
    eos: str = ''
    date: str = ''

    def __post_init__(self):
        if self.name not in TEMPLATES:
            raise ValueError(f'template={self.name!r} is not one of {TEMPLATES}')
        if self.name == 'tokenizer' and getattr(self.tokenizer, 'chat_template', None) is None:
            raise ValueError("template='tokenizer': the tokenizer has no chat_template; give 'tulu' or 'llama3', or "
                             'put a chat_template.jinja beside its tokenizer.json')
        if self.eos and self.tokenizer is not None and self.eos not in self.tokenizer.special_tokens:
            raise ValueError(f"eos={self.eos!r} is no special token of the tokenizer; '' takes its own EOS")

    @property
    def end(self) -> str:
        """Token that ends an answer."""
        if self.eos or self.tokenizer is None:
            return self.eos or no_robots.END
        return self.tokenizer.names['eos_token']

    def __call__(self, messages: Sequence[chat.Message], *, generate: bool = False) -> chat.Chat:
        """The conversation; `generate`: up to where the assistant's next answer begins.

        Raises:
            ValueError: messages that the template does not take.
        """
        tokens = () if self.tokenizer is None else tuple(self.tokenizer.special_tokens)
        if self.name == 'tokenizer':
            return chat.render(self.tokenizer.chat_template, messages, special_tokens=tokens,
                               names=self.tokenizer.names, generate=generate, date=self.date)
        return chat.write(
            lambda messages: no_robots.chat(messages, template=self.name, generate=generate, eos=self.end),
            messages, tokens, has_bos=self.name == 'llama3')

    def turns(self, messages: Sequence[chat.Message], *, every: bool = False) -> list[chat.Chat]:
        """The conversation in parts: what is given and what is to be learnt, in turn.

        Args:
            every: all answers of the assistant are to be learnt, not the last alone.

        Raises:
            ValueError: it does not end in an answer, or the template writes an answer otherwise once more follows.
        """
        answers = [i for i, message in enumerate(messages) if message.get('role') == 'assistant']
        if not answers or answers[-1] != len(messages) - 1 or not answers[0]:
            raise ValueError("messages: must begin with a question and end in an 'assistant' turn, the roles are "
                             f'{[message.get("role") for message in messages]}')
        whole = self(messages)
        marked = whole.without_end(self.end).marked
        parts, place = [], 0
        for i in answers if every else answers[-1:]:
            begin = len(self._prefix(marked, messages[:i], i, generate=True))
            end = len(marked) if i == len(messages) - 1 else len(self._prefix(marked, messages[:i + 1], i))
            parts += [dataclasses.replace(whole, marked=marked[place:begin]),
                      dataclasses.replace(whole, marked=marked[begin:end])]
            place = end
        return parts

    def _prefix(self, marked: str, messages: Sequence[chat.Message], turn: int, generate: bool = False) -> str:
        """The conversation up to some turn, once it is certain that the whole one begins so."""
        text = self(messages, generate=generate)
        text = text if generate else text.without_end(self.end)
        if not marked.startswith(text.marked):
            raise ValueError(f'chat template: message {turn} is written otherwise in the whole conversation than while '
                             'it is the last, so that a policy would be trained on what it never sees')
        return text.marked


def prompt_and_reference(messages: Sequence[chat.Message]) -> tuple[list[chat.Message], str | None]:
    """Splits a conversation into what a policy is asked and the answer, None after a user's turn.

    Raises:
        ValueError: it ends in neither a user's turn nor an answer.
    """
    roles = [message.get('role') for message in messages[-2:]]
    if roles[-1:] == ['user']:
        return list(messages), None
    if len(roles) == 2 and roles[1] == 'assistant' and isinstance(messages[-1].get('content'), str):
        return list(messages[:-1]), messages[-1]['content']
    raise ValueError("messages: must end in a 'user' turn, or in an 'assistant' turn behind another; these end in "
                     f'{roles}')
