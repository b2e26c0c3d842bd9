"""RFDN and EDSR against forward passes of their own in NumPy."""

import jax
import numpy as np
import pytest
from test_imdn import applied, conv, leaky, loaded, picture, released, shapes, shuffled

from kd.models.restorers import EDSR
from kd.models.rfdn import RFDN
from kd.network import parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def relu(x):
    return np.maximum(x, 0)


def pooled(x):
    """Largest of 7 x 7, at a stride of 3."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (7, 7), (1, 2))
    return windows.max((-2, -1))[:, ::3, ::3]


def enlarged(x, height, width):
    """Linear between centres of pixels, the edge beyond the last ones."""
    for axis, new in ((1, height), (2, width)):
        old = x.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(place.astype(int), max(old - 2, 0))
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, old - 1)
        x = (1 - share) * x.take(low, axis) + share * x.take(high, axis)
    return x


def attention(tensors, name, x):
    first = conv(tensors, f'{name}.conv1', x)
    c = pooled(conv(tensors, f'{name}.conv2', first)[:, 1:-1:2, 1:-1:2])
    c = relu(conv(tensors, f'{name}.conv_max', c))
    c = conv(tensors, f'{name}.conv3_', relu(conv(tensors, f'{name}.conv3', c)))
    c = enlarged(c, *x.shape[1:]) + conv(tensors, f'{name}.conv_f', first)
    return x / (1 + np.exp(-conv(tensors, f'{name}.conv4', c)))


def block(tensors, name, x):
    kept = []
    for i in (1, 2, 3):
        kept.append(leaky(conv(tensors, f'{name}.c{i}_d', x)))
        x = leaky(x + conv(tensors, f'{name}.c{i}_r', x))
    kept.append(leaky(conv(tensors, f'{name}.c4', x)))
    return attention(tensors, f'{name}.esa', conv(tensors, f'{name}.c5', np.concatenate(kept)))


def test_parameters_are_as_many_as_published():
    """.433 million of the AIM 2020 challenge's winner, at x4."""
    assert parameter_count(shapes(RFDN(4), 16)) == 433_448


def test_weights_of_the_release_load_and_it_is_what_numpy_makes_of_them(tmp_path):
    module, low = RFDN(2, channels=8, blocks=2), picture(height=30, width=17)
    tensors = {name: 0.5 * x for name, x in released(module, side=16).items()}
    assert {'B2.esa.conv3_.weight', 'B1.c3_d.bias', 'c.0.weight', 'upsampler.0.bias'} <= {*tensors}
    first = conv(tensors, 'fea_conv', (low[0].transpose(2, 0, 1) + 1.0) / 2)
    one = block(tensors, 'B1', first)
    two = block(tensors, 'B2', one)
    y = leaky(conv(tensors, 'c.0', np.concatenate([one, two])))
    y = conv(tensors, 'LR_conv', y) + first
    expected = 2 * shuffled(conv(tensors, 'upsampler.0', y), 2) - 1
    found = applied(module, loaded(module, tensors, tmp_path, side=16), low)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match='RFDN takes sides of 15 pixels at least'):
        jax.eval_shape(module.init, jax.random.key(0), picture(height=14))


def test_edsr_is_what_numpy_makes_of_it():
    module, low = EDSR(4, channels=8, blocks=2, share=0.3), picture()
    variables = shapes(module)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), variables
    )
    tensors = {}
    for name, of in variables['params'].items():
        tensors[f'{name}.weight'] = of['kernel'].transpose(3, 2, 0, 1)
        tensors[f'{name}.bias'] = of['bias']
    first = conv(tensors, 'head', (low[0].transpose(2, 0, 1) + 1.0) / 2)
    x = first
    for i in (1, 2):
        x = x + 0.3 * conv(tensors, f'block{i}_b', relu(conv(tensors, f'block{i}_a', x)))
    x = conv(tensors, 'body', x) + first
    for i in (1, 2):
        x = shuffled(conv(tensors, f'up{i}', x), 2)
    expected = 2 * conv(tensors, 'tail', x) - 1
    found = applied(module, variables, low)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
