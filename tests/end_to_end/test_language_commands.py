"""What a user does with language models beside training them, through the real commands, on models of one block."""
import json
import shutil
import sys
import types

import chex
import jax
import numpy as np
import pytest

from configs.rlhf import base
from experiments import convert as convert_command
from experiments import evaluate as evaluate_command
from experiments import evaluate_policy, relabel
from experiments import sample as sample_command
from experiments.rlhf.models import adapters, inference, loading
from experiments.rlhf.models.inference import Policy
from experiments.rlhf.policy import evaluation, reward_model
from experiments.rlhf.policy.evaluation import HeldOutPrompts
from experiments.runtime import config_files, launch, lines
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import read_metrics
from experiments.train import build, train
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.weights import files
from tests.rlhf.tiny_models import random_params

ONE = mesh_lib.make_mesh({}, jax.devices()[:1])
MODEL = dict(kind='gpt2', size='124M', width=16, depth=1, num_heads=2, vocab_size=259, max_length=128)


def settings(make, **fields):
    config = make()
    with config.unlocked():
        config.update(dict(num_steps=1, batch_size=4, log_every=1, **fields))
        config.model.update(MODEL)
        config.data.update(dict(num_rows=16, options=dict(num_steps=1, max_number=9, num_heldout=8)))
        if make is base.policy:
            config.sampling.update(dict(max_new_tokens=6, max_prompt=80, temperature=1.0))
            config.lora.rank = 2
            config.reward.gold = 'task'
    return config


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Work directories of a fine-tuned model and of a policy with an adapter, and the folder of a reward model."""
    root = tmp_path_factory.mktemp('language')
    train(settings(base.sft, max_length=100), root / 'sft', mesh=ONE)
    train(settings(base.policy, weights=str(root / 'sft'), eval_every=1, eval_prompts=6), root / 'policy', mesh=ONE)
    config = settings(base.sft, max_length=100, checkpoint_every=1, keep_checkpoints=1, keep_every=2)
    config.num_steps = 3
    train(config, root / 'kept', mesh=ONE)
    reward = RewardModel(GPT2(**{k: v for k, v in MODEL.items() if k not in ('kind', 'size')}))
    files.save(root / 'reward', convert.to_torch('gpt2', reward, random_params(reward)),
               convert.config_of('gpt2', reward))
    return root


def command(main, monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, args)])
    launch.main(main)


def interrupt(*args, **settings):
    raise KeyboardInterrupt


def test_training_reports_held_out_prompts_and_changes_nothing(runs):
    rows = [row for row in read_metrics(runs / 'policy' / 'metrics.jsonl') if 'eval_reward' in row]
    assert [row['step'] for row in rows] == [1]
    assert {'eval_gold', 'eval_kl', 'eval_kl_per_token', 'eval_accuracy', 'eval_length', 'eval_ended'} <= set(rows[0])
    assert rows[0]['eval_kl_per_token'] * rows[0]['eval_length'] == pytest.approx(rows[0]['eval_kl'])

    config = settings(base.policy, weights=str(runs / 'sft'), eval_every=2, eval_prompts=6)
    written = []
    experiment = build(config, ONE)
    writer = type('Writer', (), {'write': lambda self, step, values: written.append((step, values))})()
    hook, = experiment.hooks(writer)
    assert isinstance(hook, HeldOutPrompts)
    state = experiment.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    config.num_steps = 5
    assert [hook(step, state, None) for step in (2, 3, 4)] == [None] * 3
    chex.assert_trees_all_equal(state.params, before)
    assert [step for step, _ in written] == [2, 4] and written[0][1] == written[1][1]  # draws of its own


def test_a_run_of_a_stranger_names_no_code_to_run(runs, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(runs / 'policy', tmp_path / 'run')
    (tmp_path / 'stranger_reward.py').write_text(
        'import pathlib\n\n\ndef reward(texts, rows):\n    pathlib.Path(__file__).with_name("RAN").touch()\n'
        '    return [0.0] * len(texts)\n')
    monkeypatch.syspath_prepend(tmp_path)
    saved = json.loads((run / 'config.json').read_text())
    for field in ('function', 'gold'):
        changed = saved | {'reward': saved['reward'] | {field: 'stranger_reward:reward'} | (
            {'kind': 'function'} if field == 'function' else {})}
        (run / 'config.json').write_text(json.dumps(changed))
        with pytest.raises(SystemExit):
            command(evaluate_command.main, monkeypatch, f'--policy={run}', '--num=2')
        assert 'names code to run' in capsys.readouterr().err
        assert 'stranger_reward' not in sys.modules and not (tmp_path / 'RAN').exists()
    command(evaluate_command.main, monkeypatch, f'--policy={run}', '--num=2', '--trust')
    assert (tmp_path / 'RAN').exists()
    sys.modules.pop('stranger_reward')


def test_evaluate_and_sample(runs, monkeypatch, capsys):
    out, texts = runs / 'metrics.json', runs / 'responses.jsonl'
    measured = (evaluate_command.main, monkeypatch, f'--policy={runs / "policy"}', f'--reference={runs / "sft"}',
                f'--gold={runs / "reward"}', '--num=5', '--num_samples=2', '--temperature=1', '--batch_size=8',
                '--drift=4')
    command(*measured, f'--json={out}', f'--out={texts}')
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    again, of_again = runs / 'again.json', (f'--json={runs}/again.json', f'--out={runs}/again.jsonl')
    computing = (inference.generate_lib, 'generate'), (reward_model, 'last_scores'), (inference, '_score')
    for interrupted in (*computing, (evaluation, 'of_variety')):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*interrupted, interrupt)
            command(*measured, *of_again)
        assert not again.exists() and (runs / 'again.json.partial').is_dir() is (interrupted is not computing[0])
    with monkeypatch.context() as patch:  # all is there by now
        for place in computing:
            patch.setattr(*place, interrupt)
        command(*measured, *of_again)
    assert again.read_bytes() == out.read_bytes() and not (runs / 'again.json.partial').exists()
    assert (runs / 'again.jsonl').read_bytes() == texts.read_bytes()
    capsys.readouterr()
    assert (found['num_prompts'], found['num_samples'], found['temperature']) == (5, 2, 1)
    assert {'reward', 'gold', 'accuracy', 'pass_at_1', 'pass_at_2', 'kl', 'kl_per_token', 'perplexity',
            'legacy_kl_perplexity', 'drift_perplexity', 'distinct_samples', 'length', 'ended'} <= set(found)
    assert found['perplexity'] > found['legacy_kl_perplexity'] > 1
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    assert len(lines) == 10 and lines[0]['prompt'] == lines[1]['prompt'] != lines[2]['prompt']

    prompts = runs / 'prompts.jsonl'
    prompts.write_text('{"prompt": "3+4=", "id": 7}\n{"prompt": "5-1="}\n')
    command(sample_command.main, monkeypatch, f'--policy={runs / "policy"}', f'--prompts={prompts}', '--num_samples=2',
            '--temperature=0.7', '--max_new_tokens=3', '--batch_size=8', f'--out={texts}')
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    assert [line['prompt'] for line in lines] == ['3+4='] * 2 + ['5-1='] * 2 and lines[1]['id'] == 7
    assert all(line['logprob'] < 0 for line in lines) and '4 responses' in capsys.readouterr().out


def test_every_checkpoint_is_a_row_of_a_curve_that_goes_on(runs, tmp_path, monkeypatch, capsys):
    curve = tmp_path / 'curve.jsonl'
    flags = (f'--policy={runs / "kept"}', '--task=arithmetic', '--num=3', '--max_new_tokens=2', '--batch_size=8')
    measured = []
    real = evaluate_policy.evaluation.evaluate_policy

    def once(policy, *args, **settings):
        measured.append(sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(policy.params)))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(policy, *args, **settings)
    monkeypatch.setattr(evaluate_policy.evaluation, 'evaluate_policy', once)
    command_of_all = (evaluate_command.main, monkeypatch, *flags, '--step=all', f'--json={curve}')
    with pytest.raises(KeyboardInterrupt):
        command(*command_of_all)
    assert [row['step'] for row in read_metrics(curve)] == [2]
    command(*command_of_all)
    rows = read_metrics(curve)
    assert [row['step'] for row in rows] == [2, 3] and 0 < rows[0]['hours'] < rows[1]['hours']
    assert len(measured) == 3 and measured[1] == measured[2] != measured[0]  # other weights, and no row made twice
    capsys.readouterr()
    command(evaluate_command.main, monkeypatch, *flags, '--step=2')
    assert {name: rows[0][name] for name in ('length', 'ended')} == {
        name: value for name, value in json.loads(capsys.readouterr().out).items() if name in ('length', 'ended')}
    with pytest.raises(SystemExit):
        command(*command_of_all, '--seed=1')
    assert 'holds a curve that was measured with other flags' in capsys.readouterr().err

    command(sample_command.main, monkeypatch, f'--policy={runs / "kept"}', '--prompt=3+4=', '--max_new_tokens=2',
            '--step=all', f'--out={tmp_path}/{{step}}.jsonl')
    assert (tmp_path / '2.jsonl').exists() and (tmp_path / '3.jsonl').exists()
    command(convert_command.main, monkeypatch, '--reverse', '--kind=gpt2', f'--src={runs / "kept"}',
            f'--dst={tmp_path}/exported/{{step}}', '--step=all')
    first, last = (jax.tree.leaves(loading.load_policy(tmp_path / 'exported' / step)[1]) for step in '23')
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(first, last))


def test_the_least_length_of_a_run_is_for_its_own_task(runs, tmp_path, monkeypatch, capsys):
    """Else its answers to other tasks could not be compared with those of the model that it started from."""
    shutil.copytree(runs / 'policy', tmp_path / 'policy')
    config = config_files.read(tmp_path / 'policy')
    config.sampling.min_new_tokens = 4
    config_files.save(config, tmp_path / 'policy')
    (tmp_path / 'questions.jsonl').write_text('{"question": "Why?", "response_j": "Because."}\n')
    other, asked = ('--task=stackexchange', f'--path={tmp_path}/questions.jsonl', '--split=train'), ('--prompt=3+4=',)
    found = []

    def seen(self, **how):
        found.append(how['min_new_tokens'])
        raise KeyboardInterrupt
    monkeypatch.setattr(Policy, 'sampling', seen)
    for main, flags in ((evaluate_command.main, ()), (evaluate_command.main, other), (sample_command.main, asked)):
        for least in ((), ('--min_new_tokens=2',)):
            with pytest.raises(KeyboardInterrupt):
                command(main, monkeypatch, f'--policy={tmp_path}/policy', *flags, *least)
    assert found == [4, 2, 0, 2, 0, 2]
    with pytest.raises(SystemExit):
        command(evaluate_command.main, monkeypatch, f'--policy={tmp_path}/policy', '--max_new_tokens=3')
    assert '--max_new_tokens=3 is less than the 4 before which no response ends; raise it' in capsys.readouterr().err


@pytest.mark.parametrize('main, args, message', [
    (evaluate_command.main, ('--policy={policy}', '--step=all'), 'say with --json=FILE where its rows go'),
    (evaluate_command.main, ('--policy={policy}', '--step=7'), 'holds steps 1; what is kept of a run'),
    (evaluate_command.main, ('--policy={policy}', '--step=newest'), "give a checkpoint's step, 'all' or 'last'"),
    (evaluate_command.main, ('--policy={reward}', '--step=1', '--task=arithmetic'), 'no checkpoint there yet'),
    (sample_command.main, ('--policy={policy}', '--prompt=a', '--step=all', '--out={policy}/x.jsonl'),
     'would be written once for each checkpoint; put {step} into'),
    (convert_command.main, ('--reverse', '--kind=gpt2', '--src={policy}', '--step=9', '--dst={policy}/new'),
     '--step=9: '),
    (convert_command.main, ('--kind=sem', '--src={reward}', '--step=1', '--dst={policy}/new'),
     'only a work directory has checkpoints'),
    (evaluate_command.main, ('--policy=nowhere',), 'nowhere: no config.json there'),
    (evaluate_command.main, ('--policy={policy}', '--num_samples=4'), 'with --temperature=0: all samples'),
    (evaluate_command.main, ('--policy={policy}', '--gold=nothing'), '--gold: nothing is neither a folder'),
    (evaluate_command.main, ('--policy={reward}',), 'holds a reward model, not a policy'),
    (evaluate_command.main, ('--policy={policy}', '--max_prompt=3'), 'none of 8 prompts has at most 3 tokens'),
    (sample_command.main, ('--policy={policy}', '--prompt=a', '--min_new_tokens=-1'), 'must be at least 0'),
    (sample_command.main, ('--policy={policy}',), 'give either --prompt=TEXT or --prompts=FILE'),
    (sample_command.main, ('--policy={policy}', '--prompts={sft}/config.json'), 'holds a dict, expected a list'),
    (sample_command.main, ('--policy={policy}', '--prompt=a', '--max_new_token=3'), 'did you mean --max_new_tokens?'),
    (convert_command.main, ('--kind=gpt2', '--src={policy}', '--dst={policy}/new'), '--reverse writes one'),
    (convert_command.main, ('--reverse', '--kind=llama', '--src={policy}', '--dst={policy}/new'), 'holds a gpt2'),
    (convert_command.main, ('--reverse', '--kind=gpt2', '--adapter', '--src={sft}', '--dst={policy}/new'),
     'was trained without one'),
    (convert_command.main, ('--reverse', '--kind=gpt2', '--base=x', '--src={sft}', '--dst={policy}/new'),
     '--base: only an --adapter has one'),
    (sample_command.main, ('--policy={sft}', '--prompt=a', '--adapter={sft}'), 'no adapter_config.json there'),
])
def test_mistakes_are_one_line(runs, monkeypatch, capsys, main, args, message):
    with pytest.raises(SystemExit):
        places = {name: runs / name for name in ('policy', 'sft', 'reward')}
        command(main, monkeypatch, *(arg.format(**places) for arg in args))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last


def test_help_says_how(monkeypatch, capsys):
    for main, text in ((evaluate_command.main, '--gold_before_eos'), (sample_command.main, '--num_samples')):
        with pytest.raises(SystemExit):
            command(main, monkeypatch, '--policy=RUN', '--help')
        assert text in capsys.readouterr().out


def test_responses_and_pairs_in_parts_are_those_of_the_whole(runs, tmp_path, monkeypatch, capsys):
    rows = tmp_path / 'rows.jsonl'
    rows.write_text(''.join(json.dumps({'prompt': f'{i % 2}+1=', 'chosen': f' {i}', 'rejected': f' {i}{i}'}) + '\n'
                            for i in range(7)))
    made = {'responses': (sample_command.main, f'--policy={runs / "sft"}', f'--prompts={rows}', '--num_samples=2',
                          '--temperature=1', '--max_new_tokens=3', '--batch_size=2'),
            'relabelled': (relabel.main, f'--pairs={rows}', f'--gold={runs / "reward"}', '--tokenizer=bytes',
                           '--batch_size=2')}
    for name, (main, *arguments) in made.items():
        out = lambda folder: f'--out={tmp_path}/{folder}/{name}.jsonl'
        command(main, monkeypatch, *arguments, out('whole'))
        whole = (tmp_path / 'whole' / f'{name}.jsonl').read_bytes()
        if name == 'responses':  # the same prompt in another block has draws of its own
            drawn = [json.loads(line)['completion'] for line in whole.splitlines()]
            assert drawn[:2] != drawn[4:6]
        for i in (0, 1):
            command(main, monkeypatch, *arguments, out('parts'), f'--shard={i}/3')
        assert '2 of 3 shards; missing are 2/3' in capsys.readouterr().out
        interrupt_lines(main, monkeypatch, *arguments, out('parts'), '--shard=2/3', blocks=1)
        with open(tmp_path / 'parts' / f'{name}.jsonl.shards' / '00002-of-00003.partial', 'ab') as file:
            file.write(b'{"prompt": "whole"}\n{"prompt": "cut by a ki')  # of a block that was not finished
        with pytest.raises(SystemExit):
            command(main, monkeypatch, *arguments, out('parts'), '--shard=2/3', *(
                ['--seed=1'] if name == 'responses' else ['--before_eos']))
        assert 'was begun with other flags' in capsys.readouterr().err
        command(main, monkeypatch, *arguments, out('parts'), '--shard=2/3')
        assert (tmp_path / 'parts' / f'{name}.jsonl').read_bytes() == whole
        assert [path.name for path in (tmp_path / 'parts').iterdir()] == [f'{name}.jsonl']
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command(main, monkeypatch, *arguments, out('parts'), '--shard=2/3')
        assert 'is there already, whole' in capsys.readouterr().err
        shutil.rmtree(tmp_path / 'parts')


def interrupt_lines(main, monkeypatch, *arguments, blocks):
    """Runs a command until so many blocks of two items are written."""
    real = lines.json.dumps
    written = []

    def dumps(row, **how):
        written.append(row)
        if len(written) > blocks * (4 if 'completion' in row else 2):
            raise KeyboardInterrupt
        return real(row, **how)
    with monkeypatch.context() as patch:
        patch.setattr(lines, 'json', types.SimpleNamespace(dumps=dumps))
        with pytest.raises(KeyboardInterrupt):
            command(main, patch, *arguments)


def test_relabelling_swaps_what_gold_prefers(runs, monkeypatch, capsys):
    pairs, out = runs / 'pairs.jsonl', runs / 'relabelled.jsonl'
    rows = [{'prompt': 'p', 'chosen': f' {i}', 'rejected': f' {i}{i}<|endoftext|>', 'id': i} for i in range(5)]
    pairs.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    command(relabel.main, monkeypatch, f'--pairs={pairs}', f'--gold={runs / "reward"}', '--tokenizer=bytes',
            f'--out={out}', '--batch_size=8')
    module, params = loading.load_reward_model(runs / 'reward')
    ids = lambda text: np.array([[*b'p', *text.removesuffix('<|endoftext|>').encode(), 258]])
    score = lambda text: float(module.apply({'params': params}, ids(text))[0, -1])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    swapped = 0
    for row, new in zip(rows, found):
        better, worse = sorted((row['chosen'], row['rejected']), key=score, reverse=True)
        assert (new['chosen'], new['rejected'], new['id']) == (better, worse, row['id'])
        assert new['chosen_score'] == pytest.approx(score(better), abs=1e-4)
        swapped += better == row['rejected']
    assert f'agreement {(5 - swapped) / 5:.4f}: {swapped} of 5 pairs' in capsys.readouterr().out


def test_export_merges_the_adapter_or_writes_it(runs, monkeypatch, capsys, tmp_path):
    source = runs / 'policy'
    command(convert_command.main, monkeypatch, '--reverse', '--kind=gpt2', f'--src={source}', f'--dst={tmp_path / "a"}')
    assert 'gpt2 of a policy run' in capsys.readouterr().out
    module, params, config = loading.load_trained(source)
    merged = adapters.merged(params)
    _, again, none = loading.load_policy(tmp_path / 'a')
    assert none is None
    chex.assert_trees_all_close(again, dict(merged), rtol=1e-6)
    saved = files.read_config(tmp_path / 'a')
    assert (saved['eos_token_id'], saved['pad_token_id']) == (258, 256)

    command(convert_command.main, monkeypatch, '--reverse', '--kind=gpt2', '--adapter', f'--src={source}',
            f'--dst={tmp_path / "b"}')
    assert 'no base_model_name_or_path' in capsys.readouterr().out  # it started from a run, which PEFT cannot load
    tensors = files.load_state_dict(tmp_path / 'b' / 'adapter_model.safetensors')
    plain = loading.load_policy(runs / 'sft')[1]
    settings = json.loads((tmp_path / 'b' / 'adapter_config.json').read_text())
    assert settings['base_model_name_or_path'] is None
    adapted = peft.from_torch('gpt2', tensors, module, plain, config=settings)
    chex.assert_trees_all_equal(adapted['blocks']['attn']['qkv'], params['blocks']['attn']['qkv'])
    # With its base as a folder, the adapter is sampled by flag as the run itself is.
    command(convert_command.main, monkeypatch, '--reverse', '--kind=gpt2', f'--src={runs / "sft"}',
            f'--dst={tmp_path / "base"}')
    command(convert_command.main, monkeypatch, '--reverse', '--kind=gpt2', '--adapter', f'--base={tmp_path / "base"}',
            f'--src={source}', f'--dst={tmp_path / "c"}')
    settings = json.loads((tmp_path / 'c' / 'adapter_config.json').read_text())
    assert settings['base_model_name_or_path'] == str(tmp_path / 'base')
    capsys.readouterr()
    shown = []
    for args in ((f'--policy={source}',), (f'--policy={tmp_path / "base"}', f'--adapter={tmp_path / "c"}')):
        command(sample_command.main, monkeypatch, *args, '--tokenizer=bytes', '--prompt=3+4=', '--max_new_tokens=6')
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_transformers_loads_what_is_exported(runs, monkeypatch, tmp_path):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    command(convert_command.main, monkeypatch, '--reverse', '--kind=gpt2', f'--src={runs / "sft"}', f'--dst={tmp_path}')
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    policy = Policy.load(runs / 'sft', mesh=ONE)
    found = policy.given(['12+3='], [' 12+3=15. #### 15'])
    tokens, _ = found.rows()
    tokens = tokens[:, found.prompt_mask.shape[1] - found.prompt_mask.sum():]  # without padding
    with torch.no_grad():
        logits = twin(torch.tensor(tokens)).logits.log_softmax(-1).numpy()
    length = found.tokens.shape[-1]
    expected = np.take_along_axis(logits[:, -length - 1:-1], tokens[:, -length:, None], -1)[..., 0]
    np.testing.assert_allclose(policy.logprobs(found)[0], expected, atol=1e-4)
