"""BERT and DistilBERT classifiers against `transformers`, tiny with random weights and by name at full size."""
import json
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments.rlhf.data import tasks
from experiments.rlhf.models import classifier
from experiments.rlhf.policy import reward_model, rewards
from experiments.rlhf.policy.completions import Completions
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from hf_twins import torch, transformers
from rlhf_jax.convert import bert as convert
from rlhf_jax.models import bert
from rlhf_jax.weights import files, rules

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'the', 'film', 'was', 'good', 'bad', '##ly', 'made', ',', '.', 'very']
CONFIGS = {
    'bert': lambda **fields: transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=12, layer_norm_eps=1e-2, **fields),
    'distilbert': lambda **fields: transformers.DistilBertConfig(
        vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=12, **fields)}
NAMES = {'bert': 'Bert', 'distilbert': 'DistilBert'}


def twin(kind, num_labels=2):
    config = CONFIGS[kind](num_labels=num_labels)
    config._attn_implementation = 'eager'
    model = getattr(transformers, f'{NAMES[kind]}ForSequenceClassification')(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(float(key.endswith('weight') and parameter.ndim == 1), 0.3, generator=generator)
    return model


def saved(folder, kind, num_labels=2, names=('NEGATIVE', 'POSITIVE')):
    """A folder as transformers writes it, and its model."""
    import tokenizers
    model = twin(kind, num_labels)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.enable_truncation(3)  # what a file says of lengths is not followed
    tokenizer.save(str(folder / 'tokenizer.json'))
    return model


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def completions(prompts, texts):
    return Completions(texts, [{'prompt': prompt} for prompt in prompts], np.zeros((len(texts), 1), np.int32),
                       np.ones((len(texts), 1), bool), np.ones(len(texts), bool))


@pytest.mark.parametrize('kind', CONFIGS)
def test_logits_are_those_of_transformers_whatever_is_padding(kind):
    model = twin(kind, num_labels=3)
    config = json.loads(model.config.to_json_string())
    module, params = convert.from_torch(model.state_dict(), config=config)
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, len(WORDS), (3, 9)), np.arange(9) < np.array([[9], [5], [1]])
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    found = jax.jit(lambda t, m: module.apply({'params': params}, t, m))(tokens.astype(np.int32), mask)
    assert found.dtype == np.float32 and np.ptp(expected) > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)
    other = np.where(mask, tokens, 1).astype(np.int32)
    np.testing.assert_allclose(module.apply({'params': params}, other, mask), expected, atol=1e-4)
    back = convert.to_torch(kind, module, params)
    assert set(back) == set(model.state_dict()) - {f'{kind}.embeddings.position_ids'}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, model.state_dict()[name].numpy(), err_msg=name)
    again, _ = convert.from_torch(back, config=convert.config_of(kind, module))
    assert again.clone(eps=module.eps) == module


@pytest.mark.parametrize('name, kind, num_parameters', [
    ('bert-base', 'bert', 109_483_778), ('bert-large', 'bert', 335_143_938),
    ('distilbert-base', 'distilbert', 66_955_010)])
def test_published_sizes(name, kind, num_parameters):
    """Names and shapes are those that transformers builds of its default settings, and have a rule of sharding."""
    module = bert.Classifier(vocab_size=30522, num_labels=2, **bert.SIZES[name])
    shapes = rules.param_shapes(module, np.zeros((1, 1), np.int32))
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == num_parameters
    config = {'bert': transformers.BertConfig, 'distilbert': transformers.DistilBertConfig}[kind]()
    if name == 'bert-large':
        config.update(dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096))
    with torch.device('meta'):
        model = getattr(transformers, f'{NAMES[kind]}ForSequenceClassification')(config)
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.endswith('position_ids')}
    assert rules.tensor_shapes(shapes, convert._RULES[kind]) == theirs
    mesh = mesh_lib.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    partition.param_shardings(shapes, bert.PARTITION_RULES, mesh)


@pytest.mark.parametrize('kind', CONFIGS)
def test_reward_is_the_probability_of_the_label(kind, tmp_path, monkeypatch):
    """As transformers' pipeline computes it: special tokens around, the beginning cut off, softmax. A batch is as long
    as its longest text needs."""
    monkeypatch.setattr(classifier, 'BUCKET', 4)
    model = saved(tmp_path, kind)
    prompts = ['the film was', 'the film was very very very very very very very', '']
    texts = [' good, badly made.', ' good', ' the [SEP] bad']
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'), pad_token='[PAD]',
                                                     truncation_side='left', model_max_length=12)
    expected = []
    for prompt, text in zip(prompts, texts):
        ids = tokenizer(prompt + text, truncation=True, max_length=12, split_special_tokens=True, return_tensors='pt')
        with torch.no_grad():
            expected.append(model(input_ids=ids['input_ids'], attention_mask=ids['attention_mask']).logits)
    expected = torch.cat(expected)
    reward = classifier.TextClassifier(str(tmp_path), one_device(), label='POSITIVE', batch_size=1)
    run, shapes = reward._run, []
    reward._run = lambda params, tokens, mask: shapes.append(tokens.shape) or run(params, tokens, mask)
    np.testing.assert_allclose(reward(completions(prompts, texts)), expected.softmax(-1)[:, 1], atol=1e-5)
    assert shapes == [(1, 8), (1, 12), (1, 12)]
    spread = classifier.TextClassifier(str(tmp_path), mesh_lib.make_mesh({'data': 2}, jax.devices()[:2]),
                                       label='NEGATIVE', batch_size=2)
    np.testing.assert_allclose(spread(completions(prompts, texts)), expected.softmax(-1)[:, 0], atol=1e-5)
    # A prompt that was cut for the policy is read whole.
    rows = completions(['was'] * 3, texts)
    for row, prompt in zip(rows.rows, prompts):
        row['whole_prompt'] = prompt
    np.testing.assert_allclose(reward(rows), expected.softmax(-1)[:, 1], atol=1e-5)


def test_a_process_reads_its_own_part(tmp_path, monkeypatch):
    """Of eight with a device each: at no time is more in memory than its part of the weights and a few tensors."""
    saved(tmp_path, 'bert')
    module = bert.Classifier(vocab_size=len(WORDS), width=256, depth=8, num_heads=4, hidden=1024, max_length=12,
                             num_labels=2)
    shapes, rng = rules.param_shapes(module, np.zeros((1, 1), np.int32)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    tensors = convert.to_torch('bert', module, params)
    files.save(tmp_path, tensors, convert.config_of('bert', module))
    device, mesh = jax.devices()[3], mesh_lib.make_mesh({'fsdp': 8})
    monkeypatch.setattr(NamedSharding, 'addressable_devices_indices_map',
                        lambda self, shape: {device: self.devices_indices_map(shape)[device]})
    monkeypatch.setattr(jax, 'make_array_from_callback', lambda shape, sharding, part: part(
        sharding.devices_indices_map(shape)[device]))
    tracemalloc.start()
    reward = classifier.TextClassifier(str(tmp_path), mesh, label='LABEL_1')
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    part = reward._params['blocks']['q']['kernel']
    np.testing.assert_array_equal(part, params['blocks']['q']['kernel'][:, 96:128])
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert nbytes(reward._params) < most < nbytes(params) / 4


def test_labels_that_a_text_may_have_together_are_rewarded_each_by_itself(tmp_path):
    model = saved(tmp_path, 'bert', num_labels=3, names=('toxic', 'insult', 'threat'))
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'problem_type': 'multi_label_classification'}))
    with torch.no_grad():
        expected = model(torch.tensor([[2, 4, 5, 3]])).logits[0].sigmoid()
    for i, name in enumerate(('toxic', 'insult', 'threat')):
        reward = classifier.TextClassifier(str(tmp_path), one_device(), label=name)
        np.testing.assert_allclose(reward(completions(['the '], ['film'])), [expected[i]], atol=1e-5)


def test_one_output_is_the_reward_itself(tmp_path):
    model = saved(tmp_path, 'distilbert', num_labels=1, names=('LABEL_0',))
    reward = classifier.TextClassifier(str(tmp_path), one_device())
    with torch.no_grad():
        expected = model(torch.tensor([[2, 4, 5, 3]])).logits[0, 0]
    np.testing.assert_allclose(reward(completions(['the '], ['film'])), [expected], atol=1e-5)


def test_a_config_names_it_and_one_copy_is_used(tmp_path):
    from configs.rlhf import imdb
    saved(tmp_path, 'distilbert')
    config = imdb.get_config('ppo')
    with config.unlocked():
        config.reward.model, config.tokenizer = str(tmp_path), 'bytes'
    scorer = rewards.Scorer.of(config, tasks.Task(), one_device())
    scored = scorer(completions(['the film was '] * 2, ['good', 'bad']))
    assert scored['rewards'].shape == (2,) and 0 < scored['rewards'].min() < scored['rewards'].max() < 1
    held = reward_model.shared(str(tmp_path), one_device(), classifier.TextClassifier, label='POSITIVE', batch_size=64)
    assert rewards.Scorer.of(config, tasks.Task(), one_device())._reward is held


def test_a_process_without_completions_runs_the_program_of_all(tmp_path, monkeypatch):
    from configs.rlhf import base
    saved(tmp_path, 'distilbert')
    reward = classifier.TextClassifier(str(tmp_path), one_device(), label='POSITIVE')
    called = []
    monkeypatch.setattr(reward, 'logits', lambda texts: called.append(len(texts)) or np.zeros((0, 2), np.float32))
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    scored = rewards.Scorer(base.policy().reward, reward)(completions([], []))
    assert called == [0] and scored['rewards'].shape == (0,)


def test_what_does_not_fit_is_named(tmp_path):
    model = saved(tmp_path / 'a', 'distilbert')
    open_it = lambda label, at='a': classifier.TextClassifier(str(tmp_path / at), one_device(), label=label)
    with pytest.raises(ValueError, match=r"reward.label='': the labels of .* are \('NEGATIVE', 'POSITIVE'\); choose"):
        open_it('')
    with pytest.raises(ValueError, match="reward.label='positive': .*; did you mean 'POSITIVE'"):
        open_it('positive')
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for change, message in ((dict(model_type='roberta'), "model_type='roberta' is not one of"),
                            (dict(n_heads=5), 'a width of 32, which 5 heads do not divide'),
                            (dict(activation='swish'), "activation='swish', not one of"),
                            (dict(n_layers=3), 'missing tensor distilbert.transformer.layer.2'),
                            (dict(position_embedding_type='relative_key'), "only 'absolute' is supported")):
        with pytest.raises(ValueError, match=message):
            convert.from_torch(state, config=config | change)
    with pytest.raises(ValueError, match='no tensor classifier.weight; give the folder of a sequence classifier'):
        convert.from_torch({name: x for name, x in state.items() if 'classifier' not in name}, config=config)
    with pytest.raises(ValueError, match='stranger'):
        convert.from_torch(state | {'stranger': np.zeros(1, np.float32)}, config=config)
    (tmp_path / 'b').mkdir()
    files.save(tmp_path / 'b', state, config)
    with pytest.raises(FileNotFoundError, match='has no tokenizer.json; save the tokenizer of the classifier'):
        open_it('POSITIVE', 'b')
    section = dict(kind='task', model=str(tmp_path / 'a'), gold='', label='POSITIVE')
    with pytest.raises(ValueError, match="reward.label='POSITIVE': neither reward.model nor reward.gold is a BERT"):
        rewards.check_label(section)
    rewards.check_label(section | dict(kind='model'))
