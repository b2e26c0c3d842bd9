"""DMGD: a set made image by image by a frozen model, and its recipe shrunk and run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from kd import config as kd_config
from kd.context import ReportContext
from kd.data.builders import mixtures
from kd.data.context import SourceContext
from kd.data.distilled import clusters, coreset
from kd.errors import UserError
from kd.evaluators import class_transport
from kd.losses import schedule
from kd.methods.dataset import dmgd
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen, parameter_count
from kd.parallel.mesh import make_mesh
from kd.reports import dataset
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.training import loop
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RECIPE = 'configs/dataset/dmgd.py'
PATH = schedule.discrete('linear', 1e-4, 0.02, scale=1e-3)
SETTINGS = dmgd.Settings(steps=6, sphere=False, transport=2.0, window=(1, 3), soft=(), guidance=3.0)
ROOM = 4
RNG = np.random.default_rng(0)
CENTROIDS = RNG.normal(size=(3, 2)).astype(np.float32)
MASS = np.array([0.5, 0.3, 0.2], np.float32)


def network():
    module = Denoised(VelocityMLP(width=8, depth=2, num_classes=3), PATH, 'eps')
    spec = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
    return from_linen(module, *module.example_inputs(spec))


NET = network()


# None is 0, as the last layer is at first.
SHAPES = jax.eval_shape(NET.init, jax.random.key(0))
WEIGHTS = jax.tree.map(lambda x: np.float32(0.4 * RNG.standard_normal(x.shape)), SHAPES)


def drawing(**changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    draw = dmgd.generator(denoisers.of_network(NET), settings)

    @jax.jit
    def drawn(variables, memory, count, key):
        target = dmgd.Target(jnp.int32(1), jnp.int32(2), CENTROIDS, MASS, memory, count)
        return draw(variables, target, key)

    return drawn


@pytest.fixture(scope='module')
def pulled():
    return drawing()


@pytest.fixture(scope='module')
def plain():
    return drawing(transport=0.0)


def transport(points, centroids, mass):
    """The energy after five scalings of the kernel, from the rows on."""
    cost = cdist(points, centroids)
    log_kernel, log_v = -cost / 0.1, np.zeros(len(mass))
    for _ in range(5):
        log_u = -np.log(len(points)) - logsumexp(log_kernel + log_v, axis=1)
        log_v = np.log(mass) - logsumexp(log_kernel + log_u[:, None], axis=0)
    return np.sum(np.exp(log_u[:, None] + log_kernel + log_v) * cost)


MEMORY = RNG.normal(size=(ROOM, 2)).astype(np.float32)
KEY = jax.random.key(5)


def test_without_transport_and_soft_labels_it_is_guided_ancestral_sampling(plain):
    grid = times.sampling(PATH, SETTINGS.steps)
    found, _ = plain(WEIGHTS, MEMORY, 2, KEY)

    @jax.jit
    def wanted(variables):
        noise_key, key = jax.random.split(KEY)
        z = diffusion.noise(PATH, noise_key, (1, 2), float(grid[0]))
        denoiser = denoisers.guided(denoisers.of_network(NET), SETTINGS.guidance)
        denoise = denoiser.bind(variables, {'label': jnp.ones(1, jnp.int32)})
        return diffusion.sample(PATH, denoise, z, grid, key, step=diffusion.ddim(1.0))[0]

    # Programs of their own: `tests/sampling/test_guided.py` has them in one, equal to the bit.
    np.testing.assert_allclose(found, wanted(WEIGHTS), rtol=1e-6)


def test_soft_labels_that_are_clean_change_nothing(plain):
    """a = 1 at all times: the embeddings are the labels' own."""
    soft = drawing(transport=0.0, soft=(2000.0, 1999.0), noise=3.0, semantic=3.0)
    assert np.array_equal(soft(WEIGHTS, MEMORY, 2, KEY)[0], plain(WEIGHTS, MEMORY, 2, KEY)[0])


def test_one_program_serves_memories_of_all_sizes_and_sees_no_padding(pulled):
    found = [pulled(WEIGHTS, MEMORY, n, KEY)[0] for n in range(ROOM)]
    assert pulled._cache_size() == 1
    # Each more image that is there changes what is made.
    assert len({x.tobytes() for x in map(np.asarray, found)}) == ROOM
    for n, x in enumerate(found):
        padded = np.where(np.arange(ROOM)[:, None] < n, MEMORY, np.nan).astype(np.float32)
        again, energy = pulled(WEIGHTS, padded, n, KEY)
        np.testing.assert_array_equal(x, again)
        points = np.concatenate([MEMORY[:n], np.asarray(x)[None]])
        # Logarithms of 1e4 in float32.
        assert energy == pytest.approx(transport(points, CENTROIDS, MASS), rel=1e-3)


def test_transport_lowers_the_energy(plain, pulled):
    keys = jax.random.split(jax.random.key(9), 8)
    before, after = ([float(f(WEIGHTS, MEMORY, 0, k)[1]) for k in keys] for f in (plain, pulled))
    assert np.mean(after) < 0.95 * np.mean(before)


def test_another_class_is_another_and_any_of_them():
    known = np.array([7, 3, 9])
    keys = jax.random.split(jax.random.key(0), 200)
    found = np.asarray(jax.vmap(lambda key: dmgd.other(key, 1, known))(keys))
    assert set(found.tolist()) == {7, 9}
    assert 60 < (found == 7).sum() < 140
    assert dmgd.other(keys[0], 0, np.array([4])) == 4


def test_clusters_are_the_mean_for_one_and_have_ever_less_transport():
    x = RNG.normal(size=(60, 2)) * [1.0, 3.0]
    mean, mass = coreset.clusters(x, 1)
    np.testing.assert_allclose(mean[0], x.mean(0), atol=1e-6)
    assert mass == [1.0]
    squares = []
    for count in (1, 2, 4, 8):
        centres, mass = coreset.clusters(x, count)
        away = np.square(x[:, None] - centres).sum(-1)
        nearest = away.argmin(1)
        np.testing.assert_allclose(mass, np.bincount(nearest, minlength=count) / 60, rtol=1e-6)
        squares.append(away.min(1).mean())
    assert squares[0] == pytest.approx(x.var(0).sum(), rel=1e-6)
    assert (np.diff(squares) < 0).all()
    with pytest.raises(ValueError, match='61 clusters of 60 examples'):
        coreset.clusters(x, 61)


def test_scores_of_a_set_by_hand():
    made = {'input': np.array([[0.0], [10.0]]), 'label': np.array([0, 1])}
    data = {'input': np.array([[1.0], [-3.0], [11.0], [4.0]]), 'label': np.array([0, 0, 1, 1])}
    found = class_transport.scores(made, data)
    assert found == pytest.approx(((2 + 3.5) / 2, 0.75))
    assert class_transport.scores(made, data, most=1).w1 == pytest.approx(1.0)
    assert class_transport.novelty([[1.0]], data['input'], [[2.0]]) == 0
    assert class_transport.novelty([[1.5]], data['input'], [[2.0]]) == pytest.approx(0.5)


# The recipe


def shrunk(together=2):
    config = kd_config.load(f'{RECIPE}:cpu')
    with config.unlocked():
        config.mesh.update(data=1)
        config.stages = ('teacher', 'clusters', 'distilled')
        for name in ('random', 'plain', 'early', 'both'):
            del config[name]
        config.report.rows = (('DMGD', 'distilled'),)
        config.teacher.network.network.update(width=16, depth=2)
        config.teacher.update(steps=4, batch_size=32, log_every=2, checkpoint_every=4)
        config.clusters.writers.clusters.clusters = 3
        config.distilled.method.update(steps=4, window=(1, 2), images_per_class=2)
        config.distilled.update(steps=2 * 4 // together, batch_size=together)
        config.distilled.evaluators.validation.most = 40
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory, quick_compilation):
    workdir = tmp_path_factory.mktemp('dmgd') / 'run'
    with quick_compilation():
        return loop.run(shrunk(), workdir), workdir


def test_the_recipe_makes_a_set_without_an_optimiser_and_tells_of_it(finished):
    report, workdir = finished
    record = json.loads((workdir / 'report.json').read_text())
    row = record['DMGD']
    assert row['validation/w1'] > 0
    assert 0 <= row['validation/nearest'] <= 1
    assert row['validation/novelty'] > 0
    assert '| DMGD |' in report.read_text()
    assert (workdir / 'distilled' / 'figures').is_dir()
    config = kd_config.load(f'{RECIPE}:cpu')
    for name in ('plain', 'distilled', 'both', 'early'):
        assert not config[name].optimizer
        assert not config[name].network


def test_clusters_on_disk_are_those_of_the_classes(finished):
    _, workdir = finished
    with np.load(clusters.file_of(workdir / 'clusters')) as stored:
        centroids, mass, made_of = (stored[x] for x in ('centroids', 'mass', 'made_of'))
    source = mixtures.quadrant_points(SourceContext('train'))
    data = source.fetch(np.arange(len(source)))
    wanted = coreset.clusters(data['input'][data['label'] == 2], 3)
    np.testing.assert_allclose(centroids[2], wanted[0], atol=1e-5)
    np.testing.assert_allclose(mass[2], wanted[1], atol=1e-6)
    with pytest.raises(UserError, match=r'clusters\.npz is of other data'):
        clusters.read(workdir / 'clusters', 'something')
    with pytest.raises(UserError, match='holds no clusters; it must be a finished stage'):
        clusters.read(workdir / 'teacher', str(made_of))


def test_a_set_does_not_depend_on_batches_and_every_image_is_made_once(finished):
    """All classes in one step, by hand, against the run that made two at a time in some order."""
    _, workdir = finished
    mesh = make_mesh({'data': 1})
    recipe = kd_config.parse(shrunk())
    made = dataset.restore(ReportContext(recipe, workdir, mesh), 'distilled')
    np.testing.assert_array_equal(made.label, [0, 0, 1, 1, 2, 2, 3, 3])
    assert len(np.unique(made.input, axis=0)) == 8
    stage = prepare(kd_config.parse(shrunk(together=4)), 'distilled', mesh, workdir)
    batch = stage.context.source('train').fetch([2, 0, 3, 1])
    step = jax.jit(stage.method.step)
    state = jax.jit(stage.method.init)(stage.key(), stage.frozen)
    for _ in range(2):
        state, metrics = step(state, batch)
    variables = state.variables()
    np.testing.assert_allclose(variables['params']['images'], made.input, rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(variables['count'], 2)
    energies = [
        transport(np.asarray(variables['made'][c]), points, mass)
        for c, points, mass in zip(batch['label'], batch['centroids'], batch['mass'], strict=True)
    ]
    found = metrics['transport']
    assert float(found.total / found.count) == pytest.approx(np.mean(energies), rel=1e-3)
    # One more finds no room and changes nothing.
    full = step(state, batch)[0].variables()
    np.testing.assert_array_equal(full['params']['images'], variables['params']['images'])


def test_what_does_not_fit_is_said(finished):
    def said(change):
        config = shrunk()
        with config.unlocked():
            change(config)
        with pytest.raises(UserError) as caught:
            prepare(kd_config.parse(config), 'distilled', make_mesh({'data': 1}))
        return str(caught.value)

    assert '8 images of 4 classes need a batch_size that divides 4, and 8 / batch_size steps' in (
        said(lambda c: c.distilled.update(steps=3))
    )
    assert 'distilled.method.guidance must be a number that is finite' in said(
        lambda c: c.distilled.method.update(guidance=float('inf'))
    )
    assert 'window is (first, last) with first <= last' in said(
        lambda c: c.distilled.method.update(window=(3, 1))
    )
    assert "unexpected keyword argument 'rho'" in said(lambda c: c.distilled.method.update(rho=1.0))
    assert "names the stage 'teacher', which has no writer" in said(
        lambda c: c.distilled.data.source.update(stage='teacher')
    )
    assert 'told has 2 classes, and quadrants has 4' in said(
        lambda c: c.distilled.data.source.update(told=(1, 2))
    )
    assert 'data.source must be kd.data.distilled.clusters.classes' in said(
        lambda c: setattr(c.distilled, 'data', {})
    )


def test_full_scale_is_the_released_setting_and_network():
    config = kd_config.load(f'{RECIPE}:imagewoof,ipc=50')
    how = config.distilled.method.to_dict()
    del how['name']
    assert how.pop('images_per_class') == 50
    settings = dmgd.Settings(**how)
    assert settings == dmgd.Settings(
        transport=0.05, guided_channels=3, embedding='emb/class_embedder'
    )
    assert (settings.steps, settings.guidance, settings.window) == (50, 4.0, (30, 45))
    assert config.distilled.steps == 50
    assert config.report.protocol.epochs == 1_500
    assert len(config.distilled.data.source.told) == 10
    module = kd_config.build(config.pretrained.dit.network.to_dict(), where='network')
    spec = {'input': jax.ShapeDtypeStruct((32, 32, 4), jnp.float32)}
    net = from_linen(module, *module.example_inputs(spec))
    count = parameter_count(jax.eval_shape(net.init, jax.random.key(0)))
    assert count == pytest.approx(675e6, rel=0.02)
    whole = kd_config.load(f'{RECIPE}:imagenet,ipc=10')
    assert whole.distilled.steps * whole.distilled.batch_size == 10_000
    with pytest.raises(UserError, match="no variant 'imagenette,ipc=7'"):
        kd_config.load(f'{RECIPE}:imagenette,ipc=7')
