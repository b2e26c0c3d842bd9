"""Networks as safetensors files: the format byte by byte, round trips, files that do not fit."""

import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd import process
from kd.errors import UserError
from kd.io import safetensors
from kd.network import from_linen

TREE = {
    'params': {
        'b': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)},
        'a': jnp.asarray([1.5, -2.0], jnp.bfloat16),
    },
    'batch_stats': {'count': np.int32(7), 'seen': np.array([True, False])},
}


class Normalised(nn.Module):
    """A convolution and a batch normalisation before the head."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(not train, name='norm')(nn.Conv(2, (3, 3), name='conv')(x))
        return nn.Dense(3, name='head')(x.mean((1, 2)))


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
    network = from_linen(Normalised(), jax.ShapeDtypeStruct((1, 8, 8, 1), 'f4'))
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


def test_one_part_of_a_tensor_is_read_alone(file):
    kernel = safetensors.load(file)['params/b/kernel']
    assert (kernel.shape, kernel.dtype) == ((2, 3), np.float32)
    part = kernel.read((slice(1, 2), slice(None)))
    np.testing.assert_array_equal(part, [[3.0, 4.0, 5.0]])
    np.testing.assert_array_equal(kernel, TREE['params']['b']['kernel'])


def test_tensors_without_elements_come_back(tmp_path):
    safetensors.save(tmp_path / 'x', {'none': np.zeros((0, 3), np.int8)})
    mesh = jax.make_mesh((1,), ('x',), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'x'))
    abstract = {'none': jax.ShapeDtypeStruct((0, 3), 'int8', sharding=sharding)}
    restored = safetensors.restore(tmp_path / 'x', abstract)['none']
    assert (restored.shape, restored.dtype) == ((0, 3), np.int8)


def raw(header, data=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data


def entry(dtype='F32', shape=(2,), offsets=(0, 8)):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


DATA = bytes(range(16))
DAMAGED = {
    'empty': b'',
    'shorter than a length': b'abc',
    'a length beyond the file': (2**62).to_bytes(8, 'little') + b'{}',
    'no header': raw(b''),
    'no JSON': raw(b'{x'),
    'no UTF-8': raw(b'\xff\xfe{}'),
    'deeply nested': raw(b'[' * 10_000),
    'a list': raw([1, 2]),
    'null': raw(b'null'),
    'a number for a tensor': raw({'a': 3}),
    'no type': raw({'a': {'shape': [2], 'data_offsets': [0, 8]}}, DATA[:8]),
    'no shape': raw({'a': {'dtype': 'F32', 'data_offsets': [0, 8]}}, DATA[:8]),
    'no offsets': raw({'a': {'dtype': 'F32', 'shape': [2]}}, DATA[:8]),
    'an unknown type': raw({'a': entry('F33')}, DATA[:8]),
    'a type that NumPy lacks': raw({'a': entry('F8_E4M3', (8,))}, DATA[:8]),
    'a negative side': raw({'a': entry(shape=(-2, -1))}, DATA[:8]),
    'a broken side': raw({'a': entry(shape=(2.0,))}, DATA[:8]),
    'sides beyond all memory': raw({'a': entry(shape=(2**40, 2**40))}, DATA[:8]),
    'one offset': raw({'a': entry(offsets=(0,))}, DATA[:8]),
    'offsets in words': raw({'a': entry(offsets=('0', '8'))}, DATA[:8]),
    'offsets backwards': raw({'a': entry(offsets=(8, 0))}, DATA[:8]),
    'offsets of another size': raw({'a': entry(offsets=(0, 12))}, DATA[:12]),
    'offsets beyond the file': raw({'a': entry(offsets=(8, 16))}, DATA[:8]),
    'tensors that overlap': raw({'a': entry(), 'b': entry(offsets=(4, 12))}, DATA[:12]),
    'a gap': raw({'a': entry(), 'b': entry(offsets=(12, 20))}, DATA + DATA[:4]),
    'bytes of no tensor': raw({'a': entry()}, DATA),
    'metadata of numbers': raw({'__metadata__': {'n': 1}, 'a': entry()}, DATA[:8]),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_file_is_one_clear_line(tmp_path, case):
    file = tmp_path / 'x.safetensors'
    file.write_bytes(DAMAGED[case])
    what = "'a' has type F8_E4M3, which NumPy lacks" if 'NumPy' in case else 'is not a safetensors'
    with pytest.raises(UserError, match=rf'x\.safetensors:? {what}') as raised:
        safetensors.load(file)
    assert '\n' not in str(raised.value)


def test_a_file_cut_short_anywhere_is_refused(file):
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match='is cut short'):
            safetensors.load(file)


def test_files_that_are_not_there_or_are_folders(tmp_path):
    with pytest.raises(UserError, match='missing is not there'):
        safetensors.load(tmp_path / 'missing')
    with pytest.raises(UserError, match='is not a safetensors file'):
        safetensors.load(tmp_path)


def test_a_shared_tensor_is_found_under_its_other_names(tmp_path):
    file = tmp_path / 'x'
    safetensors.save(
        file, {'shared': np.arange(3, dtype=np.int32)}, {'head': 'shared', 'note': 'of a test'}
    )
    tensors = safetensors.load(file)
    assert set(tensors) == {'shared', 'head'}
    np.testing.assert_array_equal(tensors['head'], [0, 1, 2])
    leaf = jax.ShapeDtypeStruct((3,), 'int32')
    restored = safetensors.restore(file, {'head': leaf})
    np.testing.assert_array_equal(restored['head'], [0, 1, 2])


def test_types_the_format_lacks_are_refused(tmp_path):
    with pytest.raises(UserError, match="'x' has type complex128"):
        safetensors.save(tmp_path / 'x', {'x': np.zeros(1, np.complex128)})
    assert not (tmp_path / 'x').exists()


def test_a_folder_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    for file in (tmp_path / 'none' / 'x', tmp_path / 'file' / 'x'):
        with pytest.raises(UserError, match=r'x cannot be written .* is its folder there'):
            safetensors.save(file, TREE)
    monkeypatch.setattr(safetensors, 'stage_variables', lambda *_: TREE)
    monkeypatch.setattr('sys.argv', ['safetensors', 'stage', str(tmp_path / 'none' / 'x')])
    assert process.entry(safetensors.main) == 2
    message = capsys.readouterr().err
    assert message.startswith('kd: ')
    assert message.count('\n') == 1


def test_others_may_read_what_is_written(file, tmp_path):
    (tmp_path / 'beside').touch()
    assert file.stat().st_mode == (tmp_path / 'beside').stat().st_mode
    assert {each.name for each in tmp_path.iterdir()} == {'x.safetensors', 'beside'}
