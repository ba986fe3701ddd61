"""Ids of conversations and of plain texts against `transformers`, on small tokenizers and on released ones."""
import json
import lzma
import shutil

import pytest

from rlhf_jax import chat
from rlhf_jax.tokenizers import JsonTokenizer, set_bos
from tests.rlhf.tiny_tokenizers import CHATML, INST, byte_level, sentencepiece

transformers = pytest.importorskip('transformers')
pytest.importorskip('jinja2')

USER = [{'role': 'user', 'content': 'what is two and two?'}]
ANSWERED = [*USER, {'role': 'assistant', 'content': ' four. \n'}, {'role': 'user', 'content': '  hello\n\nthere'},
            {'role': 'assistant', 'content': 'fine, naïve → 7'}]

# What released templates do: macros, namespaces, loop controls, tojson, strip, `{% generation %}`, a turn's end.
PARTS = """{%- set ns = namespace(n=0) -%}
{%- macro turn(m) -%}<|im_start|>{{ m['role'] | capitalize }}: {{ m.content.strip() | tojson }}{%- endmacro -%}
{{- bos_token -}}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- if m.role == 'assistant' %}{% generation %}{{ turn(m) }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ turn(m) }}<|im_end|>{{ ns.n }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not tools %}<|im_start|>{% endif %}"""
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def released(path, shared_data, name):
    """A folder with a released tokenizer, whose files lie packed."""
    path.mkdir()
    if name == 'neox':
        (path / 'tokenizer.json').write_bytes(lzma.open(shared_data / 'tokenizers/neox_20B_tokenizer.json.xz').read())
        (path / 'tokenizer_config.json').write_text(json.dumps(
            {'tokenizer_class': 'GPTNeoXTokenizer', 'eos_token': '<|endoftext|>', 'bos_token': '<|endoftext|>'}))
    else:
        folder = shared_data / 'weights' / {'stories': 'stories260k_llama', 'gpt2': 'gpt2_release_files'}[name]
        for file in ('tokenizer.json', 'tokenizer_config.json', 'config.json'):
            shutil.copyfile(folder / file, path / file)
    return path


def with_template(path, template):
    (path / 'chat_template.jinja').write_text(template)
    return path


@pytest.fixture
def folder(request, tmp_path):
    """The folder of a tokenizer by name; released ones skip without the data."""
    name = request.param
    if name == 'byte_level':
        return byte_level(tmp_path / name)
    if name.startswith('sentencepiece'):
        return sentencepiece(tmp_path / name, prefix=name.split('-')[1])
    return released(tmp_path / name, request.getfixturevalue('shared_data'), name)


TOKENIZERS = ('byte_level', 'sentencepiece-prepend', 'sentencepiece-first', 'stories', 'gpt2', 'neox')


def rendered(tokenizer, messages, **options):
    return chat.render(tokenizer.chat_template, messages, special_tokens=tuple(tokenizer.special_tokens),
                       names=tokenizer.names, **options)


@pytest.mark.parametrize('folder', TOKENIZERS, indirect=True)
@pytest.mark.parametrize('template', [CHATML, INST, PARTS, ZEPHYR], ids=['chatml', 'inst', 'parts', 'zephyr'])
@pytest.mark.parametrize('messages,generate', [(USER, True), (ANSWERED, False), (ANSWERED[:3], True)],
                         ids=['one', 'whole', 'more'])
def test_ids_of_a_conversation(folder, template, messages, generate):
    with_template(folder, template)
    tokenizer, theirs = JsonTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = rendered(tokenizer, messages, generate=generate)
    assert str(text) == theirs.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
    assert tokenizer.encode_chat(text) == expected


@pytest.mark.parametrize('folder', TOKENIZERS, indirect=True)
def test_plain_texts_and_whether_they_get_a_bos(folder):
    # Not through AutoTokenizer, whose class for LLaMA puts a normalizer of its own in place of the file's.
    tokenizer, theirs = JsonTokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ('what is two and two? four.', ' leading', 'trailing ', 'a\n\n  b\tnaïve → 7', ''):
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert [tokenizer.bos] * tokenizer.adds_bos + ids == theirs(text).input_ids
        decoded = tokenizer.decode(ids)
        assert decoded == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == text or text[0] == ' '  # Metaspace puts no second space in front


@pytest.mark.parametrize('theirs', ['PreTrainedTokenizerFast', 'GPTNeoXTokenizer', 'GPTNeoXTokenizerFast'])
@pytest.mark.parametrize('bos', [True, False])
def test_whoever_reads_an_export_begins_with_bos_as_it_says(tmp_path, theirs, bos):
    folder = byte_level(tmp_path)
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings | {'tokenizer_class': theirs}))
    tokenizer = JsonTokenizer(folder)
    set_bos(folder, tokenizer, bos)
    ids = transformers.AutoTokenizer.from_pretrained(folder)('what is').input_ids
    assert ids == [tokenizer.bos] * bos + tokenizer.encode('what is')


def test_a_special_token_that_swallows_the_space_beside_it(tmp_path):
    import tokenizers
    folder = with_template(byte_level(tmp_path), CHATML.replace("'<|im_end|>'", "'  <mask>  '"))
    inner = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    inner.add_special_tokens([tokenizers.AddedToken('<mask>', lstrip=True, rstrip=True, normalized=False)])
    inner.save(str(folder / 'tokenizer.json'))
    tokenizer, theirs = JsonTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode_chat(rendered(tokenizer, ANSWERED)) == theirs.apply_chat_template(ANSWERED,
                                                                                              return_dict=False)


