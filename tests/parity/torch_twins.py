"""What the PyTorch twins share: random tensors, and outputs and gradients side by side."""
import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')


FAINT = 0.02


def randomise(model, seed=0, std=0.2, faint=()):
    """Every parameter Normal, scales of norms about 1, so that each of them shows.

    Parameters whose names hold one of `faint` are FAINT times that: those that write to a residual stream, whose
    variance is then near the norms' epsilon, without which another epsilon would pass for the right one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and name.endswith(('weight', 'gamma', 'lambda1'))
            if parameter.requires_grad:  # a fixed position embedding stays
                parameter.normal_(float(scale), std, generator=generator)
                if any(part in name for part in faint):
                    parameter *= FAINT
    return model.eval()


def state_dict(model):
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def load(model, tensors):
    """`model`, strictly loaded with numpy arrays."""
    model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
    return model.eval()


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for i, (got, want) in enumerate(zip(ours, theirs)):
        want = want.detach().numpy()
        assert 0.1 < want.std() < 100, f'output {i}: the twin says nothing'
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=f'output {i}')


def assert_outputs_and_gradients_equal(apply, params, to_torch, model, theirs, *, unused=(), invariant=(),
                                       file_names=dict):
    """The outputs of both, and the gradients of one weighted sum of them.

    Args:
        apply: params -> tuple of outputs.
        to_torch: parameter tree -> {name: array}. It is linear, so it maps gradients as it maps parameters.
        theirs: outputs of `model`, in the layout of ours.
        unused: names of parameters that nothing reads.
        invariant: how names end whose gradient is zero, as a softmax takes no notice of an offset in all its logits.
        file_names: {name in memory: array} -> {name in files: array}.
    """
    rng = np.random.default_rng(7)
    weights = [rng.normal(size=x.shape).astype(np.float32) for x in theirs]

    def ours(params):
        outputs = apply(params)
        return sum((w * x).sum() for w, x in zip(weights, outputs)), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    assert_equal(outputs, theirs)

    named = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in unused}
    loss = sum((torch.from_numpy(w) * x).sum() for w, x in zip(weights, theirs))
    wanted = torch.autograd.grad(loss, list(named.values()))
    wanted = file_names({name: x.numpy() for name, x in zip(named, wanted)})
    assert_gradients_equal(to_torch(gradients), wanted, invariant=invariant)


def assert_gradients_equal(got, wanted, *, invariant=()):
    """{name: array} both; `invariant` as above. `got` may hold more."""
    for name, want in wanted.items():
        largest = np.abs(want).max()
        if name.endswith(tuple(invariant)):
            assert max(largest, np.abs(got[name]).max()) < 1e-4, name
            continue
        assert largest > 1e-2, f'{name}: no gradient to compare'
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-4 * largest, err_msg=name)
