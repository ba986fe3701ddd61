"""The FID Inception against a PyTorch twin, weights and batch-norm statistics random: outputs, gradients, both ways."""
import numpy as np
import pytest

from dlc_jax import convert
from torch_twins import assert_outputs_and_gradients_equal, load, torch

F = torch.nn.functional

SIZE = 107  # the smallest image whose last blocks are 2x2, so that what pooling does at a border shows


class Unit(torch.nn.Module):
    def __init__(self, inputs, width, kernel, **kw):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, width, kernel, bias=False, **kw)
        self.bn = torch.nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(torch.nn.Module):
    """`chains`: {prefix: [(suffix, width, kernel, kwargs), ...]}; `run` says how their outputs meet."""

    def __init__(self, inputs, chains):
        super().__init__()
        for prefix, layers in chains.items():
            before = inputs
            for suffix, width, kernel, kw in layers:
                setattr(self, prefix + suffix, Unit(before, width, kernel, **kw))
                before = width if not suffix.endswith('a') else before  # 2a and 2b read the same input


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


ROW, COLUMN = ((1, 7), dict(padding=(0, 3))), ((7, 1), dict(padding=(3, 0)))
SAME3, STRIDE2 = (3, dict(padding=1)), (3, dict(stride=2))
POINT = (1, {})


class A(Block):
    def __init__(self, inputs, pool):
        super().__init__(inputs, {
            'branch1x1': [('', 64, *POINT)], 'branch5x5': [('_1', 48, *POINT), ('_2', 64, 5, dict(padding=2))],
            'branch3x3dbl': [('_1', 64, *POINT), ('_2', 96, *SAME3), ('_3', 96, *SAME3)],
            'branch_pool': [('', pool, *POINT)]})

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(average(x))], 1)


class B(Block):
    def __init__(self, inputs):
        super().__init__(inputs, {
            'branch3x3': [('', 384, *STRIDE2)],
            'branch3x3dbl': [('_1', 64, *POINT), ('_2', 96, *SAME3), ('_3', 96, *STRIDE2)]})

    def forward(self, x):
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, 2)], 1)


class C(Block):
    def __init__(self, inputs, c):
        super().__init__(inputs, {
            'branch1x1': [('', 192, *POINT)], 'branch7x7': [('_1', c, *POINT), ('_2', c, *ROW), ('_3', 192, *COLUMN)],
            'branch7x7dbl': [('_1', c, *POINT), ('_2', c, *COLUMN), ('_3', c, *ROW), ('_4', c, *COLUMN),
                             ('_5', 192, *ROW)],
            'branch_pool': [('', 192, *POINT)]})

    def forward(self, x):
        single, double = x, x
        for i in range(1, 4):
            single = getattr(self, f'branch7x7_{i}')(single)
        for i in range(1, 6):
            double = getattr(self, f'branch7x7dbl_{i}')(double)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class D(Block):
    def __init__(self, inputs):
        super().__init__(inputs, {
            'branch3x3': [('_1', 192, *POINT), ('_2', 320, *STRIDE2)],
            'branch7x7x3': [('_1', 192, *POINT), ('_2', 192, *ROW), ('_3', 192, *COLUMN), ('_4', 192, *STRIDE2)]})

    def forward(self, x):
        y = self.branch7x7x3_2(self.branch7x7x3_1(x))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(self.branch7x7x3_3(y)),
                          F.max_pool2d(x, 3, 2)], 1)


class E(Block):
    def __init__(self, inputs, pool):
        row, column = ((1, 3), dict(padding=(0, 1))), ((3, 1), dict(padding=(1, 0)))
        super().__init__(inputs, {
            'branch1x1': [('', 320, *POINT)],
            'branch3x3': [('_1', 384, *POINT), ('_2a', 384, *row), ('_2b', 384, *column)],
            'branch3x3dbl': [('_1', 448, *POINT), ('_2', 384, *SAME3), ('_3a', 384, *row), ('_3b', 384, *column)],
            'branch_pool': [('', 192, *POINT)]})
        self.pool = pool

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y), self.branch3x3dbl_3a(z),
                          self.branch3x3dbl_3b(z), self.branch_pool(self.pool(x))], 1)


class Twin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768, 128), C(768, 160), C(768, 160), C(768, 192)
        self.Mixed_7a = D(768)
        self.Mixed_7b, self.Mixed_7c = E(1280, average), E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = torch.nn.Linear(2048, 1008)

    def forward(self, images):
        """uint8 [B, 3, H, W] -> pool, spatial (NHWC, flat), logits, logits without bias."""
        rows, columns = (torch.from_numpy(tf1_matrix(n, SIZE)) for n in images.shape[2:])
        x = (rows @ images.double() @ columns.T).float()
        x = (x - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        before = x  # the input of the block at hand
        for name, block in self.named_children():
            if name.startswith('Mixed'):
                x = block(x)
            if name == 'Mixed_6d':
                spatial = block.branch1x1(before)[:, :7].permute(0, 2, 3, 1).flatten(1)
            before = x
        x = x.mean((2, 3))
        return x, spatial, self.fc(x), x @ self.fc.weight.T


def tf1_matrix(inputs, outputs):
    """Rows of weights: output i reads input i * inputs / outputs, between its two neighbours."""
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        position = float(np.float32(i) * np.float32(inputs / outputs))  # counted in float32
        low = int(position)
        matrix[i, low] += 1 - (position - low)
        matrix[i, min(low + 1, inputs - 1)] += position - low
    return matrix


def randomise(model, seed=0):
    """Every tensor random, batch-norm statistics too, with activations of about unit size throughout."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(x, low, high):
        x.copy_(torch.rand(x.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for unit in model.modules():
            if isinstance(unit, torch.nn.Conv2d):
                unit.weight.copy_(torch.randn(unit.weight.shape, generator=generator) * unit.weight[0].numel() ** -0.5)
            if isinstance(unit, torch.nn.BatchNorm2d):
                uniform(unit.weight, 0.7, 1.5)
                uniform(unit.bias, -0.3, 0.7)
                uniform(unit.running_mean, -0.3, 0.3)
                uniform(unit.running_var, 0.1, 1.5)
        uniform(model.fc.weight, -0.05, 0.05)
        uniform(model.fc.bias, -1, 1)
    return model.eval()


@pytest.fixture(scope='module')
def twin():
    return randomise(Twin())


def test_outputs_gradients_and_weights_both_ways(twin):
    module, params = convert.from_torch('inception', twin.state_dict(), image_size=SIZE)
    # One side grows, the other shrinks. Of 200 seeds the one whose activations stay furthest from where ReLU and max
    # pool have a kink: across one, rounding would change gradients by per cents.
    images = np.random.default_rng(209).integers(0, 256, (1, 60, 130, 3), np.uint8)
    as_torch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def apply(params):
        out = module.apply({'params': params}, images)
        return out.pool, out.spatial, out.logits, out.unbiased_logits

    assert_outputs_and_gradients_equal(apply, params, lambda p: convert.to_torch('inception', module, p), twin,
                                       twin(as_torch))
    back = convert.to_torch('inception', module, params)
    state = {name: x for name, x in twin.state_dict().items() if not name.endswith('num_batches_tracked')}
    assert sorted(back) == sorted(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)
    for got, want in zip(load(Twin(), back)(as_torch), twin(as_torch)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize('name, change', [
    ('Mixed_7c.branch_pool.bn.running_var', lambda s, n: s.pop(n)),
    ('AuxLogits.fc.weight', lambda s, n: s.update({n: torch.zeros(1)})),
    ('Mixed_6b.branch7x7_2.conv.weight', lambda s, n: s.update({n: s[n].transpose(2, 3)})),
    ('fc.bias', lambda s, n: s.update({n: s[n] * float('inf')})),
])
def test_wrong_state_dicts_are_named(twin, name, change):
    state = dict(twin.state_dict())
    change(state, name)
    with pytest.raises(ValueError, match=name):
        convert.from_torch('inception', state)
