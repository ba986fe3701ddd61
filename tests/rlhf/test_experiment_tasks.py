"""Every task behind the one interface, on files of a few rows."""
import json
import sys

import ml_collections
import numpy as np
import pytest

from experiments.rlhf.data import tasks
from experiments.rlhf.data.tasks import arithmetic_gold as gold
from rlhf_jax import tokenizers
from rlhf_jax.tasks import arithmetic, gsm8k

POST = dict(subreddit='x', title='T', post='first\nsecond', summary='short')
CHAT = [{'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Hello.'}]


def data(task, path='', **fields):
    return ml_collections.ConfigDict(dict(
        task=task, path=str(path), split='train', heldout='validation', num_rows=0, skip_bad_rows=False, options={})
        | fields)


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def test_unknown_names_and_missing_paths_are_errors_that_help(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        tasks.get(data('gsm8'))
    with pytest.raises(ValueError, match='data.path is empty'):
        tasks.get(data('tldr'))
    with pytest.raises(ValueError, match='data.options.max_nmber is not a field; did you mean data.options.max_number'):
        tasks.get(data('arithmetic', options=dict(max_nmber=3)))
    for options, message in ((dict(max_number='ten'), "max_number='ten' is of type str; give one of int, such as 20"),
                             (dict(words=1), 'words=1 is of type int; give one of bool, such as True'),
                             (dict(num_steps=True), 'num_steps=True is of type bool; give one of int')):
        with pytest.raises(ValueError, match=f'data.options.{message}'):
            tasks.get(data('arithmetic', options=options))
    tasks.get(data('arithmetic', options=dict(faults=0)))
    with pytest.raises(FileNotFoundError, match='data.path=.*nowhere'):
        d = data('pairs', tmp_path / 'nowhere')
        tasks.get(d).prompts(d, 'train')
    with pytest.raises(ValueError, match="data.task='imdb' has no reward"):
        tasks.require(tasks.get(data('imdb', 'x')), 'reward', data('imdb', 'x'))


# ---- Arithmetic ------------------------------------------------------------------------------------------------------

def test_arithmetic_has_everything_and_parts_that_share_nothing():
    d = data('arithmetic', num_rows=60, options=dict(num_steps=1, max_number=9, num_heldout=20, faults=0.0))
    task = tasks.get(d)
    parts = {name: task.prompts(d, name) for name in ('train', 'validation', 'test')}
    assert [len(p) for p in parts.values()] == [60, 20, 20]
    assert len({p.text for part in parts.values() for p in part}) == 100
    assert task.demonstrations(d, 'train[:7]') == task.demonstrations(d, 'train')[:7]
    assert task.demonstrations(d, 'train[50%:]') == task.demonstrations(d, 'train')[30:]
    prompts, texts = zip(*task.demonstrations(d, 'validation'))
    rows = [p.row for p in parts['validation']]
    assert prompts == tuple(p.text for p in parts['validation'])
    np.testing.assert_array_equal(task.reward(texts, rows), 1)
    np.testing.assert_array_equal(task.gold(texts, rows), 2)
    found = task.metrics([texts[0]] * 10 + [''] * 10, rows)
    assert found['answered'] == 0.5 and 0.05 <= found['accuracy'] < 0.5
    d.options.faults = 0.5
    faulty = [text for _, text in tasks.get(d).demonstrations(d, 'train')]
    clean = [row == text for row, (_, text) in zip(faulty, task.demonstrations(d, 'train'))]
    assert 0.3 < np.mean(clean) < 0.7 and tasks.get(d).prompts(d, 'train') == parts['train']
    with pytest.raises(ValueError, match="split 'dev' of arithmetic is not one of"):
        task.prompts(d, 'dev')


ROW = dict(solution='3+4=7. 7-2=5. #### 5', answer='5')


@pytest.mark.parametrize('completion,want', [
    (' 3+4=7. 7-2=5. #### 5', 1 + 0.5 + 0.5),
    (' 3+4=7. 7-2=6. #### 6', 0.5),  # one step right and one wrong cancel
    (' 3+4=7. 7-2=5. #### 6', 0.5 + 0.5),
    (' 3+4=8. 7-2=5. #### 5', 1 + 0.5),
    (' 3+4=7. 7-2=5.', 0.5),
    (' #### 5', 1.0),
    (' 3+4=7. 7-2=5. 3+4=7. 7-2=5. #### 5', 1 + 0.5 + 0.5 - 0.28),
    (' 3+4=7. 7-2=5. #### 5 So.', 1 + 0.5 - 0.08),
    ('x' * 500, -1.0)])
def test_gold_reward_by_hand(completion, want):
    assert gold.reward([completion], [ROW])[0] == pytest.approx(want, abs=1e-6)


def test_preferences_follow_the_gold_reward_and_are_the_same_every_time():
    problems = arithmetic.problems(0, 300, num_steps=2, max_number=9)
    pairs = gold.pairs(problems, 0)
    assert pairs == gold.pairs(problems, 0) and pairs != gold.pairs(problems, 1)
    rows = [dict(solution=p.solution, answer=p.answer) for p in problems]
    chosen, rejected = gold.reward([c for _, c, _ in pairs], rows), gold.reward([r for _, _, r in pairs], rows)
    assert (chosen > rejected).all()
    right = arithmetic.exact_match([r for _, _, r in pairs], [p.answer for p in problems])
    assert 0.1 < right.mean() < 0.9  # form and work count too: an answer alone does not decide
    for problem, (prompt, _, _) in zip(problems, pairs):
        assert prompt == problem.prompt


# ---- Data sets on disk -----------------------------------------------------------------------------------------------

def test_gsm8k(tmp_path):
    write(tmp_path / 'train.jsonl', [dict(question='1+1?', answer='It is <<1+1=2>>2.\n#### 2'),
                                     dict(question='1000*2?', answer='Big.\n#### 2,000')])
    d = data('gsm8k', tmp_path)
    task = tasks.get(d)
    (prompt, response), _ = task.demonstrations(d, 'train')
    assert prompt.endswith('Solution:') and response == '\nIt is 2.\n#### 2'
    rows = [p.row for p in task.prompts(d, 'train')]
    np.testing.assert_array_equal(task.reward(['#### 2', 'so #### 2000'], rows), [1, 1])
    np.testing.assert_array_equal(task.reward(['2', '#### 2'], rows), [0, 0])
    assert task.metrics(['#### 2', 'no'], rows)['accuracy'] == 0.5
    assert task.preferences is None


def test_tldr_takes_raw_and_prepared_rows(tmp_path):
    prepared = dict(query='SUBREDDIT: r/x\n\nTL;DR:', reference_response=' short<|endoftext|>')
    d = data('tldr', write(tmp_path / 'train.jsonl', [POST, prepared]))
    task = tasks.get(d)
    raw, other = task.demonstrations(d, 'train')
    assert raw == ('SUBREDDIT: r/x\n\nTITLE: T\n\nPOST: first\nsecond\n\nTL;DR:', ' short')
    assert other == (prepared['query'], ' short')
    prompts = task.prompts(d, 'train')
    assert [p.text for p in prompts] == [raw[0], other[0]] and prompts[1].row['reference'] == ' short'
    assert task.reward is None and task.metrics([' a b', 'c'], [p.row for p in prompts])['words'] == 1.5
    # With a tokenizer, posts lose paragraphs.
    for limit, post in ((60, 'first\nsecond'), (50, 'first')):
        d.options = dict(max_prompt=limit)
        (prompt,) = tasks.get(d, tokenizers.ByteTokenizer().encode).prompts(d, 'train[:1]')
        assert prompt.text == f'SUBREDDIT: r/x\n\nTITLE: T\n\nPOST: {post}\n\nTL;DR:'
    pairs = data('tldr', write(tmp_path / 'pairs.jsonl', [
        dict(prompt='P', chosen=' a<|endoftext|>', rejected=' b')]))
    assert tasks.get(pairs).preferences(pairs, 'train') == [('P', ' a', ' b')]


def test_no_robots(tmp_path):
    row = dict(messages=CHAT[:1], chosen='good', rejected='bad')
    whole = dict(chosen=CHAT[:1] + [dict(role='assistant', content='good')],
                 rejected=CHAT[:1] + [dict(role='assistant', content='bad')])
    d = data('no_robots', write(tmp_path / 'train.jsonl', [dict(messages=CHAT)]))
    pairs = data('no_robots', write(tmp_path / 'pairs.jsonl', [row, whole]))
    text = '<|user|>\nHi?\n<|assistant|>\n'
    assert tasks.get(d).demonstrations(d, 'train') == [(text, 'Hello.')]
    (prompt,) = tasks.get(d).prompts(d, 'train')
    assert prompt == tasks.Prompt(text, {'reference': 'Hello.'})
    assert tasks.get(pairs).preferences(pairs, 'train') == [(text, 'good', 'bad')] * 2


def test_imdb_cuts_train_in_two_and_pairs_labels(tmp_path):
    write(tmp_path / 'train.jsonl', [dict(text=f'a{i} b c d', label=i % 2) for i in range(10)])
    write(tmp_path / 'test.jsonl', [dict(text='x y', label=1)])
    d = data('imdb', tmp_path)
    task = tasks.get(d)
    parts = [{p.text for p in task.prompts(d, name)} for name in ('train', 'validation', 'test')]
    assert [len(p) for p in parts] == [8, 2, 1] and not parts[0] & parts[1] and 'a3 b' in parts[0] | parts[1]
    assert task.cut_prompts and task.reward is None
    for prompt, good, bad in task.preferences(d, 'train'):
        assert prompt == '' and int(good[1]) % 2 == 1 and int(bad[1]) % 2 == 0
    assert task.metrics(['a b c', 'a b d'], [{}] * 2)['distinct_1'] == pytest.approx(4 / 6)


def test_imdb_cuts_reviews_into_stretches(tmp_path):
    texts = [' '.join(f'{i}{c}' for c in 'abcde') for i in range(10)]
    write(tmp_path / 'train.jsonl', [dict(text=text, label=i % 2) for i, text in enumerate(texts)])
    d = data('imdb', tmp_path, options=dict(stretch=2))
    task = tasks.get(d)
    shown = [text for _, text in task.demonstrations(d, 'train')]
    assert len(shown) == 16 and all(f'{text.strip()[0]}a {text.strip()[0]}b' in shown for text in shown)
    assert not any('e' in text for text in shown)
    pairs = task.preferences(d, 'train')
    assert all(int(good.strip()[0]) % 2 == 1 and int(bad.strip()[0]) % 2 == 0 for _, good, bad in pairs)
    assert len(pairs) > 4 and {text for _, *pair in pairs for text in pair} <= set(shown)
    assert {p.text.count(' ') for p in task.prompts(d, 'train')} == {1}  # prompts are of whole reviews
    with pytest.raises(ValueError, match='data.options.stretch=-1 must be at least 0 words'):
        tasks.get(data('imdb', tmp_path, options=dict(stretch=-1)))


def test_stackexchange_and_pairs(tmp_path):
    d = data('stackexchange', write(tmp_path / 's.jsonl', [dict(question='q', response_j='j', response_k='k')]))
    assert tasks.get(d).preferences(d, 'train') == [('Question: q\n\nAnswer: ', 'j', 'k')]
    assert tasks.get(d).demonstrations(d, 'train') == [('Question: q\n\nAnswer: ', 'j')]
    d = data('stackexchange', write(tmp_path / 'q.jsonl', [dict(question='q', response_j='two words', response_k='k'),
                                                           dict(question='q'), dict(question='q', response_j=None)]))
    task = tasks.get(d)
    rows = [prompt.row for prompt in task.prompts(d, 'train')]
    assert [row.get('reference') for row in rows] == ['two words', None, None]  # nothing to win over
    assert task.metrics(['a'] * 3, rows) == {'words': 1, 'reference_words': 2}
    assert task.metrics(['a'] * 2, rows[1:]) == {'words': 1}
    d = data('pairs', write(tmp_path / 'p.jsonl', [dict(prompt='q', chosen='j', rejected='k'), dict(
        prompt='q', chosen='j', rejected='k', response='r')]))
    assert tasks.get(d).demonstrations(d, 'train') == [('q', 'j'), ('q', 'r')]
    assert tasks.get(d).prompts(d, 'train')[0].text == 'q'
    d.options = dict(prompt='chosen', chosen='prompt')
    assert tasks.get(d).preferences(d, 'train')[0] == ('j', 'q', 'k')


def test_bad_rows_are_errors_or_are_counted(tmp_path, caplog):
    rows = [dict(prompt='q', chosen='j', rejected='k'), dict(prompt='q', chosen=3, rejected='k'), dict(prompt='q')]
    d = data('pairs', write(tmp_path / 'p.jsonl', rows))
    with pytest.raises(ValueError, match="row 1: field 'chosen' is a int, not text.*skip_bad_rows"):
        tasks.get(d).preferences(d, 'train')
    d.skip_bad_rows = True
    assert tasks.get(d).preferences(d, 'train') == [('q', 'j', 'k')]
    assert 'left out 2 rows of 3' in caplog.text
    empty = data('pairs', write(tmp_path / 'e.jsonl', rows[1:]), skip_bad_rows=True)
    with pytest.raises(ValueError, match="split 'train' has no usable row"):
        tasks.get(empty).preferences(empty, 'train')


def test_splits_of_files(tmp_path):
    d = data('pairs', write(tmp_path / 'train.jsonl', [dict(prompt=str(i)) for i in range(10)]))
    of = lambda split: [int(p.text) for p in tasks.get(d).prompts(d, split)]
    assert of('train[:30%]') == [0, 1, 2] and of('train[8:]') == [8, 9] and of('train[2:4]') == [2, 3]
    with pytest.raises(ValueError, match='is one file'):
        of('validation')
    with pytest.raises(ValueError, match='is empty'):
        of('train[10:]')
    with pytest.raises(ValueError, match='neither a name nor a cut'):
        of('train[a:]')
    d.num_rows = 3
    assert of('train') == [0, 1, 2] and of('train[4:]') == [4, 5, 6]


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip('tensorflow_datasets')
    folder = tmp_path / 'sums' / '1.0.0'
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(name='sums', version=tfds.core.Version('1.0.0'),
                                                      data_dir=str(folder), module_name='sums')
    features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in gsm8k.FIELDS})
    writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features),
                                        max_examples_per_shard=3, file_format='array_record')
    writer.initialize_splits(['train'])
    writer.add_examples({'train': [dict(question=f'{i}+1?', answer=f'é #### {i + 1}') for i in range(5)]})
    writer.close_all()
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    d = data('gsm8k', 'tfds:sums')
    prompts = tasks.get(d).prompts(d, 'train[1:]')
    assert [p.row['label'] for p in prompts] == ['2', '3', '4', '5'] and prompts[0].row['answer'] == 'é #### 2'
    with pytest.raises(ValueError, match=r"data.path=tfds:sums: no split 'test'; it has \('train',\)"):
        tasks.get(d).prompts(d, 'test')
    other = data('pairs', 'tfds:sums', options=dict(prompt='text'))
    with pytest.raises(ValueError, match="row 0: field 'text' is missing"):
        tasks.get(other).prompts(other, 'train')
    nothing = data('gsm8k', 'tfds:imdb_reviews')
    with pytest.raises(FileNotFoundError, match="data.path='imdb_reviews': not prepared .* tfds build imdb_reviews"):
        tasks.get(nothing).prompts(nothing, 'train')
    assert 'tensorflow' not in sys.modules


def test_real_gsm8k(shared_data):
    for split, num in (('train', 7473), ('test', 1319)):
        d = data('gsm8k', shared_data / 'gsm8k' / f'{split}.jsonl.xz')
        prompts, shown = (getattr(tasks.get(d), name)(d, split) for name in ('prompts', 'demonstrations'))
        assert len(prompts) == num and all('<<' not in response for _, response in shown)
        assert tasks.get(d).reward([r for _, r in shown], [p.row for p in prompts]).mean() == 1


def test_real_reviews(shared_data):
    d = data('imdb', shared_data / 'imdb' / 'imdb_train_labelled.jsonl.xz')
    assert 2000 < len(tasks.get(d).preferences(d, 'validation')) <= 2500
