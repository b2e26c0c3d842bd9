"""Momenta of a joint transformer: copies of its head at the start, adapters and heads after."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import config as kd_config
from kd.claims import seeds
from kd.errors import UserError
from kd.losses import momentum
from kd.method import with_base
from kd.methods.flow.arcflow import arcflow
from kd.models import adapters
from kd.network import from_linen, parameter_count
from kd.state import joined, paths

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SMALL = dict(
    name='kd.models.mmdit.preset', of='flux_dev', width=16, depth=1, heads=2, single=2, context=6,
    pooled=4, axes=(2, 2, 4),
)  # fmt: skip
SIDES, K = (4, 6, 2), 3
SPEC = {
    'input': jax.ShapeDtypeStruct(SIDES, jnp.float32),
    'text': jax.ShapeDtypeStruct((3, 6), jnp.float32),
    'pooled': jax.ShapeDtypeStruct((4,), jnp.float32),
    'guidance': jax.ShapeDtypeStruct((), jnp.float32),
}
TARGETS = r'(blocks/(ff/net_0/proj|proj_mlp|proj_out)|timestep_embedder/linear_\d)/kernel$'


def student(rank=2):
    block = dict(name='kd.models.momentum_mmdit.momentum_mmdit', network=SMALL, modes=K)
    module = adapters.lora(base=block, rank=rank, alpha=2.0, targets=TARGETS)
    return from_linen(module, *module.example_inputs(SPEC))


def teacher():
    block = dict(network=SMALL, schedule=dict(name='kd.losses.schedule.flow'), kind='flow')
    module = kd_config.build(dict(name='kd.models.denoiser.denoiser', **block), where='network')
    return from_linen(module, *module.example_inputs(SPEC))


def drawn(network, seed=0):
    """Every leaf random, also those that begin at 0."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), abstract)


def batch(rows=2):
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.normal(size=(rows, *x.shape)), x.dtype) for name, x in SPEC.items()
    }


@pytest.fixture(name='begun', scope='module')
def _begun():
    """(method, state) of a stage that begins as the teacher."""
    network, base = student(), teacher()
    context = seeds.context(
        network=network, teacher=base, references={'start': base}, tx=optax.sgd(1e-3), spec=SPEC
    )
    method = with_base(arcflow(context, states=2, decay=4, shift=3.2), 'start')
    frozen = dict.fromkeys(('teacher', 'start'), drawn(base))
    return method, jax.jit(method.init)(jax.random.key(0), frozen)


def test_it_begins_as_the_teacher_in_each_mode_but_for_a_little_noise(begun):
    _, state = begun
    network, base = student(), teacher()
    own = state.params['network']
    top = {'momentum', 'single_transformer_blocks', 'time_text_embed', 'transformer_blocks'}
    assert set(own) == top
    given = batch()
    x, told = given['input'], {k: given[k] for k in ('text', 'pooled', 'guidance')}
    s = jnp.array([0.0, 0.6])
    variables = state.variables()
    said = jax.jit(lambda v: network.apply(v, s, s, x, momenta=True, **told).logits)(variables)
    field = base.module.inner.apply(state.frozen['start'], 1000 * (1 - s), x, **told)
    # The same number for all places of a channel: the noise of its mode.
    away = np.asarray(said.velocity + field[:, None])
    assert away.shape == (2, K, *SIDES)
    np.testing.assert_allclose(away, np.broadcast_to(away[:1, :, :1, :1], away.shape), atol=1e-5)
    assert 0.01 < np.abs(away).max() < 0.25
    assert np.unique(np.round(away, 4)).size == K * SIDES[-1]
    # Weights equal, rates from log .2 to log 4, of each pixel.
    assert said.logits.shape == (2, K, *SIDES[:2], 1)
    np.testing.assert_array_equal(said.logits, 0.0)
    wanted = np.log([0.2, 4.0])[:, None, None, None]
    np.testing.assert_allclose(said.rate, np.broadcast_to(wanted, said.rate.shape), rtol=1e-6)


def test_a_pixel_has_its_own_weights_and_channels_before_pixels_of_a_patch():
    """By hand, from the tokens' numbers: mode, then channel, then place in the patch."""
    network = student()
    variables = drawn(network, 3)
    given = batch()
    x, told = given['input'], {k: given[k] for k in ('text', 'pooled', 'guidance')}
    s, t = jnp.array([0.1, 0.5]), jnp.array([0.4, 1.0])
    seen = []

    def listening(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name in ('proj_out', 'weight', 'rate') and 'momentum' in (
            context.module.path
        ):
            seen.append(np.asarray(out))
        return out

    import flax.linen as nn

    with nn.intercept_methods(listening):
        m = network.apply(variables, s, s, x, momenta=True, **told).logits
    for tokens, found, each in zip(seen, m, (SIDES[-1], 1, 1), strict=True):
        sign = -1 if each > 1 else 1
        tokens = tokens.reshape(2, 2, 3, -1, each, 2, 2)  # B, rows, columns, mode, channel, patch
        assert tokens.shape[3] == found.shape[1]
        for row, column in ((0, 0), (3, 4), (1, 5)):
            place = tokens[:, row // 2, column // 2, :, :, row % 2, column % 2]
            np.testing.assert_allclose(found[:, :, row, column], sign * place, atol=1e-5)
    jump = network.apply(variables, s, t, x, **told).logits
    np.testing.assert_allclose(jump, momentum.mean_velocity(m, s, s, t), atol=1e-5)
    assert jump.shape == x.shape


def test_a_step_changes_adapters_and_heads_alone_and_merged_they_say_the_same(begun):
    method, state = begun
    after, metrics = jax.jit(method.step)(state, batch())
    assert np.isfinite(metrics['loss'].total)
    before, own = state.params['network'], after.params['network']
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, own)
    at = [name for name, yes in zip(paths(own), jax.tree.leaves(moved), strict=True) if yes]
    assert {name.split('/')[-1] for name in at} >= {'lora_b', 'kernel', 'bias'}
    assert all(('momentum' in name) != ('lora' in name) for name in paths(own))
    network = student()
    plain = from_linen(adapters.plain(network.module), *network.inputs)
    base = state.frozen['start']['params']
    merged = adapters.merged(base, own, 1.0)
    wanted = jax.eval_shape(plain.init, jax.random.key(0))
    assert paths(wanted['params']) == paths(merged)
    given = batch()
    x, told = given['input'], {k: given[k] for k in ('text', 'pooled', 'guidance')}
    s, t = jnp.zeros(2), jnp.full(2, 0.5)
    found = jax.jit(lambda v: network.apply(v, s, t, x, **told).logits)(
        {'params': joined(base, own)}
    )
    again = jax.jit(lambda v: plain.apply(v, s, t, x, **told).logits)({'params': merged})
    np.testing.assert_allclose(found, again, atol=1e-4)


@pytest.mark.parametrize(
    ('of', 'billions', 'share'), [('flux_dev', 11.90, 0.05), ('qwen_image', 20.43, 0.05)]
)
def test_less_than_a_twentieth_is_trained(of, billions, share):
    """The paper's: below 5 %. Counted by shapes; nothing of this size is made."""
    config = kd_config.load(f'configs/flow/arcflow.py:{of}')
    block = dict(config.arc.network.to_dict())
    module = kd_config.build(block, where='network')
    spec = {'input': jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)}
    made = jax.eval_shape(
        lambda key: module.init(key, *(jnp.zeros(x.shape) for x in module.example_inputs(spec))),
        jax.random.key(0),
    )['params']
    own, base = adapters.own(made), adapters.without(made)
    assert parameter_count({'params': base}) / 1e9 == pytest.approx(billions, abs=0.01)
    assert 0.01 < parameter_count({'params': own}) / parameter_count({'params': base}) < share
    assert own['momentum']['proj_out']['kernel'].shape == (3_072, 16 * 64)
    assert own['momentum']['weight']['kernel'].shape == (3_072, 16 * 4)
    assert own['momentum']['rate']['kernel'].shape == (3_072, 15 * 4)


def test_what_cannot_be_is_told():
    block = dict(name='kd.models.momentum_mmdit.momentum_mmdit')
    for network in (dict(name='kd.models.mlp.MLP', widths=(4,), num_classes=3),
                    dict(name='kd.models.mmdit.preset', of='sd3_medium')):  # fmt: skip
        with pytest.raises(UserError, match='momenta are of an MMDiT without a table of places'):
            kd_config.build(dict(block, network=network), where='network')
    sd = dict(network=SMALL, schedule=dict(name='kd.losses.schedule.discrete'), kind='eps')
    module = kd_config.build(dict(name='kd.models.denoiser.denoiser', **sd), where='network')
    other = from_linen(module, *module.example_inputs(SPEC))
    context = seeds.context(network=student(), teacher=other, tx=optax.sgd(0.5), spec=SPEC)
    with pytest.raises(UserError, match="teacher is a denoiser of the schedule 'scaled_linear'"):
        arcflow(context)
