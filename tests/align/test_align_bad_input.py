"""Settings and files that cannot work are refused in one line that names the field, before anything is compiled."""
import jax
import numpy as np
import pytest

from align_runs import CAPTIONS, L, V, config_of, devices, write_captions, write_generator, write_inputs
from experiments import train
from experiments.dlc.data import codestore_writer
from experiments.dlc.judge import Judge, PictureJudge
from experiments.rlhf.policy import algorithms


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = write_inputs(tmp_path_factory.mktemp('align'))
    write_generator(root / 'six', num_codes=6)
    write_captions(root / 'unlabelled.jsonl', label=None)
    (root / 'empty.txt').write_text('\n')
    (root / 'damaged.jsonl').write_text('{"caption": "red fox"}\n{"text": "no caption"}\n')
    (root / 'blank.jsonl').write_text('{"caption": " "}\n')
    (root / 'long.txt').write_text('snow in snow\nred\n')
    for name, captions in (('store', list(CAPTIONS)), ('bare', None)):
        meta = dict(num_codes=L, vocab_size=V, captions=True) if captions else dict(num_codes=L, vocab_size=V)
        with codestore_writer.writer(root / name, num=6, meta=meta) as store:
            store.append({'codes': np.zeros((6, L), np.int32)}, names=list('abcdef'), captions=captions)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 2, 4, 1)).astype(np.uint8), np.arange(60) % 3
    judge = Judge.fit(images, labels)
    PictureJudge(judge, (4, 4, 1), ((0, 2, 0, 4),)).save(root / 'three')  # knows labels 0..2
    PictureJudge(judge, (4, 4, 1), ((0, 2, 0, 4), (2, 4, 0, 4))).save(root / 'judge')
    PictureJudge(judge, (4, 8, 1), ((0, 2, 0, 4), (2, 4, 0, 4))).save(root / 'wide')
    return root


def judged(name):
    return dict(reward__kind='model', reward__model='{root}/' + name)


BAD = {
    'codes of another generator': (dict(generator__path='{root}/six'),
                                   'generator.path=.*six: the generator takes codes of 6 x 4, but .* are 8 x 4'),
    'no generator': (dict(generator__path=''), 'generator.path is empty'),
    'a generator that is none': (dict(generator__path='{root}/judge'), 'judge.*experiment'),
    'a judge of other images': (judged('wide'), r'reward.kind: .*wide judges images of \(4, 8, 1\).* \(4, 4, 1\)'),
    'a judge of other classes': (judged('three'), r'reward.kind: .*knows the labels 0..2, but .* are 0..5'),
    'gold of other classes': (dict(reward__gold='{root}/three'), 'reward.gold: .*knows the labels 0..2'),
    'captions without what the judge needs': (judged('judge') | dict(data__path='{root}/unlabelled.jsonl'),
                                              "needs the 'label' of each caption, .*only .'caption',"),
    'a run that is no reward': (dict(reward__kind='model', reward__model='{root}/generator'),
                                "reward.kind: .*holds a run of experiment='generator'"),
    'a rule that captions have not': (dict(reward__kind='task'), "reward.kind='task': captions have no rule"),
    'no reward': (dict(reward__function=''), 'reward.function is empty'),
    'no such function': (dict(reward__function='align_rewards:none'), 'cannot import align_rewards:none'),
    'a store without captions': (dict(data__path='{root}/bare'), 'bare.*captions'),
    'no captions': (dict(data__path=''), 'data.path is empty'),
    'no such captions': (dict(data__path='{root}/none.txt'), 'data.path=.*none.txt: no such file'),
    'an empty file': (dict(data__path='{root}/empty.txt'), 'no caption in it'),
    'a damaged line': (dict(data__path='{root}/damaged.jsonl'), 'line 2 is not'),
    'an empty caption': (dict(data__path='{root}/blank.jsonl'), 'line 1 has an empty caption'),
    'a critic': (dict(algorithm__name='ppo', likelihood__kind='exact'), "algorithm.name='ppo': it needs a critic"),
    'a critic beside a bound': (dict(algorithm__name='ppo'), "algorithm.name='ppo': it needs a critic"),
    'ratios of a bound': (dict(algorithm__name='grpo'), "algorithm.name='grpo': .*set likelihood.kind=exact"),
    'stale ratios with low confidence': (
        dict(algorithm__name='rloo', sampler__remasking='low_confidence', rollout__max_staleness=1),
        "algorithm.name='rloo': .*order that depends on the policy.*stale"),
    'exact with low confidence': (dict(likelihood__kind='exact', sampler__remasking='low_confidence'),
                                  "sampler.remasking='low_confidence' fills the positions in an order"),
    'ratios of whole codes from some steps': (
        dict(algorithm__name='proximal_rloo', likelihood__kind='exact', likelihood__num=2),
        "algorithm.name='proximal_rloo': .*ratio of whole codes, which likelihood.num=2 of the 4 steps"),
    'corrections of whole codes from some steps': (
        dict(algorithm__name='rloo', algorithm__correction='truncate', likelihood__kind='exact', likelihood__num=2),
        "algorithm.name='rloo': .*likelihood.num=0"),
    'no chance': (dict(sampler__temperature=0.0), 'sampler.temperature=0.0 must be positive'),
    'more steps than there are': (dict(likelihood__kind='exact', likelihood__num=5), 'likelihood.num=5 must be in 0'),
    'no sets': (dict(likelihood__num=0), r'likelihood.num=0 must be in 1..8'),
    'another likelihood': (dict(likelihood__kind='exakt'), "likelihood.kind='exakt' .*did you mean 'exact'"),
    'weights taken up on the way': (dict(rollout__chunk=4, rollout__max_staleness=1), 'rollout.chunk=4: codes'),
    'an end that codes have not': (dict(reward__missing_eos='-1'), "reward.missing_eos='-1'"),
    'captions beyond the context': (dict(caption_length=8), 'model.max_length=16'),
    'both sorts of weights': (dict(weights='{root}/generator', pretrained='{root}/six'), 'starts from one of them'),
    'weights that are none': (dict(weights='{root}/generator'), "weights=.*experiment='generator'"),
    'eval without captions': (dict(eval_every=2, data__heldout=''), 'data.heldout is empty'),
}


@pytest.mark.parametrize('case', BAD)
def test_one_line_before_anything_is_compiled(case, root, tmp_path, monkeypatch):
    fields, message = BAD[case]
    filled = {name: x.format(root=root) if isinstance(x, str) else x for name, x in fields.items()}
    def refuse(*unused, **also):
        raise AssertionError('computed something before the error')
    monkeypatch.setattr(jax, 'jit', lambda *unused, **also: refuse)  # a program may be made, and not be run
    config = config_of(root, **filled)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        experiment = train.build(config, devices(1))
        experiment.check()
        experiment.open_rollouts(tmp_path)
        experiment.hooks(None)
    assert '\n' not in str(raised.value)


def test_what_can_work_is_let_through(root, tmp_path):
    for fields in ({}, dict(data__path=str(root / 'store')), dict(data__path=str(root / 'long.txt')),
                   dict(algorithm__name='proximal_rloo', likelihood__kind='exact', likelihood__num=0),
                   dict(algorithm__name='online_dpo', sampler__remasking='low_confidence', rollout__max_staleness=2)):
        train.build(config_of(root, **fields), devices(1)).check()
    assert set(algorithms.ALGORITHMS) > {'online_dpo', 'rloo'}
