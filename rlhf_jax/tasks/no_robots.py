"""No Robots: instructions answered by people, as in asynchronous RLHF (arXiv 2410.18252, LLaMA-3.1-8B).

A row holds `messages`, a list of `{role, content}`, the last of them the human answer. The policy answers what comes
before it; a trained reward model scores whole conversations, and a judge compares answers with the human ones.
"""
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, str]

FIELDS = ('messages',)
MAX_PROMPT = 512
RESPONSE_LENGTH = 1024
MISSING_EOS = -10.0  # in place of the reward (`responses.penalize_missing_eos`)
END = '<|end_of_text|>'  # EOS of LLaMA-3.1's base models

ROLES = ('system', 'user', 'assistant')
TEMPLATES = ('tulu', 'llama3')


def chat(messages: Sequence[Message], *, template: str = 'tulu', generate: bool = False, eos: str = END) -> str:
    """A conversation as one text.

    Args:
        template: `tulu`, that of the published runs (they start from the base model, which has none), or `llama3`, the
            headers of LLaMA-3's own chat models, without the date that 3.1 puts into its system message.
        generate: end where the assistant's next answer begins.
        eos: text that ends an answer in `tulu`; `llama3` has its own end of a turn. Only `llama3` writes out the BOS.

    Raises:
        ValueError: no message, one without a role or content, an unknown role or template.
    """
    if template not in TEMPLATES:
        raise ValueError(f'template={template!r} is not one of {TEMPLATES}')
    if not messages:
        raise ValueError('messages: there is none')
    for i, message in enumerate(messages):
        if message.get('role') not in ROLES:
            raise ValueError(f'messages: role {message.get("role")!r} of message {i} is not one of {ROLES}')
        if not isinstance(message.get('content'), str):
            raise ValueError(f"messages: message {i} has no 'content'")
    if template == 'llama3':
        turns = [_header(m['role']) + m['content'].strip() + '<|eot_id|>' for m in messages]
        return '<|begin_of_text|>' + ''.join(turns) + (_header('assistant') if generate else '')
    text = ''
    for i, m in enumerate(messages):
        text += f"<|{m['role']}|>\n{m['content']}"
        if m['role'] != 'assistant':
            text += '\n'
        else:
            text += eos + ('\n' if i < len(messages) - 1 else '')
    return text + ('<|assistant|>\n' if generate else '')


def split(row: Mapping[str, Any]) -> tuple[list[Message], str]:
    """Splits a row into what the policy sees and the human answer.

    Raises:
        ValueError: `messages` do not end in a question and its answer.
    """
    messages = list(row['messages'])
    roles = [m.get('role') for m in messages[-2:]]
    if roles != ['user', 'assistant']:
        raise ValueError(f"messages: must end in a 'user' and an 'assistant' turn, these end in {roles}")
    return messages[:-1], messages[-1]['content']


def prompt(row: Mapping[str, Any], *, template: str = 'tulu', eos: str = END) -> str:
    """The text that the policy continues; keep those of at most `MAX_PROMPT` tokens (`prompts.encode`)."""
    return chat(split(row)[0], template=template, generate=True, eos=eos)


def demonstration(row: Mapping[str, Any], *, template: str = 'tulu', eos: str = END) -> str:
    """The whole conversation, ended, for fine-tuning."""
    split(row)
    return chat(row['messages'], template=template, eos=eos)


def preference(messages: Sequence[Message], chosen: str, rejected: str, *, template: str = 'tulu',
               eos: str = END) -> tuple[str, str]:
    """Two conversations for the reward model that differ in their last answer alone, the better one first."""
    answered = [[*messages, {'role': 'assistant', 'content': answer}] for answer in (chosen, rejected)]
    return chat(answered[0], template=template, eos=eos), chat(answered[1], template=template, eos=eos)


def _header(role: str) -> str:
    return f'<|start_header_id|>{role}<|end_header_id|>\n\n'
