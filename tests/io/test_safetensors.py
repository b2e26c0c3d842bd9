"""Networks as safetensors files: the format byte by byte, round trips, files that do not fit."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import safetensors
from kd.models.resnet import ResNet
from kd.network import from_linen

TREE = {
    'params': {
        'b': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)},
        'a': jnp.asarray([1.5, -2.0], jnp.bfloat16),
    },
    'batch_stats': {'count': np.int32(7), 'seen': np.array([True, False])},
}


@pytest.fixture
def file(tmp_path):
    safetensors.save(tmp_path / 'x.safetensors', TREE, {'by': 'test'})
    return tmp_path / 'x.safetensors'


def test_the_bytes_are_those_of_the_format(file):
    raw = file.read_bytes()
    (length,) = struct.unpack('<Q', raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    assert length % 8 == 0
    assert header.pop('__metadata__') == {'format': 'flax', 'by': 'test'}
    assert {name: (entry['dtype'], entry['shape']) for name, entry in header.items()} == {
        'params/a': ('BF16', [2]),
        'params/b/kernel': ('F32', [2, 3]),
        'batch_stats/count': ('I32', []),
        'batch_stats/seen': ('BOOL', [2]),
    }
    begin, end = header['params/b/kernel']['data_offsets']
    assert struct.unpack('<6f', data[begin:end]) == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    begin, end = header['params/a']['data_offsets']
    assert data[begin:end] == bytes([0xC0, 0x3F, 0x00, 0xC0])  # 1.5 and -2, upper halves of f32
    # Without gaps and without overlap.
    spans = sorted(entry['data_offsets'] for entry in header.values())
    assert [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(data)]


def test_a_network_comes_back_bit_for_bit_and_computes_the_same(tmp_path):
    network = from_linen(ResNet(depth=8, num_classes=3), jax.ShapeDtypeStruct((1, 8, 8, 1), 'f4'))
    variables = network.init(jax.random.key(1))
    safetensors.save(tmp_path / 'net', variables)
    restored = safetensors.restore(
        tmp_path / 'net', jax.eval_shape(network.init, jax.random.key(0))
    )
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    assert 'batch_stats' in restored
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    apply = jax.jit(lambda variables: network.apply(variables, x).logits)
    np.testing.assert_array_equal(apply(restored), apply(variables))


def test_tensors_lie_where_their_shardings_say(file):
    mesh = jax.make_mesh((2,), ('x',), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), TREE)
    abstract['params']['b']['kernel'] = jax.ShapeDtypeStruct((2, 3), 'float32', sharding=split)
    kernel = safetensors.restore(file, abstract)['params']['b']['kernel']
    assert kernel.sharding == split
    np.testing.assert_array_equal(kernel, TREE['params']['b']['kernel'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda t: t['params']['b'].update(kernel=np.zeros((3, 2), 'f4')),
            r'float32\[2, 3\] in',
        ),
        (lambda t: t['params'].update(a=np.zeros(2, 'f4')), r'bfloat16\[2\] in the file, float32'),
        (lambda t: t['params'].pop('a'), "'params/a' is .* in the file, nothing in the network"),
        (lambda t: t['params'].update(c=np.zeros(1)), "'params/c' is nothing in the file"),
    ],
)
def test_a_network_that_does_not_fit_is_named(file, change, message):
    tree = jax.tree.map(lambda x: x, TREE)
    change(tree)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)
    with pytest.raises(UserError, match=message):
        safetensors.restore(file, abstract)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda raw: raw[:-1], 'cut short'),
        (lambda raw: raw[:20], 'cut short'),
        (lambda raw: b'', 'missing or empty'),
        (lambda raw: raw[:8] + b'x' + raw[9:], 'no JSON'),
        (lambda raw: raw.replace(b'BF16', b'BF17'), 'unknown type BF17'),
    ],
)
def test_a_damaged_file_is_one_clear_line(file, damage, message):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        safetensors.load(file)


def test_types_the_format_lacks_are_refused(tmp_path):
    with pytest.raises(UserError, match="'x' has type complex64"):
        safetensors.save(tmp_path / 'x', {'x': np.zeros(1, np.complex64)})
    assert not (tmp_path / 'x').exists()
