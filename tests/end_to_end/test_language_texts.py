"""What tokens a stage reads and writes, through the real commands: BOS, chat templates, tokenizers of other stages."""
import json
import logging
import sys

import jax
import numpy as np
import pytest

from configs.rlhf import base
from experiments import convert as convert_command
from experiments import evaluate as evaluate_command
from experiments import evaluate_policy, relabel, sample_policy
from experiments import sample as sample_command
from experiments.rlhf.data import tasks
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.models.inference import Policy
from experiments.runtime import launch
from experiments.runtime import mesh as mesh_lib
from experiments.train import train
from rlhf_jax.tokenizers import JsonTokenizer
from tests.rlhf.tiny_tokenizers import CHATML, TEXTS, byte_level, sentencepiece

ONE = mesh_lib.make_mesh({}, jax.devices()[:1])
MODEL = dict(kind='llama', size='7B', vocab_size=512, width=16, hidden=16, depth=1, num_heads=2, num_kv_heads=2,
             max_length=160)
CHAT = [{'role': 'user', 'content': 'two and two?'}, {'role': 'assistant', 'content': 'four'},
        {'role': 'user', 'content': 'what is 3'}]


def length(texts, rows):
    return [float(len(text)) for text in texts]


def settings(make, tokenizer, **fields):
    config = make()
    with config.unlocked():
        config.update(dict(num_steps=1, batch_size=4, log_every=1, tokenizer=str(tokenizer), **fields))
        config.model.update(MODEL)
        if make is base.policy:
            config.sampling.update(dict(max_new_tokens=4, max_prompt=40, temperature=1.0))
            config.algorithm.name = 'rloo'
            config.reward.update(dict(kind='function', function='tests.end_to_end.test_language_texts:length'))
        else:
            config.max_length = 64
    return config


def with_data(config, task, path, **options):
    with config.unlocked():
        config.data.update(dict(task=task, path=str(path), heldout='train', options=options))
    return config


def command(main, monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, args)])
    launch.main(main)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Tokenizers and data."""
    root = tmp_path_factory.mktemp('texts')
    byte_level(root / 'tokenizer', eos='<|im_end|>', chat_template=CHATML)
    byte_level(root / 'other', ('<|pad|>', '<|im_end|>', '<|begin|>'), eos='<|im_end|>', texts=['lorem ipsum dolor'])
    sentencepiece(root / 'sentencepiece')
    rows = [{'prompt': f'what is {a}?', 'response': f' {a}.', 'chosen': f' {a}.', 'rejected': ' no.'} for a in range(8)]
    (root / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    chats = [{'messages': CHAT}, {'messages': CHAT[:2]}] * 2
    (root / 'chats.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in chats))
    return root


@pytest.fixture(scope='module')
def runs(files):
    """Fine-tuned with the BOS that the tokenizer asks for, and without; a reward model of another tokenizer."""
    pairs = files / 'pairs.jsonl'
    train(with_data(settings(base.sft, files / 'tokenizer'), 'pairs', pairs), files / 'sft', mesh=ONE)
    train(with_data(settings(base.sft, files / 'tokenizer', bos=False), 'pairs', pairs), files / 'plain', mesh=ONE)
    train(with_data(settings(base.reward_model, files / 'other'), 'pairs', pairs), files / 'reward', mesh=ONE)
    return files


def saved_bos(run):
    return json.loads((run / 'config.json').read_text())['bos']


def test_a_run_keeps_whether_texts_begin_with_bos(runs):
    assert saved_bos(runs / 'sft') is True and saved_bos(runs / 'plain') is False
    policy = settings(base.policy, runs / 'tokenizer')
    for weights, bos in (('sft', True), ('plain', False), ('', True)):
        with policy.unlocked():
            policy.weights = str(runs / weights) if weights else ''
        settled = tokenizer_lib.settled(policy)
        assert settled.bos is bos and policy.bos is None
    with policy.unlocked():
        policy.bos = False
    assert tokenizer_lib.settled(policy).bos is False
    assert tokenizer_lib.settled(settings(base.sft, runs / 'nowhere')).bos is None


def test_every_way_to_the_same_policy_begins_with_bos(runs, monkeypatch, tmp_path):
    tokenizer = JsonTokenizer(runs / 'tokenizer')
    for run, bos in (('sft', True), ('plain', False)):
        exported = tmp_path / run
        command(convert_command.main, monkeypatch, '--reverse', '--kind=llama', f'--src={runs / run}',
                f'--dst={exported}')
        ways = {'run': Policy.load(runs / run, mesh=ONE), 'exported': Policy.load(exported, mesh=ONE),
                'named': Policy.load(runs / run, tokenizer=str(runs / 'tokenizer'), mesh=ONE)}
        for name, policy in ways.items():
            assert policy.encode('a') == [tokenizer.bos] * bos + tokenizer.encode('a'), (run, name)
    assert Policy.load(runs / 'sft', bos=False, mesh=ONE).encode('a') == tokenizer.encode('a')
    with pytest.raises(ValueError, match='--policy=.*plain was made with tokenizer=.*in which id 0 is'):
        Policy.load(runs / 'plain', tokenizer=str(runs / 'other'), mesh=ONE)


def test_transformers_reads_an_exported_folder_as_we_do(runs, monkeypatch, tmp_path):
    transformers = pytest.importorskip('transformers')
    for run in ('sft', 'plain'):
        command(convert_command.main, monkeypatch, '--reverse', '--kind=llama', f'--src={runs / run}',
                f'--dst={tmp_path / run}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / run)
        assert theirs('what is 3').input_ids == Policy.load(runs / run, mesh=ONE).encode('what is 3')


def test_evaluate_obeys_the_config(runs, monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(evaluate_policy.evaluation, 'evaluate_policy', lambda policy, prompts, rows, *_, **found: (
        seen.append((policy, prompts, rows, found)), ({}, None))[1])
    path = tmp_path / 'config.py'
    path.write_text('from tests.end_to_end.test_language_texts import *\n\ndef get_config():\n'
                    f'    c = with_data(settings(base.policy, {str(runs / "tokenizer")!r}), "pairs", '
                    f'{str(runs / "pairs.jsonl")!r})\n    c.reward.missing_eos = "-3"\n    return c\n')
    for flags, bos in ((('--config.bos=False',), False), (('--config.bos=True',), True), ((), True)):
        command(evaluate_command.main, monkeypatch, f'--policy={runs / "sft"}', f'--config={path}', *flags)
        policy, prompts, rows, found = seen.pop()
        assert policy.encode.bos is bos and prompts[0] == rows[0]['prompt'] == 'what is 0?'
        completions = policy.given(prompts[:2], [' a', ' b'])
        scored = evaluate_policy.evaluation.completions_of(completions, rows[:2])
        unended = type(scored)(scored.texts, scored.rows, scored.tokens, scored.mask, np.array([True, False]))
        assert found['reward'](unended).tolist() == [2, -3]


def test_cut_prompts_are_read_as_the_tokens_they_are(runs):
    policy = Policy.load(runs / 'sft', mesh=ONE)
    task, long = tasks.Task(cut_prompts=True), 'the quick brown fox jumps over the lazy dog'
    for longest in range(3, 9):
        (ids,), (row,) = evaluate_policy.fitting(policy, [tasks.Prompt(long, {})], task, 4, longest)
        assert ids == [policy.tokenizer.bos, *policy.encode(long)[1 - longest:]] and len(ids) == longest
        assert long.endswith(row['prompt'])
        tokens, _ = policy.given([ids], [' a']).rows()
        assert [i for i in tokens[0].tolist() if i in ids] and policy.ids_of(ids) == ids
    (text,), _ = evaluate_policy.fitting(policy, [tasks.Prompt(long, {})], task, 4, 0)
    assert text == long


@pytest.mark.parametrize('field', ['weights', 'reward.model', 'reward.gold', 'algorithm.critic_weights'])
def test_a_stage_of_another_tokenizer_is_refused(runs, tmp_path, field):
    config = with_data(settings(base.policy, runs / 'tokenizer'), 'pairs', runs / 'pairs.jsonl')
    with config.unlocked():
        section, _, name = field.rpartition('.')
        (config[section] if section else config)[name or field] = str(runs / 'reward')
        if field == 'reward.model':
            config.reward.kind = 'model'
        if field == 'algorithm.critic_weights':
            config.algorithm.name = 'ppo'
    with pytest.raises(ValueError, match=f'{field}=.*reward was made with tokenizer=.*other, in which id 0 is '
                                         r"'<\|pad\|>'; in tokenizer=.*tokenizer it is '<\|begin\|>'"):
        train(config, tmp_path / 'run', mesh=ONE)


def test_other_places_that_take_a_tokenizer(runs, monkeypatch, capsys, caplog, tmp_path):
    out = tmp_path / 'out.jsonl'
    for main, args in (
            (relabel.main, (f'--pairs={runs / "pairs.jsonl"}', f'--gold={runs / "reward"}', f'--out={out}',
                            f'--tokenizer={runs / "tokenizer"}')),
            (evaluate_command.main, (f'--policy={runs / "sft"}', f'--gold={runs / "reward"}', '--num=2')),
            (sample_command.main, (f'--policy={runs / "sft"}', f'--tokenizer={runs / "other"}', '--prompt=a'))):
        with pytest.raises(SystemExit):
            command(main, monkeypatch, *args)
        assert 'one tokenizer serves all stages' in capsys.readouterr().err
    encode = tokenizer_lib.encoder_of(settings(base.sft, runs / 'tokenizer', bos=False))
    with caplog.at_level(logging.WARNING):
        tokenizer_lib.check_stage('weights', runs / 'sft', encode)
    assert 'its texts begin with a BOS, those of this run without' in caplog.text


def test_conversations_become_the_ids_of_the_chat_template(runs, monkeypatch, capsys):
    pytest.importorskip('jinja2')
    config = with_data(settings(base.policy, runs / 'tokenizer'), 'chat', runs / 'chats.jsonl')
    encode = tokenizer_lib.encoder_of(config)
    tokenizer = encode.tokenizer
    prompts = tasks.get(config.data, encode).prompts(config.data, 'train')
    start, end = (tokenizer.id_of(token) for token in ('<|im_start|>', '<|im_end|>'))
    assert [encode(p.text).count(start) for p in prompts] == [4, 2, 4, 2]  # from a user's turn, or before the answer
    assert [p.row.get('reference') for p in prompts] == [None, 'four'] * 2
    assert encode(prompts[0].text).count(end) == 3 and encode(prompts[0].text)[0] == start

    policy = Policy.load(runs / 'sft', mesh=ONE)
    text, = sample_policy.prompts_of([{'messages': CHAT}], policy)
    assert policy.encode(text) == encode(prompts[0].text)
    text, = sample_policy.prompts_of([{'prompt': '<|im_end|>'}], policy, chat=True, system='be brief')
    assert policy.encode(text).count(end) == 2 and policy.encode(text).count(start) == 3
    command(sample_command.main, monkeypatch, f'--policy={runs / "sft"}', '--chat', '--prompt=hi',
            '--max_new_tokens=2')
    assert json.loads(capsys.readouterr().out)['prompt'] == 'hi'


def test_templates_of_runs_that_were_trained_on_conversations(files, tmp_path):
    pytest.importorskip('jinja2')
    config = with_data(settings(base.sft, files / 'tokenizer'), 'no_robots', files / 'chats.jsonl')
    encode = tokenizer_lib.encoder_of(config)
    with pytest.raises(ValueError, match='row 0: messages: must end in'):
        tasks.get(config.data, encode).demonstrations(config.data, 'train')
    whole = [*CHAT, {'role': 'assistant', 'content': '3'}]
    (tmp_path / 'train.jsonl').write_text(json.dumps({'messages': whole}))
    for options, count in ((dict(), 2), (dict(answers='every'), 4)):
        with_data(config, 'no_robots', tmp_path / 'train.jsonl', **options)
        parts, = tasks.get(config.data, encode).demonstrations(config.data, 'train')
        assert len(parts) == count
        # The EOS behind the first answer is the token, as behind the last.
        ids = tokenizer_lib.texts.joined(encode, *parts)[0]
        assert ids.count(encode.tokenizer.eos) == 2 and ids[0] == encode.tokenizer.bos
        assert encode.tokenizer.decode(ids) == ('<|user|>\ntwo and two?\n<|assistant|>\nfour\n<|user|>\nwhat is 3\n'
                                                '<|assistant|>\n3')
    with_data(config, 'no_robots', tmp_path / 'train.jsonl', eos='<|end_of_text|>')
    with pytest.raises(ValueError, match="eos='<|end_of_text|>' is no special token of the tokenizer"):
        tasks.get(config.data, encode)


def test_a_prompt_that_spells_a_special_token_is_read_as_text(runs, monkeypatch, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        command(sample_command.main, monkeypatch, f'--policy={runs / "sft"}', '--prompt=<|im_start|>user',
                '--max_new_tokens=1')
    assert "--prompt: 1 texts spell a special token of the tokenizer, such as '<|im_start|>'" in caplog.text


@pytest.mark.parametrize('raw', ['\u2028', '\u0085', 'plain'])
def test_prompts_with_any_character(runs, tmp_path, raw):
    path = tmp_path / 'prompts.jsonl'
    path.write_bytes((json.dumps({'prompt': f'the{raw}fox'}, ensure_ascii=False) + '\r\n').encode('utf-8-sig'))
    assert sample_policy.read_prompts(str(path)) == [{'prompt': f'the{raw}fox'}]
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match='--prompts=.*prompts.jsonl: row 1 is neither'):
        sample_policy.read_prompts(str(path))


def test_completions_of_sentencepiece_continue_their_prompt(files, monkeypatch):
    """Every StackExchange row joins prompt and response at a space."""
    assert TEXTS
    tokenizer = JsonTokenizer(files / 'sentencepiece')
    encode = tokenizer_lib.texts.Encoder(tokenizer, bos=True)
    ids, ends = tokenizer_lib.texts.joined(encode, 'Question: a\n\nAnswer: ', 'yes')
    assert tokenizer.decode(ids) == 'Question: a\n\nAnswer: yes'
    drawn = np.array([ids[ends[0]:]])
    prompts = np.array([ids[:ends[0]]])
    texts, ended = tokenizer_lib.texts.decoded(tokenizer, drawn, np.ones(drawn.shape, bool), prompts,
                                               np.ones(prompts.shape, bool))
    assert texts == ['yes'] and ended.all()


def test_odd_values_in_the_config_of_a_stage_are_one_line(runs, tmp_path):
    """Every field that says how texts are read holds every kind of JSON value, and the file as a whole does."""
    whole = json.loads((runs / 'plain' / 'config.json').read_text())
    encode = tokenizer_lib.encoder_of(settings(base.sft, runs / 'tokenizer', bos=False))
    odd = [None, True, -1, 1.5, '', 'x', '\0', [], [[]], {}, {'a': 1}, [None]]
    variants = [b'[' * 100_000, b'', b'\xff', b'3', b'[]', b'null', json.dumps(whole).encode()[:-9]]
    variants += [json.dumps(whole | {name: value}).encode() for value in odd for name in (
        'tokenizer', 'bos', 'experiment', 'weights', 'data')]
    refused = 0
    for raw in variants:
        (tmp_path / 'config.json').write_bytes(raw)
        try:
            tokenizer_lib.check_stage('weights', tmp_path, encode)
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error) or 'tokenizer' in str(error), (raw[-200:], error)
            refused += 1
    assert refused > 20
