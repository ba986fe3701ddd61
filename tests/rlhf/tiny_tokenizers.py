"""Small tokenizers with the parts of released ones: byte-level BPE, and sentencepiece's with either kind of prefix."""
import json

TEXTS = ['the quick brown fox jumps over the lazy dog', 'what is two and two? four.', 'hello there, how are you? fine',
         '1+2=3 4+5=9 10-3=7', 'what is 3 and 4? 7.', 'system user assistant\n\nplease be brief']

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# With a BOS of its own, and roles that it refuses.
INST = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message.content
 + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}{{
 raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""


def byte_level(path, specials=('<|begin|>', '<|end|>', '<|pad|>', '<|im_start|>', '<|im_end|>'), *, bos='<|begin|>',
               eos='<|end|>', pad='<|pad|>', adds_bos=True, chat_template=None, texts=TEXTS):
    """A folder with a byte-level BPE tokenizer of at most 330 ids, `specials` first."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _save(tokenizer, path, bos, eos, pad, adds_bos, chat_template)


def sentencepiece(path, *, prefix='prepend', bos='<s>', eos='</s>', pad=None, adds_bos=True, chat_template=None):
    """A folder with a BPE tokenizer over `▁` and bytes, as LLaMA's. `prefix`: how a text gets its first space: by the
    normalizer ('prepend'), which gives one to what follows a special token too, or by Metaspace ('first')."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=120, special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))],
        show_progress=False, initial_alphabet=list('abcdefghijklmnopqrstuvwxyzI[]/<>|▁')))
    model = json.loads(trained.to_str())['model']
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(' ')) for m in model['merges']]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=model['vocab'], merges=merges, unk_token='<unk>', fuse_unk=True,
                                                byte_fallback=True))
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in ('<unk>', '<s>', '</s>')])
    if prefix == 'prepend':
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(' ', 1, 0)])
    return _save(tokenizer, path, bos, eos, pad, adds_bos, chat_template)


def _save(tokenizer, path, bos, eos, pad, adds_bos, chat_template):
    from tokenizers import processors
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f'{bos} $A', pair=f'{bos} $A {bos} $B',
                                                                 special_tokens=[(bos, tokenizer.token_to_id(bos))])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / 'tokenizer.json'))
    names = {'bos_token': bos, 'eos_token': eos, 'pad_token': pad, 'chat_template': chat_template}
    (path / 'tokenizer_config.json').write_text(json.dumps(
        {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': adds_bos}
        | {name: token for name, token in names.items() if token}))
    return path
