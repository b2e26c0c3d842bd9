"""Restoration: the loss, a beginning of another scale, a whole run, and the claim."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from kd import config as kd_config
from kd import restore
from kd.claims import seeds
from kd.errors import UserError
from kd.evaluators.restoration import restoration as restoration_probe
from kd.methods.sr.restoration import other_scale, restoration
from kd.models.imdn import IMDN
from kd.network import from_linen
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SPEC = {
    'low': jax.ShapeDtypeStruct((6, 6, 3), jnp.float32),
    'target': jax.ShapeDtypeStruct((12, 12, 3), jnp.float32),
}
LOW = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)


def network(scale=2):
    return from_linen(IMDN(scale, channels=4, blocks=1), LOW)


def batch(seed=0, size=4):
    rng = np.random.default_rng(seed)
    return {k: rng.uniform(-1, 1, (size, *x.shape)).astype(np.float32) for k, x in SPEC.items()}


def context_of(**more):
    return seeds.context(**dict(network=network(), tx=optax.sgd(1.0), spec=SPEC) | more)


def test_a_step_goes_down_the_distance_of_pictures_in_0_to_1():
    method, data = restoration(context_of(), micro_batches=2), batch()
    state = jax.jit(method.init)(jax.random.key(0))
    new, metrics = jax.jit(method.step)(state, data)

    def distance(params):
        out = network().apply({'params': params}, data['low']).logits
        away = (out + 1) / 2 - (data['target'] + 1) / 2
        return jnp.abs(away).mean(), jnp.square(away).mean()

    differentiated = jax.jit(jax.value_and_grad(distance, has_aux=True))
    (value, square), grads = differentiated(state.variables()['params'])
    moved = jax.tree.map(lambda a, b: a - b, state.variables()['params'], new.variables()['params'])
    jax.tree.map(lambda g, m: np.testing.assert_allclose(m, g, atol=1e-5), grads, moved)
    for name, expected in (('loss', value), ('squared_error', square)):
        found = metrics[name].total / metrics[name].count
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_network_of_another_scale_gives_all_but_its_last_convolution():
    other = network(3).init(jax.random.key(1))
    context = context_of(references={'start': network(3)})
    method = restoration(context)
    params = jax.jit(method.init)(jax.random.key(0), {'start': other}).variables()['params']
    fresh = jax.jit(restoration(context_of()).init)(jax.random.key(0)).variables()['params']
    assert params['upsampler_0']['kernel'].shape == (3, 3, 4, 12)
    for name in params:
        jax.tree.map(
            np.testing.assert_array_equal,
            params[name],
            (fresh if name == 'upsampler_0' else other['params'])[name],
        )
    own = {'params': fresh}
    whole = other_scale(network().init(jax.random.key(2)), own)
    np.testing.assert_array_equal(
        whole['params']['upsampler_0']['kernel'],
        network().init(jax.random.key(2))['params']['upsampler_0']['kernel'],
    )


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="stage wants pairs of pictures, 'low' and 'target'"):
        restoration(context_of(spec={'input': SPEC['low']}))
    method = restoration(context_of(network=network(3)))
    state = jax.eval_shape(method.init, jax.random.key(0))
    with pytest.raises(UserError, match=r'makes pictures of \(18, 18\) pixels, and the data have'):
        jax.eval_shape(method.step, state, batch())
    with pytest.raises(UserError, match=r"stage\.ema has no 'slow'"):
        restoration_probe(context_of(), scale=2, of='china_flower', weights='slow')


def test_a_run_trains_scores_and_restores(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder in ('train', 'test'):
        (tmp_path / 'data' / 'some' / folder).mkdir(parents=True)
        picture = rng.integers(0, 256, (24, 26, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / 'data' / 'some' / folder / 'a.png')
    config = kd_config.recipe(
        stages=('one',),
        data=dict(
            source=dict(name='kd.data.patches.patches', of='some', scale=2, size=6, count=64),
            train='train',
            validation='test',
        ),
        data_dir=str(tmp_path / 'data'),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('one', 'one'),),
            metrics=(('pictures/psnr', 'PSNR, dB'), ('pictures/bicubic_psnr', 'bicubic')),
        ),
    )
    inner = dict(name='kd.models.imdn.IMDN', scale=2, channels=4, blocks=1)
    config.one = kd_config.stage(
        network=dict(name='kd.models.restorers.over_bicubic', network=inner),
        method=dict(name='kd.methods.sr.restoration.restoration'),
        optimizer=dict(name='adam', lr=1e-3),
        evaluators={
            'pictures': dict(
                name='kd.evaluators.restoration.restoration', of='some', folder='test', scale=2
            )
        },
        steps=2,
        batch_size=8,
    )
    report = loop.run(config, tmp_path / 'run')
    row = next(line for line in report.read_text().splitlines() if line.startswith('| one'))
    psnr = float(row.split('|')[2])
    capsys.readouterr()
    folder = tmp_path / 'data' / 'some' / 'test'
    assert restore.main([f'--run={tmp_path / "run" / "one"}', f'--pictures={folder}']) == 0
    found = float(capsys.readouterr().out.splitlines()[-1].split()[1])
    assert found == pytest.approx(psnr, abs=1e-3)
