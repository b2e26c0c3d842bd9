"""Guidance in one call: adapters against what they stand beside, states against samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.data import sampled, sources
from kd.data.builders import mixtures
from kd.errors import UserError
from kd.io import shards
from kd.losses.schedule import edm
from kd.method import with_base
from kd.methods.diffusion import agd, common
from kd.methods.diffusion.distribution_matching import Views
from kd.models import adapters
from kd.models.denoiser import Denoised
from kd.models.dit import DiT
from kd.models.guided import Beside, GuidanceAdapter, Guided
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser, diffusion, times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH, B = edm(0.02, 5.0), 6
EXACT = mixtures.exact_denoiser(mixtures.pairs(), PATH)
SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
BASE = VelocityMLP(width=8, depth=2, num_classes=4)


def network_of(inner, spec=SPEC):
    module = Denoised(inner, PATH, 'flow', 'edm')
    return from_linen(module, *module.example_inputs(spec))


TOLD = network_of(Guided(BASE, GuidanceAdapter('mixed', 4, r'^hidden\d+$')))


@pytest.fixture(scope='module')
def variables():
    made = jax.jit(TOLD.init)(jax.random.key(0))
    # Networks here begin at zero.
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype('f'), made)


@pytest.mark.parametrize('kind', ['offset', 'attention', 'mixed'])
def test_adapters_begin_as_nothing_and_move_with_the_tokens(kind):
    beside = Beside(GuidanceAdapter(kind, 8), 3)
    h = jax.random.normal(jax.random.key(1), (B, 5, 4))
    told = (jnp.linspace(1.0, 6.0, B), jnp.linspace(-1.0, 1.0, B), jnp.arange(B) % 3)
    params = jax.jit(beside.init)(jax.random.key(0), h, *told)
    f = jax.jit(beside.apply)
    assert (np.asarray(f(params, h, *told)) == 0).all()
    params['params']['out']['kernel'] += 0.1 * jax.random.normal(jax.random.key(2), (8, 4))
    found = f(params, h, *told)
    if kind == 'offset':
        assert found.shape == (B, 1, 4)
    order = np.random.default_rng(0).permutation(5)
    other = np.asarray(f(params, h[:, order], *told))
    np.testing.assert_allclose(
        np.broadcast_to(other, h.shape), np.broadcast_to(found, h.shape)[:, order], atol=1e-5
    )
    # Scales that are near are near, and others are not.
    near, far = (np.abs(f(params, h, told[0] + d, *told[1:]) - found).mean() for d in (0.001, 1.0))
    assert near < 0.05 * far


def test_a_transformer_has_an_adapter_beside_each_attention():
    spec = {'input': jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)}
    base = DiT(patch=2, width=8, depth=2, heads=2, num_classes=3)
    params = jax.eval_shape(
        network_of(Guided(base, GuidanceAdapter('offset', 4)), spec).init, jax.random.key(0)
    )['params']
    assert set(adapters.own(params)) == {'guidance_block0_projection', 'guidance_block1_projection'}
    plain = jax.eval_shape(network_of(base, spec).init, jax.random.key(0))['params']
    assert adapters.without(params) == plain
    with pytest.raises(UserError, match='a GuidanceAdapter becomes part of no kernel'):
        adapters.check_merges(Guided(base, GuidanceAdapter()), 'student.teacher')


def test_untrained_it_is_its_base_at_every_scale_and_is_asked_once(variables):
    plain, told = network_of(BASE), denoiser.of_network(TOLD)
    own = {'params': adapters.without(variables['params'])}
    beside = {
        name: {**one, 'out': jax.tree.map(jnp.zeros_like, one['out'])}
        for name, one in adapters.own(variables['params']).items()
    }
    begun = {'params': {**own['params'], **beside}}
    x, t = jax.random.normal(jax.random.key(1), (B, 2)), jnp.linspace(0.1, 4.0, B)
    condition = {'label': jnp.arange(B) % 4}
    said = jax.jit(denoiser.of_network(plain).apply)
    wanted = said(own, x, t, condition).x0
    rows = []

    def counted(variables, x, t, condition, **how):
        rows.append(len(x))
        return told.apply(variables, x, t, condition, **how)

    for scale in (1.5, 6.0):
        seen = denoiser.guided(told._replace(apply=counted), scale)
        found = jax.jit(seen.apply)(begun, x, t, condition).x0
        np.testing.assert_array_equal(found, wanted)
    assert rows == [B, B]
    # Without a scale there are no adapters, trained or not.
    np.testing.assert_array_equal(jax.jit(told.apply)(variables, x, t, condition).x0, wanted)
    moved = jax.jit(denoiser.guided(told, 3.0).apply)(variables, x, t, condition).x0
    assert not np.allclose(moved, wanted)


@pytest.mark.parametrize('name', ['ddim', 'heun'])
def test_what_a_sampler_asks_and_is_told_replays_it(name):
    grid, condition = times.sampling(PATH, 5), {'label': jnp.arange(B) % 4}
    denoise = denoiser.guided(EXACT, 3.0).bind({}, condition)
    z, key = 5 * jax.random.normal(jax.random.key(1), (B, 2)), jax.random.key(0)
    step = diffusion.STEPS[name]()
    asked, said = jax.jit(
        lambda z: diffusion.recorded(PATH, denoise, z, grid, key, step=step)
    )(z)  # fmt: skip
    states = diffusion.sample(PATH, denoise, z, grid, key, step=step, trajectory=True)
    np.testing.assert_allclose(asked, states[:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(said[-1], states[-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(said[0], denoise(z, grid[0]), rtol=1e-5, atol=1e-6)
    if name == 'ddim':
        ratio = (grid[1:] / grid[:-1])[:, None, None]
        moved = said[:-1] + ratio * (asked[:-1] - said[:-1])
        np.testing.assert_allclose(asked[1:], moved, rtol=1e-5, atol=1e-5)


def test_states_with_noise_have_the_guided_target():
    batch = {'input': jnp.ones((B, 2)), 'label': jnp.arange(B) % 4}
    law = times.uniform(times.natural(PATH))
    made = agd.noised(EXACT, {}, batch, jax.random.key(0), law, (1.0, 6.0))
    x, t = made['input'], made['time']
    told, untold = denoiser.branches(
        EXACT, {}, x, t, ({'label': batch['label']}, {'label': jnp.full(B, 4)})
    )
    wanted = untold + made['guidance'][:, None] * (told - untold)
    np.testing.assert_allclose(made['target'], wanted, rtol=1e-5, atol=1e-6)
    assert ((made['guidance'] >= 1) & (made['guidance'] <= 6)).all()
    assert len(set(np.asarray(made['guidance']).tolist())) == B


def states_spec(**fields):
    one = jax.ShapeDtypeStruct((), jnp.float32)
    return SPEC | {'target': SPEC['input'], 'time': one, 'guidance': one} | fields


def test_adapters_alone_are_trained_and_no_teacher_is_there(variables):
    """Trap: the base stays as it is, frozen once; of stored states nothing else is frozen."""
    context = seeds.context(
        network=TOLD, references={'start': network_of(BASE)}, tx=optax.adamw(0.01), steps=4,
        spec=states_spec(label=jax.ShapeDtypeStruct((), jnp.int32)),
    )  # fmt: skip
    method = with_base(agd.agd(context, weight='edm'), 'start')
    own = {'params': adapters.without(variables['params'])}
    state = jax.jit(method.init)(jax.random.key(0), {'start': own})
    batch = {
        'input': jax.random.normal(jax.random.key(1), (B, 2)), 'label': jnp.arange(B) % 4,
        'target': jax.random.normal(jax.random.key(2), (B, 2)), 'time': jnp.linspace(0.1, 4.0, B),
        'guidance': jnp.linspace(1.0, 6.0, B),
    }  # fmt: skip
    step, losses = jax.jit(method.step), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss'].total))
    assert losses[2] < losses[0]
    assert set(state.frozen) == {'start'}
    assert all(name.startswith('guidance_') for name in state.params['network'])
    jax.tree.map(np.testing.assert_array_equal, state.frozen['start']['params'], own['params'])
    # Where the target is what the base says, nothing is to be learnt.
    said = denoiser.of_network(network_of(BASE)).apply(
        own, batch['input'], batch['time'], {'label': batch['label']}
    )
    begun = jax.jit(method.init)(jax.random.key(0), {'start': own})
    _, metrics = step(begun, {**batch, 'target': said.x0})
    assert float(metrics['loss'].total) < 1e-10


def test_rows_on_disk_are_what_was_asked_and_said(tmp_path):
    spec = sources.example_spec((2,))
    data = sources.DataSet('points', {'train': 3}, lambda _: sources.in_memory({
        'input': np.zeros((3, 2), np.float32), 'label': np.arange(3, dtype=np.int32)
    }), spec, 4)  # fmt: skip
    source, rng = sources.Source(data, 'train'), np.random.default_rng(0)
    asked, said = rng.standard_normal((2, 4, 3, 2)).astype(np.float32)
    grid, scale = np.array([5.0, 1.0, 0.5, 0.1]), np.array([1.0, 2.0, 3.0])
    for keep in ('states', 'ends'):
        form = sampled.Form(source, keep, 4, 'float32')
        made = form.manifest(3, 8, grid) | {'made_of': {}}
        writer = shards.Writer(tmp_path / keep / 'train_samples', made, sampled.WHAT)
        assert writer.begin() == [0]
        writer.write(0, form.records(asked, said, grid, scale, {'label': np.arange(3)}))
        writer.finish()
        stored = shards.Reader(tmp_path / keep / 'train_samples', sampled.WHAT)
        rows = form.read(stored.records(np.arange(len(stored))))
        if keep == 'states':
            np.testing.assert_array_equal(rows['input'], asked.swapaxes(0, 1).reshape(12, 2))
            np.testing.assert_array_equal(rows['target'], said.swapaxes(0, 1).reshape(12, 2))
            np.testing.assert_array_equal(rows['time'], np.tile(grid, 3).astype(np.float32))
            np.testing.assert_array_equal(rows['label'], np.repeat(np.arange(3), 4))
            np.testing.assert_array_equal(rows['guidance'], np.repeat(scale, 4))
        else:
            np.testing.assert_array_equal(rows['input'], asked[0])
            np.testing.assert_array_equal(rows['target'], said[-1])
            paired = sampled.Paired(source, form, stored, tuple(grid))
            batch = paired.fetch([2, 0])
            np.testing.assert_array_equal(batch['noise'], asked[0][[2, 0]])
            np.testing.assert_array_equal(batch['sample'], said[-1][[2, 0]])


def test_pairs_pull_a_generator_to_the_sample_of_their_noise():
    """The regression of DMD, against a sum by hand, and its grid against the generator's."""
    spec = SPEC | {'noise': SPEC['input'], 'sample': SPEC['input']}
    term = common.regression(seeds.context(network=TOLD, spec=spec), (5.0,), 0.25)
    noise, sample = jax.random.normal(jax.random.key(1), (2, B, 2))

    def value(a):
        views = Views(
            noise,
            jnp.zeros(B),
            {},
            PATH,
            None,
            None,
            None,
            generator=lambda x, t: a * x / t[:, None],
        )
        return term.loss(views, {'noise': noise, 'sample': sample}, None)

    wanted = ((2.0 * noise / 5.0 - sample) ** 2).mean(1)
    np.testing.assert_allclose(value(2.0), wanted, rtol=1e-5)
    slope = jax.grad(lambda a: value(a).mean())(2.0)
    by_hand = (2 * (2.0 * noise / 5.0 - sample) * noise / 5.0).mean()
    assert float(slope) == pytest.approx(float(by_hand), rel=1e-4)
    with pytest.raises(UserError, match='regression wants pairs of a noise and a sample'):
        common.regression(seeds.context(network=TOLD, spec=SPEC), (5.0,), 0.25)


def test_bad_input():
    with pytest.raises(UserError, match='takes no guidance; wrap it in '):
        agd.agd(seeds.context(network=network_of(BASE), spec=SPEC))
    with pytest.raises(UserError, match="have no 'time'; name a stage of trajectories"):
        agd.agd(seeds.context(network=TOLD, spec=SPEC))
    with pytest.raises(UserError, match="conditioned on 'guidance', which the data do not have"):
        denoiser.conditions(TOLD, {'label': 0})
