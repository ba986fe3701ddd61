"""The Lewis game's agents, losses and AdamW against PyTorch, on the same batches and the same sampled messages."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.tasks import lewis

torch = pytest.importorskip('torch')
GAME, STEPS = lewis.Game(), 5
RATE, DECAY = 1e-3, 0.01


class Agents(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        p, t = GAME.properties, GAME.types
        self.hidden, self.symbols = torch.nn.Linear(p * t, 200), torch.nn.Linear(200, p * p * t)
        self.value = torch.nn.Linear(200, 1)
        self.listener_hidden = torch.nn.Linear(p * t, 200, bias=False)
        self.types = torch.nn.Linear(200, t, bias=False)
        with torch.no_grad():
            for layer, ours in self.pairs(params):
                layer.weight.copy_(torch.tensor(np.array(ours['kernel']).T))
                if layer.bias is not None:
                    layer.bias.copy_(torch.tensor(np.array(ours['bias'])))

    def pairs(self, params):
        s, l = params['speaker'], params['listener']
        return ((self.hidden, s['hidden']), (self.symbols, s['symbols']), (self.value, s['value']),
                (self.listener_hidden, l['hidden']), (self.types, l['types']))

    def forward(self, objects, messages):
        one_hot = torch.nn.functional.one_hot
        h = self.hidden(one_hot(objects, GAME.types).flatten(1).float())
        logits = self.symbols(h).view(len(objects), GAME.properties, -1)
        heard = self.types(self.listener_hidden(one_hot(messages, GAME.num_symbols).float()))
        return logits, self.value(h)[:, 0], heard


def batches():
    rng = np.random.RandomState(0)
    objects = GAME.objects()
    return [objects[rng.randint(len(objects), size=8)] for _ in range(STEPS)]


def compare(agents, params):
    for layer, ours in agents.pairs(params):
        np.testing.assert_allclose(layer.weight.detach().numpy().T, ours['kernel'], atol=1e-5)
        if layer.bias is not None:
            np.testing.assert_allclose(layer.bias.detach().numpy(), ours['bias'], atol=1e-5)


@pytest.mark.parametrize('phase', ['supervised', 'a2c'])
def test_steps_agree(phase):
    params = lewis.init(jax.random.key(0), GAME)
    agents = Agents(params)
    theirs = torch.optim.AdamW(agents.parameters(), lr=RATE, weight_decay=DECAY)
    tx = optax.adamw(RATE, weight_decay=DECAY)

    def loss_of(params, objects, key):
        if phase == 'supervised':
            return sum(lewis.supervised_losses(params, GAME, objects))
        return lewis.self_play_loss(params, GAME, objects, key)[0]

    @jax.jit
    def step(params, state, objects, key):
        messages = jax.random.categorical(key, lewis.speak(params['speaker'], GAME, objects)[0])
        loss, grads = jax.value_and_grad(loss_of)(params, objects, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, messages

    state, cross_entropy = tx.init(params), torch.nn.functional.cross_entropy
    for n, batch in enumerate(batches()):
        params, state, ours, sampled = step(params, state, jnp.asarray(batch), jax.random.key(n))
        objects = torch.tensor(batch).long()
        given = torch.tensor(np.array(GAME.messages(batch))).long()
        messages = given if phase == 'supervised' else torch.tensor(np.array(sampled)).long()
        logits, value, heard = agents(objects, messages)
        if phase == 'supervised':
            flat = lambda x: x.flatten(0, 1)
            loss = cross_entropy(flat(logits), given.flatten()) + cross_entropy(flat(heard), objects.flatten())
            loss = loss + 0 * value.sum()  # PyTorch does not decay what has no gradient; ours decays by it alone
        else:
            policy = torch.distributions.Categorical(logits=logits)
            reward = torch.distributions.Categorical(logits=heard).log_prob(objects).sum(-1)
            advantage = reward.detach() - value
            loss = (-(advantage.detach() * policy.log_prob(messages).sum(-1)).mean() - reward.mean()
                    + .5 * (advantage ** 2).mean() - .001 * policy.entropy().sum(-1).mean())
        np.testing.assert_allclose(ours, loss.item(), rtol=2e-5)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    compare(agents, params)
