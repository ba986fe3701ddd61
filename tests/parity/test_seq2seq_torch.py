"""The translation game's agent against one written in PyTorch after its description."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.seq2seq import BOS, EOS, PAD, Seq2Seq
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten

torch = pytest.importorskip('torch')

V, D = 11, 6
AGENT = Seq2Seq(source_vocab=9, target_vocab=V, width=D)
RNG = np.random.default_rng(0)
SOURCE, LENGTHS = RNG.integers(4, 9, (3, 5)), np.array([5, 3, 4])
MASK = np.arange(5) < LENGTHS[:, None]
TARGET = np.concatenate([np.full((3, 1), BOS), RNG.integers(4, V, (3, 4))], 1)


@pytest.fixture(scope='module')
def params():
    shapes = flatten(param_shapes(AGENT, SOURCE, MASK, TARGET))
    return jax.tree.map(jnp.asarray, unflatten({k: RNG.normal(0, 0.5, x.shape).astype(np.float32)
                                                for k, x in shapes.items()}))


class Original(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        flat = {name: np.asarray(x) for name, x in flatten(params).items()}
        t = lambda name, transpose=False: torch.tensor(flat[name].T if transpose else flat[name])
        self.source_embed, self.target_embed = t('source_embed'), t('target_embed')
        self.encoder = torch.nn.GRU(D, D, batch_first=True)
        self.decoder = torch.nn.GRUCell(2 * D, D)
        self.load_state_dict({
            **{f'encoder.{kind}_l0': t(f'encoder_{ours}', True) for kind, ours in
               (('weight_ih', 'w_x'), ('weight_hh', 'w_h'), ('bias_ih', 'b_x'), ('bias_hh', 'b_h'))},
            **{f'decoder.{kind}': t(f'decoder_{ours}', True) for kind, ours in
               (('weight_ih', 'w_x'), ('weight_hh', 'w_h'), ('bias_ih', 'b_x'), ('bias_hh', 'b_h'))}})
        self.k, self.q = t('attention_key'), t('attention_out')
        self.dense = {name: (t(f'{name}/kernel'), t(f'{name}/bias')) for name in ('head', 'value_hidden', 'value_out')}

    def apply(self, name, x):
        return x @ self.dense[name][0] + self.dense[name][1]

    def start(self):
        encoded, _ = self.encoder(self.source_embed[SOURCE])
        sums = encoded.cumsum(1)
        h = torch.stack([sums[b, n - 1] / n for b, n in enumerate(LENGTHS)])
        return encoded, h, torch.zeros(3, D)

    def step(self, x, h, fed, encoded):
        value = self.apply('value_out', torch.relu(self.apply('value_hidden', torch.cat([x, fed], -1).detach())))[:, 0]
        h = self.decoder(torch.cat([x, fed], -1), h)
        scores = (encoded @ (h @ self.k)[..., None])[..., 0].masked_fill(torch.tensor(~MASK), -1e9)
        context = (scores.softmax(-1)[..., None] * encoded).sum(1)
        fed = torch.tanh(torch.cat([context, h], -1) @ self.q)
        return h, fed, self.apply('head', fed), value


def test_teacher_forced(params):
    original = Original(params)
    encoded, h, fed = original.start()
    logits, values = jax.jit(AGENT.apply)({'params': params}, SOURCE, MASK, TARGET)
    assert logits.shape == (3, 4, V)
    for t in range(4):
        h, fed, want, value = original.step(original.target_embed[TARGET[:, t]], h, fed, encoded)
        np.testing.assert_allclose(logits[:, t], want.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values[:, t], value.detach(), rtol=1e-5, atol=1e-5)


def test_greedy_message(params):
    original = Original(params)
    encoded, h, fed = original.start()
    token, done = torch.full((3,), BOS), torch.zeros(3, dtype=torch.bool)
    message = jax.jit(lambda p: AGENT.apply({'params': p}, SOURCE, MASK, max_length=6, method='send'))(params)
    for t in range(6):
        h, fed, logits, _ = original.step(original.target_embed[token], h, fed, encoded)
        if t < 3:
            logits[:, EOS] = -torch.inf
        token = torch.where(done, PAD, logits.argmax(-1))
        np.testing.assert_array_equal(message.tokens[:, t], token)
        logp = torch.where(done, 0.0, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
        np.testing.assert_allclose(message.logprobs[:, t], logp.detach(), atol=1e-5)
        done |= token == EOS
    np.testing.assert_array_equal(message.tokens[:, 6], torch.where(done, PAD, EOS))
