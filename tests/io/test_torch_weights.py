"""PyTorch's names and layouts against hand-written tensors, in one file and in several."""

import json
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import safetensors, torch_weights

P = jax.sharding.PartitionSpec


def array(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def shapes(**leaves):
    return {
        'params': {name: {'kernel': jax.ShapeDtypeStruct(x, 'f4')} for name, x in leaves.items()}
    }


def write(folder, tensors, name='model.safetensors', **metadata):
    safetensors.save(folder / name, tensors, metadata)
    return folder / name


def write_two(folder, **changes):
    """a.weight and b.weight in a file each, and their index."""
    write(folder, {'a.weight': array(2, 3)}, '1.safetensors')
    write(folder, {'b.weight': array(3, 4)}, '2.safetensors')
    places = {'a.weight': '1.safetensors', 'b.weight': '2.safetensors', **changes}
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'metadata': {'total_size': 72}, 'weight_map': places}))
    return index


class Volumes(nn.Module):
    """Convolutions of three, one and two dimensions, an embedding and a norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 3, 1), padding='VALID', name='three')(x)[:, 0]
        x = nn.Conv(5, (3, 2), padding='VALID', name='two')(x)[:, 0]
        x = nn.Conv(6, (2,), padding='VALID', name='one')(x)
        x = nn.RMSNorm(epsilon=1e-6, name='norm')(nn.Dense(3, name='dense')(x.mean(1)))
        return x + nn.Embed(7, 3, name='embed')(jnp.array([6]))


def correlate(x, weight, bias):
    """[C, *space], [O, C, *window] -> [O, *space - window + 1], term by term."""
    ends = [n - k + 1 for n, k in zip(x.shape[1:], weight.shape[2:], strict=True)]
    out = np.zeros((len(weight), *ends))
    for shift in np.ndindex(*weight.shape[2:]):
        part = x[(slice(None), *(slice(s, s + n) for s, n in zip(shift, ends, strict=True)))]
        out += np.tensordot(weight[(..., *shift)], part, 1)
    return out + bias.reshape(-1, *[1] * len(ends))


def test_kernels_of_every_rank_compute_what_pytorch_defines(tmp_path):
    x = array(1, 2, 5, 4, 2)
    tensors = {
        'three.weight': array(4, 2, 2, 3, 1), 'three.bias': array(4),
        'two.weight': array(5, 4, 3, 2), 'two.bias': array(5),
        'one.weight': array(6, 5, 2), 'one.bias': array(6),
        'dense.weight': array(3, 6), 'dense.bias': array(3),
        'norm.weight': array(3), 'embed.weight': array(7, 3),
    }  # fmt: skip
    abstract = jax.eval_shape(Volumes().init, jax.random.key(0), x)
    variables = torch_weights.load(write(tmp_path, tensors), abstract)
    y = correlate(x[0].transpose(3, 0, 1, 2), tensors['three.weight'], tensors['three.bias'])[:, 0]
    y = correlate(y, tensors['two.weight'], tensors['two.bias'])[:, 0]
    y = correlate(y, tensors['one.weight'], tensors['one.bias']).mean(1)
    y = tensors['dense.weight'] @ y + tensors['dense.bias']
    y = y / np.sqrt((y**2).mean() + 1e-6) * tensors['norm.weight'] + tensors['embed.weight'][6]
    np.testing.assert_allclose(Volumes().apply(variables, x)[0], y, rtol=2e-5)


def test_a_kernel_that_is_a_vector_stays_one(tmp_path):
    file = write(tmp_path, {'a.weight': array(3)})
    kernel = torch_weights.load(file, shapes(a=(3,)))['params']['a']['kernel']
    np.testing.assert_array_equal(kernel, array(3))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16, np.float32])
def test_types_are_kept_or_cast(tmp_path, dtype):
    file = write(tmp_path, {'a.weight': array(2, 3, dtype=dtype), 'a.steps': np.int32(3)})
    abstract = {'params': {'a': {name: jax.ShapeDtypeStruct(s, 'f4') for name, s in
                                 (('kernel', (3, 2)), ('steps', ()))}}}  # fmt: skip
    for wanted, cast in ((dtype, None), (jnp.bfloat16, jnp.bfloat16), (np.float32, 'float32')):
        found = torch_weights.load(file, abstract, dtype=cast)['params']['a']
        assert found['kernel'].dtype == wanted
        assert found['steps'].dtype == np.int32
        value = array(2, 3).astype(dtype).astype(wanted).astype(np.float32)
        np.testing.assert_array_equal(found['kernel'].astype(np.float32), value.T)


def test_several_files_with_an_index(tmp_path):
    loaded = torch_weights.load(write_two(tmp_path), shapes(a=(3, 2), b=(4, 3)))['params']
    np.testing.assert_array_equal(loaded['a']['kernel'], array(2, 3).T)
    np.testing.assert_array_equal(loaded['b']['kernel'], array(3, 4).T)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda index: index.unlink(), r'index\.json is not there'),
        (lambda index: index.write_text('{'), "must be JSON with 'weight_map'"),
        (lambda index: index.write_text('[]'), "must be JSON with 'weight_map'"),
        (lambda index: index.write_text('{"weight_map": 3}'), "must be JSON with 'weight_map'"),
        (lambda index: index.write_text('{"weight_map": {"a": 3}}'), 'must be JSON with'),
        (lambda index: (index.parent / '2.safetensors').unlink(), '2.safetensors is not there'),
        (
            lambda index: write_two(index.parent, c='1.safetensors'),
            "'c' is in 1.safetensors, which",
        ),
    ],
)
def test_an_index_that_is_wrong_is_one_line(tmp_path, change, message):
    index = write_two(tmp_path)
    change(index)
    with pytest.raises(UserError, match=message) as raised:
        torch_weights.load(index, shapes(a=(3, 2), b=(4, 3)))
    assert '\n' not in str(raised.value)


def test_names_are_the_networks_until_renamed(tmp_path):
    file = write(tmp_path, {'model.a.weight': array(2, 3)})
    with pytest.raises(UserError, match=r"no tensor 'a.weight'. Did you mean 'model.a.weight'\?"):
        torch_weights.load(file, shapes(a=(3, 2)))
    loaded = torch_weights.load(file, shapes(a=(3, 2)), rename=lambda name: f'model.{name}')
    np.testing.assert_array_equal(loaded['params']['a']['kernel'], array(2, 3).T)


def test_tensors_left_over_are_an_error_unless_ignored(tmp_path):
    more = {f'extra.{n}': array(1) for n in range(4)}
    counter = {'a.num_batches_tracked': np.int32(3)}
    file = write(tmp_path, {'a.weight': array(2, 3), **more, **counter})
    message = r"no use for: 'extra.0', 'extra.1', 'extra.2' and 1 more\. Is it the same network"
    with pytest.raises(UserError, match=message):
        torch_weights.load(file, shapes(a=(3, 2)))
    torch_weights.load(file, shapes(a=(3, 2)), ignore=r'^extra|num_batches')
    # All but the networks' own: a smaller network of the same names is refused too.
    with pytest.raises(UserError, match=r"no use for: 'a.num_batches_tracked', 'a.weight'\."):
        torch_weights.load(file, {'params': {}}, ignore='extra')


@pytest.mark.parametrize('shape', [(2, 3), (3, 2, 1), (6,), (3, 4)])
def test_another_shape_is_refused_before_anything_is_read(tmp_path, shape, monkeypatch):
    file = write(tmp_path, {'a.weight': array(2, 3)})
    monkeypatch.setattr(safetensors.Tensor, 'read', None)
    with pytest.raises(UserError, match=r"'a.weight' has shape \[2, 3\], which does not fit"):
        torch_weights.load(file, shapes(a=shape))


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each part that is read."""
    found, read = [], safetensors.Tensor.read

    def counted(self, index=None):
        part = read(self, index)
        found.append(part.nbytes)
        return part

    monkeypatch.setattr(safetensors.Tensor, 'read', counted)
    return found


def test_each_device_gets_its_part_alone(tmp_path, reads):
    mesh = jax.make_mesh((2, 2), ('x', 'y'), devices=jax.devices()[:4])
    layouts = {
        'a': ((3, 1, 4, 8), P(None, None, 'y', 'x'), array(8, 4, 3, 1), 4),
        'b': ((4, 6), P('x'), array(6, 4), 2),
        'c': ((5,), P(), array(5), 1),
    }
    file = write(tmp_path, {f'{name}.weight': x for name, (_, _, x, _) in layouts.items()})
    abstract = {'params': {
        name: {'kernel': jax.ShapeDtypeStruct(
            shape, 'f4', sharding=jax.sharding.NamedSharding(mesh, spec))}
        for name, (shape, spec, _, _) in layouts.items()
    }}  # fmt: skip
    reads.clear()
    loaded = torch_weights.load(file, abstract)['params']
    for name, (_, spec, x, _) in layouts.items():
        kernel = loaded[name]['kernel']
        assert kernel.sharding.spec == spec
        layout = x if x.ndim < 2 else np.moveaxis(x, (0, 1), (-1, -2))
        np.testing.assert_array_equal(kernel, layout)
    # Every part once, though two devices hold each half of b and four hold c.
    parts = [n for _, _, x, n in layouts.values() for n in [x.nbytes // n] * n]
    assert sorted(reads) == sorted(parts)


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    side, count = 256, 16
    tensors = {f'layer{n}.weight': np.full((side, side), n, np.float32) for n in range(count)}
    file = write(tmp_path, tensors)
    abstract = shapes(**{f'layer{n}': (side, side) for n in range(count)})
    tracemalloc.start()
    loaded = torch_weights.load(file, abstract, dtype=jnp.bfloat16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Arrays of devices are not Python's; the tensor before may not be free yet.
    assert peak < 2.5 * side**2 * 4
    assert float(loaded['params']['layer5']['kernel'].mean()) == 5.0


def test_a_tensor_that_is_shared_is_read_for_both(tmp_path):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, use_bias=False, name='lm_head')(nn.Embed(5, 3, name='shared')(x))

    abstract = jax.eval_shape(Tied().init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    file = write(tmp_path, {'shared.weight': array(5, 3)}, **{'lm_head.weight': 'shared.weight'})
    both = torch_weights.load(file, abstract)['params']
    np.testing.assert_array_equal(both['lm_head']['kernel'], array(5, 3).T)
    np.testing.assert_array_equal(both['shared']['embedding'], array(5, 3))
    # A network with one of the two leaves nothing over.
    torch_weights.load(file, {'params': {'lm_head': abstract['params']['lm_head']}})
    # And without a word in the metadata, a name of one's own does the same.
    file = write(tmp_path, {'shared.weight': array(5, 3)})
    again = torch_weights.load(
        file, abstract, rename=lambda name: name.replace('lm_head', 'shared')
    )['params']
    np.testing.assert_array_equal(again['lm_head']['kernel'], array(5, 3).T)
