"""TAD-SR: residual shifting, high-frequency score distillation, and solutions recorded once."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import config as kd_config
from kd.aot import hlo
from kd.claims import seeds
from kd.data.context import SourceContext, source_loader
from kd.data.transforms.residual import residual
from kd.errors import UserError
from kd.evaluators.restoration import high_band_error, radii
from kd.evaluators.restored import compared, restored
from kd.io import safetensors
from kd.losses import adversarial, score_distillation
from kd.losses.schedule import residual_shift
from kd.methods.sr.tad_sr import gap, tad_sr
from kd.models.discriminator import TimeAwareHeads
from kd.models.shifted import Shifted, ShiftedMLP, shifted
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH, KAPPA, B, KEY = residual_shift(), 2.0, 8, jax.random.key(0)
# As the published configuration has them.
ROOTS = [0.0200, 0.1172, 0.1763, 0.2336, 0.2916, 0.3510, 0.4124, 0.4759, 0.5417, 0.6099, 0.6807,
         0.7540, 0.8300, 0.9086, 0.9900]  # fmt: skip
SPEC = {name: jax.ShapeDtypeStruct((4, 4, 1), jnp.float32) for name in ('input', 'low')}
PAIRS = SPEC | dict.fromkeys(('noise', 'sample'), SPEC['input'])


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def roots():
    return np.asarray(PATH.sigma(jnp.arange(15.0))) / KAPPA


def test_the_schedule_is_the_published_one_and_shifts_a_picture_to_another(wide):
    np.testing.assert_allclose(roots(), ROOTS, atol=6e-5)
    eta, (x0, y, eps) = roots() ** 2, drawn(3, 15, 4)
    expected = x0 + eta[:, None] * (y - x0) + KAPPA * np.sqrt(eta)[:, None] * eps
    found = jax.jit(PATH.mix)(x0 - y, eps, jnp.arange(15.0))
    np.testing.assert_allclose(found + y, expected, rtol=1e-12)
    # All but the noise is left of the picture, and .0199 of it at the end.
    assert 1 - eta[-1] == pytest.approx(1 - 0.9801, abs=1e-9)
    assert residual_shift() is PATH
    with pytest.raises(ValueError, match='residual_shift: steps=1, expected at least 2'):
        residual_shift(1)


def test_ddim_of_residuals_is_the_released_sampler(wide):
    eta, (x0, x, y) = roots() ** 2, drawn(3, 1, 5)
    before = np.concatenate([[0.0], eta[:-1]])
    m = np.sqrt(before / eta)
    j = before - np.sqrt(before * eta)
    k = 1 - before + np.sqrt(before * eta) - m
    np.testing.assert_allclose(k + m + j, 1, atol=1e-12)
    assert (k[0], m[0], j[0]) == (1, 0, 0)

    @jax.jit
    def moved(t):
        return diffusion.ddim().move(PATH, lambda r, t: x0 - y, x - y, t, t - 1, None, ())[0]

    for t in (14.0, 7.0, 1.0):
        i = int(t)
        np.testing.assert_allclose(moved(t) + y, k[i] * x0 + m[i] * x + j[i] * y, rtol=1e-10)
    # The last call is the picture itself, as k = 1 has it; a constant stays what it is.
    solve = jax.jit(lambda r: diffusion.sample(PATH, lambda r, t: 0 * r, r, whole, KEY))
    whole = np.arange(14, -1, -1.0)
    np.testing.assert_array_equal(solve(0 * x), 0 * x)


def test_the_gap_is_the_error_less_what_the_teacher_makes_of_it(wide):
    w, (x, y, noise), t = drawn(6, 6, seed=1), drawn(3, 3, 6), jnp.array([0.0, 1.0, 2.0])

    def surrogate(x, w, target, score):
        g = gap(lambda x, t: jnp.tanh(x @ w), x, target, PATH, t, noise, score)
        return score_distillation.surrogate(x, g).mean(), g

    slopes = jax.value_and_grad(surrogate, (0, 1), has_aux=True)
    at = jax.jit(lambda: (slopes(x, w, y, 'hsd'), slopes(y, w, y, 'hsd'), slopes(y, w, y, 'sds')))
    ((value, g), (slope, through)), ((_, none), _), ((_, biased), _) = at()
    eta = roots()[:3, None] ** 2
    c = (1 - eta) / (KAPPA * np.sqrt(eta))
    np.testing.assert_allclose(c[:, 0], [24.99, 4.209, 2.748], atol=5e-4)
    said = [np.tanh(((1 - eta) * z + KAPPA * np.sqrt(eta) * noise) @ w) for z in (x, y)]
    np.testing.assert_allclose(g, c * (x - y - (said[0] - said[1])), rtol=1e-10, atol=1e-10)
    # Nothing at the teacher's own, whatever it says; with noises of their own there would be.
    assert not np.asarray(none).any()
    assert np.abs(biased).min() > 1e-3
    np.testing.assert_allclose(slope, g / g.size, rtol=1e-10)
    np.testing.assert_allclose(value, 0.5 * np.square(g).mean(), rtol=1e-10)
    assert not np.asarray(through).any()


def test_score_distillation_pulls_at_a_perfect_sample_and_the_gap_does_not(wide):
    deviation, x, t = 0.5, 0.8, 2
    alpha, sigma = 1 - roots()[t] ** 2, KAPPA * roots()[t]
    total = (alpha * deviation) ** 2 + sigma**2
    denoise = lambda x, t: alpha * deviation**2 / total * x  # noqa: E731
    noise = drawn(200_000, 1)
    at, level = np.full_like(noise, x), jnp.full(len(noise), float(t))
    both = jax.jit(lambda: [gap(denoise, at, at, PATH, level, noise, s) for s in ('sds', 'hsd')])
    g, none = map(np.asarray, both())
    expected = alpha * sigma / total * x
    assert g.mean() == pytest.approx(expected, abs=6 * g.std() / len(g) ** 0.5)
    assert abs(expected) > 0.3
    assert not none.any()


def test_the_gap_of_a_wiener_filter_grows_with_frequency(wide):
    """Natural pictures have little power where frequencies are high."""
    place = radii(16, 16)
    power = 1 / (1e-3 + place**2)
    x, y, noise = drawn(3, 2, 16, 16, 1)

    @jax.jit
    def gap_of(gain, t):
        def denoise(x, t):
            return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(1, 2)) * gain[..., None], axes=(1, 2)).real

        return score_distillation.hsd_gap(denoise, x, y, PATH, t, noise)

    for t in (0, 1, 2):
        alpha, sigma = 1 - roots()[t] ** 2, KAPPA * roots()[t]
        gain = alpha * power / (alpha**2 * power + sigma**2)
        g = np.asarray(gap_of(gain, jnp.full(2, float(t))))
        ratio = np.abs(np.fft.fft2(g, axes=(1, 2)) / np.fft.fft2(x - y, axes=(1, 2)))[0, ..., 0]
        order = np.argsort(place, axis=None)
        found = ratio.ravel()[order]
        expected = (alpha / sigma * (1 - alpha * gain)).ravel()[order]
        np.testing.assert_allclose(found, expected, rtol=1e-7)
        assert (np.diff(found) > -1e-9).all()
        assert found[-1] > 10 * found[0]


def test_hinge_leaves_alone_what_is_right_by_one():
    real, fake = jnp.array([1.0, 2.5, 0.2]), jnp.array([-1.0, -3.0, 0.5])
    loss = adversarial.discriminator_hinge(real, fake)
    np.testing.assert_allclose(loss, [0, 0, 0.8 + 1.5], rtol=1e-6)
    slopes = jax.grad(lambda r, f: adversarial.discriminator_hinge(r, f).sum(), (0, 1))(
        real + 1e-3, fake - 1e-3
    )
    np.testing.assert_array_equal(slopes, [[0, 0, -1], [0, 0, 1]])
    np.testing.assert_array_equal(adversarial.generator_hinge(fake), -fake)


class Linear(nn.Module):
    """mu(r) = a r + b low."""

    schedule = PATH
    conditions = ('low',)

    @nn.compact
    def __call__(self, t, x, low, *, train=False):
        a, b = (self.param(name, nn.initializers.zeros, ()) for name in 'ab')
        return a * x + b * low


def examples(spec, size=B):
    return {
        name: drawn(size, *x.shape, seed=i).astype(np.float32)
        for i, (name, x) in enumerate(spec.items())
    }


def context_of(net, **more):
    return seeds.context(
        **dict(network=net, teacher=net, spec=PAIRS, tx=optax.sgd(1.0), steps=10) | more
    )


def inputs(module=None):
    module = module or Shifted(ShiftedMLP(), PATH)
    return module.example_inputs(SPEC)


def test_with_a_linear_teacher_the_gap_is_a_weight_of_the_squared_error():
    net = from_linen(Linear(), *inputs())
    teacher, batch = {'params': {'a': jnp.float32(0.6), 'b': jnp.float32(0.2)}}, examples(PAIRS)
    alpha, sigma = 1 - roots()[1] ** 2, KAPPA * roots()[1]

    def moved(**options):
        method = tad_sr(context_of(net), times=(1,), adversarial=0, **options)
        state = jax.jit(method.init)(KEY, {'teacher': teacher})
        new, metrics = jax.jit(method.step)(state, batch)
        return np.array([-new.params['network'][x] for x in 'ab']), metrics

    def slope(weight, of):
        """Of weight mean (r - s)^2 / 2, r = a z + b low at a = b = 0."""
        return np.array([(weight * -of['sample'] * of[x]).mean() for x in ('noise', 'low')])

    found, metrics = moved(reg=3.0, hsd=0)
    np.testing.assert_allclose(found, slope(6.0, batch), rtol=1e-4)
    assert set(metrics) == {'network/loss', 'network/grad_norm', 'network/regression'}
    found, metrics = moved(reg=0, hsd=2.0)
    weight = alpha / sigma * (1 - 0.6 * alpha)
    np.testing.assert_allclose(found, slope(2.0 * weight, batch), rtol=1e-4)
    size = metrics['network/gap'].total / metrics['network/gap'].count
    assert size == pytest.approx(weight * np.abs(batch['sample']).mean(), rel=1e-4)


def small(**more):
    return Shifted(ShiftedMLP(width=16, depth=2, waves=8, **more), PATH)


def noisy(net, seed=0):
    own = jax.jit(net.init)(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(own)
    moved = [x + 0.1 * drawn(*x.shape, seed=i).astype(np.float32) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope='module')
def world():
    """A network, a teacher, and a batch with what the teacher makes of its noise."""
    net = from_linen(small(), *inputs())
    teacher, batch = noisy(net), examples(PAIRS)
    own, whole = denoisers.of_network(net), times.sampling(PATH, 15)
    solve = jax.jit(
        lambda v, z, low: diffusion.sample(PATH, own.bind(v, {'low': low}), z, whole, KEY)
    )
    made = np.asarray(solve(teacher, batch['noise'], batch['low']))
    return net, teacher, {**batch, 'sample': made}


def test_solutions_of_disk_move_a_network_as_those_of_the_step_do_to_the_bit(world):
    net, teacher, batch = world
    method = tad_sr(context_of(net, tx=optax.adam(1e-2)), adversarial=0)
    state = jax.jit(method.init)(KEY, {'teacher': teacher})
    step, without = jax.jit(method.step), {k: x for k, x in batch.items() if k != 'sample'}
    ends = [step(state, given)[0].params for given in (batch, without)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    # 15 calls of the teacher beside 2 and the student's 3.
    costs = [hlo.flops(method.step, state, given) for given in (batch, without)]
    assert costs[1] > 3 * costs[0]


def test_the_discriminator_moves_first_and_the_teacher_and_the_start_stay(world):
    net, teacher, batch = world
    options = dict(features=('feature0', 'feature1'))

    # A rate that the same program takes as a number.
    further = lambda lr: optax.inject_hyperparams(optax.sgd)(lr)  # noqa: E731
    context = dataclasses.replace(context_of(net, references={'start': net}), optimizer=further)
    method = tad_sr(context, optimizer=dict(lr=0.5), **options)
    state = jax.jit(method.init)(KEY, {'teacher': teacher, 'start': teacher})
    step = jax.jit(method.step)

    def mean(metrics, name):
        return float(metrics[name].total / metrics[name].count)

    new, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], teacher['params'])
    assert set(new.params) == {'network', 'discriminator'}
    vectors = [jax.tree.leaves(s.mutables['discriminator']) for s in (state, new)]
    assert any((a != b).any() for a, b in zip(*vectors, strict=True))
    moves = state.opt_state['discriminator']
    moves = moves._replace(hyperparams={**moves.hyperparams, 'learning_rate': jnp.float32(0)})
    rests = state.replace(opt_state={**state.opt_state, 'discriminator': moves})
    still, others = step(rests, batch)
    jax.tree.map(
        np.testing.assert_array_equal, still.params['discriminator'], state.params['discriminator']
    )
    # What the student is told is of the discriminator that has moved.
    assert mean(metrics, 'discriminator/loss') == mean(others, 'discriminator/loss')
    assert mean(metrics, 'network/adversarial') != mean(others, 'network/adversarial')
    assert mean(metrics, 'network/gap') == mean(others, 'network/gap')


def test_a_step_of_both_players_by_hand(world):
    """Hinge on noised examples with one noise at one time, the last of 15 left out; signs too."""
    net, teacher, batch = world
    features, (reg, hsd, weight) = ('feature0', 'feature1'), (0.7, 0.3, 0.5)
    context = dataclasses.replace(context_of(net, references={'start': net}), optimizer=optax.sgd)
    method = tad_sr(context, reg=reg, hsd=hsd, adversarial=weight, features=features, times=(0, 2),
                    optimizer=dict(learning_rate=0.5))  # fmt: skip
    state = jax.jit(method.init)(KEY, {'teacher': teacher, 'start': teacher})
    params, heads = noisy(net, 5)['params'], TimeAwareHeads()
    d_params = jax.tree.map(
        lambda x: x + 0.05 * drawn(*x.shape, seed=7).astype(np.float32),
        state.params['discriminator'],
    )
    state = state.replace(params={'network': params, 'discriminator': d_params})
    after, metrics = jax.jit(method.step)(state, batch)
    eta = jnp.asarray(roots() ** 2, jnp.float32)

    def mixed(x, t, noise):
        e = eta[t.astype(int)][:, None, None, None]
        return (1 - e) * x + KAPPA * jnp.sqrt(e) * noise

    def says(variables, t, x, capture=()):
        return net.apply(variables, t, x, low=batch['low'], capture=capture)

    def restored(params):
        return says({'params': params}, jnp.full(B, 14.0), batch['noise']).logits

    def seen(x, t, noise):
        found = says(teacher, t, mixed(x, t, noise), features).features
        return [found[name] for name in features]

    def judged(params, stats, shown, t, **more):
        return heads.apply({'params': params, 'batch_stats': stats}, shown, t, **more)

    first, second = (jax.random.fold_in(state.step_key(), i) for i in range(2))
    shape, stats = batch['noise'].shape, state.mutables['discriminator']['batch_stats']

    def of_discriminator(d_params):
        time_key, noise_key, _ = jax.random.split(first, 3)
        t = jax.random.choice(time_key, jnp.arange(14.0), (B,))
        noise = jax.random.normal(noise_key, shape)
        pair = zip(*(seen(x, t, noise) for x in (batch['input'], restored(params))), strict=True)
        both, moved = judged(
            d_params, stats, [jnp.concatenate(x) for x in pair], jnp.concatenate([t, t]),
            update=True, mutable=['batch_stats'],
        )  # fmt: skip
        real, fake = both[:B], both[B:]
        value = jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean()
        return value, moved['batch_stats']

    def of_student(params, d_params, stats):
        time_key, noise_key, far_key, other_key, _ = jax.random.split(second, 5)
        r = restored(params)
        square = jnp.square(r - batch['sample']).mean()
        t = jax.random.choice(time_key, jnp.array([0.0, 2.0]), (B,))
        noise = jax.random.normal(noise_key, shape)
        e = eta[t.astype(int)][:, None, None, None]
        told = [says(teacher, t, mixed(x, t, noise)).logits for x in (r, batch['sample'])]
        gap = (1 - e) / (KAPPA * jnp.sqrt(e)) * (r - batch['sample'] - (told[0] - told[1]))
        far = jax.random.choice(far_key, jnp.arange(14.0), (B,))
        shown = seen(r, far, jax.random.normal(other_key, shape))
        fooled = -judged(d_params, stats, shown, far).mean()
        whole = reg * square + hsd * (r * jax.lax.stop_gradient(gap)).mean() + weight * fooled
        return whole, (square, jnp.abs(gap).mean(), fooled)

    @jax.jit
    def expected():
        (value, moved), slope = jax.value_and_grad(of_discriminator, has_aux=True)(d_params)
        wiser = jax.tree.map(lambda a, b: a - 0.5 * b, d_params, slope)
        (_, parts), slope = jax.value_and_grad(of_student, has_aux=True)(params, wiser, moved)
        return value, wiser, parts, jax.tree.map(lambda a, b: a - b, params, slope)

    value, wiser, parts, better = expected()
    names = ('discriminator/loss', 'network/regression', 'network/gap', 'network/adversarial')
    for name, wanted in zip(names, (value, *parts), strict=True):
        found = metrics[name].total / metrics[name].count
        np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=name)
    for name, wanted in (('discriminator', wiser), ('network', better)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params[name], wanted
        )


def test_what_does_not_fit_is_told(world):
    net, *_ = world
    with pytest.raises(UserError, match=r'method\.times=\(0, 15\) must be some of 0 \.\. 14'):
        tad_sr(context_of(net), times=(0, 15), adversarial=0)
    with pytest.raises(UserError, match=r"features=\('deep',\) must be some of the teacher's"):
        tad_sr(context_of(net), features=('deep',))
    thin = from_linen(Shifted(ShiftedMLP(width=6), PATH), *inputs())
    with pytest.raises(UserError, match=r"features=\('feature0',\): .* of 4, .*\(1, 6\)"):
        tad_sr(context_of(thin), features=('feature0',))
    # A head would take tokens for a map without a batch, and mix the examples.
    with pytest.raises(ValueError, match=r'reads maps .*, got \(2, 6, 8\)'):
        jax.eval_shape(TimeAwareHeads().init, KEY, [jnp.zeros((2, 6, 8))], jnp.zeros(2))
    other = from_linen(Shifted(ShiftedMLP(), residual_shift(steps=4)), *inputs())
    with pytest.raises(UserError, match='student and teacher are denoisers of one schedule'):
        tad_sr(context_of(net, teacher=other))

    class Untold(Linear):
        conditions = ()

    with pytest.raises(UserError, match="'restored' asks a network that is told 'low'"):
        restored(context_of(from_linen(Untold(), *inputs())))


def test_a_network_of_pictures_is_one_of_residuals(wide):
    t, (x, low, anchor) = jnp.array([3.0, 14.0]), drawn(3, 2, 2, 2, 1)

    class Inner(nn.Module):
        def __call__(self, t, x, low, *, train=False):
            return 2 * x + low + t[:, None, None, None]

    sigma = KAPPA * roots()[[3, 14], None, None, None]
    for anchored, y in ((False, low), (True, anchor)):
        module = Shifted(Inner(), PATH, anchored)
        told = (low, anchor) if anchored else (low,)
        found = module.apply({}, t, x, *told)
        expected = 2 * (x + y) / np.sqrt(sigma**2 + 1) + low + t[:, None, None, None] - y
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert module.conditions == (('low', 'anchor') if anchored else ('low',))
    block = dict(name='kd.models.shifted.ShiftedMLP', width=8)
    made = shifted(network=block, schedule=dict(name='kd.losses.schedule.residual_shift'))
    # At the start it says the low picture: a residual of nothing.
    variables = made.init(KEY, t, x, low)
    np.testing.assert_array_equal(made.apply(variables, t, x, low), 0 * x)


def test_a_residual_and_its_anchor_are_the_image():
    crops = dict(name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=9)
    of = dict(name='kd.data.transforms.low_resolution.low_resolution', of=crops)
    context = SourceContext('train')
    image, less = kd_config.build(of, context, where=''), residual(context, of=of)
    a, b = (source.fetch([4, 1]) for source in (image, less))
    np.testing.assert_allclose(b['input'] + b['low'], a['input'], atol=1e-6)
    assert np.abs(b['input']).mean() < 0.3 * np.abs(a['input']).mean()
    assert less.seen == "less 'low'"
    with pytest.raises(UserError, match=r"anchor='y' must be a field of the shape of 'input'"):
        residual(context, of=of, anchor='y')
    pairs = dict(name='kd.data.patches.patches', of='china_flower', scale=2, size=8, count=2)
    with pytest.raises(UserError, match=r"of the shape of 'input'; the data have \{'low': \(8, 8"):
        residual(context, of=pairs)


def test_patches_are_compared_by_nearness_and_by_looks():
    target = drawn(500, 4, 4, 1)
    found = compared(target + 0.1, target)
    assert found['psnr'] == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-9)
    assert found['frechet'] == pytest.approx(16 * 0.01, abs=1e-6)
    assert found['high_bands'] == pytest.approx(0, abs=1e-9)
    # Elsewhere in the picture, as much of it; half of it is a quarter of its power.
    assert high_band_error(np.roll(target, 1, 2), target) == pytest.approx(0, abs=1e-9)
    assert high_band_error(target / 2, target) == pytest.approx(np.log(4), abs=1e-9)
    assert compared(np.full((2, 1, 1, 1), np.nan), target) == {'finite': 0.0}


def test_a_run_makes_solutions_once_and_restores_patches(tmp_path):
    config = kd_config.load('configs/sr/tad_sr.py:cpu')
    config.stages = ('teacher', 'solutions', 'full')
    del config['reg']
    config.report.rows = (('full', 'full'),)
    config.teacher.evaluators = {}
    config.data.source.of.of.count = 32
    for name in config.stages:
        stage = config[name]
        stage.batch_size = 16
        if name != 'solutions':
            stage.steps, stage.log_every, stage.checkpoint_every = 2, 1, 2
            stage.network.network.update(width=8, depth=2)
    config.full.evaluators.patches.samples = 32
    config.full.method.adversarial = 0.0
    report = loop.run(config, tmp_path / 'run').read_text()
    assert '| full | ' in report
    # What the student has learnt from is what its teacher makes of the noise beside it.
    recipe = kd_config.parse(config)
    data = kd_config.data_of(recipe.data, recipe.stages['full'].data)
    batch = source_loader(data, recipe, tmp_path / 'run')('train').fetch(np.arange(B))
    variables = safetensors.stage_variables(tmp_path / 'run' / 'teacher', 'slow')
    module = kd_config.build(recipe.stages['teacher'].network, where='')
    own = denoisers.of_network(from_linen(module, *module.example_inputs(SPEC)))
    denoise = jax.jit(own.bind(variables, {'low': batch['low']}))
    x = batch['noise']
    for t in range(14, -1, -1):
        mu = np.asarray(denoise(x, jnp.float32(t)))
        if t:
            now, then = ((1 - r**2, KAPPA * r) for r in roots()[[t, t - 1]])
            x = then[0] * mu + then[1] * (x - now[0] * mu) / now[1]
    np.testing.assert_allclose(batch['sample'], mu, atol=1e-4)
    assert batch['noise'].std() == pytest.approx(1.98, rel=0.1)
