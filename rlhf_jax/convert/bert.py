"""`transformers.{Bert,DistilBert}ForSequenceClassification` <-> `models.bert.Classifier`.

    module, params = from_torch(state_dict, config=json.load(open('config.json')))

`config['model_type']` is 'bert' or 'distilbert'. As for the language models, the mapping is total.
"""
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhf_jax.convert import settings
from rlhf_jax.convert.settings import Setting
from rlhf_jax.models.bert import Classifier
from rlhf_jax.weights import rules
from rlhf_jax.weights.rules import Fixed, Rule, dense, linear, norm
from rlhf_jax.weights.state_dict import shape_of

KINDS = ('bert', 'distilbert')

_ENDS = (*dense('classifier', 'classifier', linear()),)
_RULES = {
    'bert': (
        Rule('bert.embeddings.word_embeddings.weight', 'embed'),
        Rule('bert.embeddings.position_embeddings.weight', 'pos_embed'),
        Rule('bert.embeddings.token_type_embeddings.weight', 'segment_embed'),
        *norm('bert.embeddings.LayerNorm', 'norm'),
        *dense('bert.encoder.layer.{i}.attention.self.query', 'blocks/q', linear()),
        *dense('bert.encoder.layer.{i}.attention.self.key', 'blocks/k', linear()),
        *dense('bert.encoder.layer.{i}.attention.self.value', 'blocks/v', linear()),
        *dense('bert.encoder.layer.{i}.attention.output.dense', 'blocks/o', linear(2)),
        *norm('bert.encoder.layer.{i}.attention.output.LayerNorm', 'blocks/attn_norm'),
        *dense('bert.encoder.layer.{i}.intermediate.dense', 'blocks/mlp/up', linear()),
        *dense('bert.encoder.layer.{i}.output.dense', 'blocks/mlp/down', linear()),
        *norm('bert.encoder.layer.{i}.output.LayerNorm', 'blocks/mlp_norm'),
        *dense('bert.pooler.dense', 'pooler', linear()), *_ENDS,
        Fixed('bert.embeddings.position_ids'),  # a buffer of old checkpoints
    ),
    'distilbert': (
        Rule('distilbert.embeddings.word_embeddings.weight', 'embed'),
        Rule('distilbert.embeddings.position_embeddings.weight', 'pos_embed'),
        *norm('distilbert.embeddings.LayerNorm', 'norm'),
        *dense('distilbert.transformer.layer.{i}.attention.q_lin', 'blocks/q', linear()),
        *dense('distilbert.transformer.layer.{i}.attention.k_lin', 'blocks/k', linear()),
        *dense('distilbert.transformer.layer.{i}.attention.v_lin', 'blocks/v', linear()),
        *dense('distilbert.transformer.layer.{i}.attention.out_lin', 'blocks/o', linear(2)),
        *norm('distilbert.transformer.layer.{i}.sa_layer_norm', 'blocks/attn_norm'),
        *dense('distilbert.transformer.layer.{i}.ffn.lin1', 'blocks/mlp/up', linear()),
        *dense('distilbert.transformer.layer.{i}.ffn.lin2', 'blocks/mlp/down', linear()),
        *norm('distilbert.transformer.layer.{i}.output_layer_norm', 'blocks/mlp_norm'),
        *dense('pre_classifier', 'pooler', linear()), *_ENDS,
        Fixed('distilbert.embeddings.position_ids'),
    ),
}
_SETTINGS = {
    'bert': (
        Setting('vocab_size', 'vocab_size'), Setting('width', 'hidden_size'), Setting('depth', 'num_hidden_layers'),
        Setting('num_heads', 'num_attention_heads'), Setting('hidden', 'intermediate_size'),
        Setting('max_length', 'max_position_embeddings', 512), Setting('num_segments', 'type_vocab_size', 2),
        Setting('activation', 'hidden_act', 'gelu', 'activation'), Setting('eps', 'layer_norm_eps', 1e-12, 'real')),
    'distilbert': (
        Setting('vocab_size', 'vocab_size'), Setting('width', 'dim'), Setting('depth', 'n_layers'),
        Setting('num_heads', 'n_heads'), Setting('hidden', 'hidden_dim'),
        Setting('max_length', 'max_position_embeddings', 512),
        Setting('activation', 'activation', 'gelu', 'activation')),
}
_FIXED: dict[str, dict[str, Any]] = {'bert': {'num_segments': 2, 'pooled': 'tanh'},
                                     'distilbert': {'num_segments': 0, 'pooled': 'relu'}}


def from_torch(state_dict: Mapping[str, Any], *, config: Mapping[str, Any],
               shardings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
               **fields: Any) -> tuple[Classifier, dict[str, Any]]:
    """The classifier that `state_dict` belongs to and its parameters, float32.

    Args:
        config: the model's `config.json`.
        shardings: the parameters' shapes -> their shardings, as of `convert.from_torch`: each process reads the parts
            of its own devices. None: numpy arrays.
        **fields: fields of the module beside those that `config` gives.

    Raises:
        ValueError: another kind of model, a setting that the module does not have, or a tensor that does not fit.
    """
    kind = config.get('model_type')
    if kind not in KINDS:
        raise ValueError(f'convert: model_type={kind!r:.60} is not one of {KINDS}')
    for name, only in (('position_embedding_type', 'absolute'), ('is_decoder', False), ('add_cross_attention', False)):
        if config.get(name) not in (only, None):
            raise ValueError(f'convert: config has {name}={config[name]!r:.60}, but only {only!r} is supported')
    if 'classifier.weight' not in state_dict:
        raise ValueError('convert: there is no tensor classifier.weight; give the folder of a sequence classifier')
    num_labels = shape_of(state_dict, 'classifier.weight', 2)[0]
    found: dict[str, Any] = _FIXED[kind] | settings.fields_of(config, _SETTINGS[kind])
    if found['width'] % found['num_heads']:
        raise ValueError(f'convert: config has a width of {found["width"]}, which {found["num_heads"]} heads do not '
                         'divide')
    module = Classifier(num_labels=num_labels, **found | fields)
    return module, rules.to_flax(state_dict, _RULES[kind], _shapes_of(module), shardings=shardings)


def to_torch(kind: str, module: Classifier, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of `module` with `params` under the names of `transformers`, float32."""
    return rules.to_torch(params, _RULES[kind])


def config_of(kind: str, module: Classifier) -> dict[str, Any]:
    """The `config.json` with which transformers builds the same model."""
    family = {'bert': 'Bert', 'distilbert': 'DistilBert'}[kind]
    return {'model_type': kind, 'architectures': [f'{family}ForSequenceClassification'],
            **settings.config_of(module, _SETTINGS[kind]),
            'id2label': {str(i): f'LABEL_{i}' for i in range(module.num_labels)},
            'label2id': {f'LABEL_{i}': i for i in range(module.num_labels)}}


def _shapes_of(module: Classifier) -> dict[str, Any]:
    return rules.param_shapes(module, np.zeros((1, 1), np.int32))
