"""Stages of few steps on whole pictures: each against its equation, tile by tile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd import config as kd_config
from kd import process, resample, restore
from kd.data import catalogue
from kd.data.context import source_loader
from kd.errors import UserError
from kd.evaluators import restoration, restorers
from kd.evaluators.restorers import Asked, of_stage
from kd.io import finished, safetensors
from kd.io.coder import Coder
from kd.networks import build_network

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def begun(config, folder, monkeypatch, *names):
    """Stages as if they had been trained, with random weights: [(network, variables)]."""
    for name in config.stages:
        network = config[name].get('network', {})
        for block in (network, network.get('network', {})):
            if 'width' in block:
                block.width, block.depth = 8, 1
    (folder / 'config.json').write_text(config.to_json())
    parsed = kd_config.parse(kd_config.to_plain(config))
    parsed = dataclasses.replace(parsed, data_dir=catalogue.DESCRIBED)
    made = []
    for name in names:
        stage = parsed.stages[name]
        data = parsed.data if 'stage' in stage.data.get('source', {}) else stage.data
        source = source_loader(kd_config.data_of(parsed.data, data), parsed, None)('train')
        network = build_network(stage.network, source, where=name)
        rng = np.random.default_rng(len(name))
        abstract = jax.eval_shape(network.init, jax.random.key(0))
        variables = jax.tree.map(
            lambda x, rng=rng: 0.2 * rng.standard_normal(x.shape).astype(np.float32), abstract
        )
        made.append((network, variables))
    kept = {folder / name: variables for name, (_, variables) in zip(names, made, strict=True)}
    monkeypatch.setattr(finished, 'read_done', lambda directory: {'step': 1})
    monkeypatch.setattr(safetensors, 'stage_variables', lambda place, average: kept[place])
    return made


def low_of(height, width):
    rng = np.random.default_rng(height)
    return rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)


def noise_of(seed, height, width, places, channels=1):
    """Of a low picture, places x places numbers for each of its pixels."""
    shape = (1, height, width, places * places * channels)
    z = np.asarray(jax.random.normal(jax.random.key(seed), shape))
    z = z.reshape(height, width, places, places, channels).transpose(0, 2, 1, 3, 4)
    return z.reshape(1, height * places, width * places, channels)


def by_squares(low, noise, large, one):
    """Squares of 8 x 8 side by side, colour by colour, each of `one(large, noise)`."""
    found = np.empty(large.shape)
    for top in range(0, large.shape[1], 8):
        for left in range(0, large.shape[2], 8):
            at = (slice(None), slice(top, top + 8), slice(left, left + 8))
            for colour in range(3):
                found[(*at, colour)] = one(large[(*at, [colour])], noise[at])[..., 0]
    return found


def test_a_student_of_oftsr_is_its_start_and_one_velocity(tmp_path, monkeypatch, capsys):
    config = kd_config.load('configs/sr/oftsr.py:cpu')
    [(network, variables)] = begun(config, tmp_path, monkeypatch, 'student')
    made = of_stage(tmp_path / 'student', Asked(time=0.9, seed=3))
    low = low_of(4, 6)
    large, noise = low.repeat(4, 1).repeat(4, 2), noise_of(3, 4, 6, 4)
    apply = jax.jit(network.apply)

    def one(left, z):
        x0 = np.float32(np.sqrt(1 - 0.3**2)) * left + np.float32(0.3) * z
        t = jnp.full(1, 0.9)
        return x0 + apply(variables, t, t, x0, low=left).logits

    wanted = by_squares(low, noise, large, one)
    np.testing.assert_allclose(made.restore(low), wanted, atol=2e-5)
    # Sides that tiles do not divide, and a picture that is smaller than one.
    assert made.restore(low_of(3, 5)).shape == (1, 12, 20, 3)
    assert made.restore(low_of(1, 3)).shape == (1, 4, 12, 3)
    # By the command, from one file to another, and of a folder made small as the data were.
    picture = restoration.to_bytes(low[0])
    (tmp_path / 'pictures').mkdir()
    Image.fromarray(picture.repeat(4, 0).repeat(4, 1)).save(tmp_path / 'pictures' / 'a.png')
    Image.fromarray(picture).save(tmp_path / 'low.png')
    flags = [f'--run={tmp_path / "student"}', '--time=0.9', '--seed=3']
    files = [f'--input={tmp_path / "low.png"}', f'--output={tmp_path / "high.png"}']
    assert restore.main([*flags, *files]) == 0
    high = np.asarray(Image.open(tmp_path / 'high.png')) / 127.5 - 1
    expected = np.asarray(made.restore(picture[None] / np.float32(127.5) - 1))[0]
    assert np.abs(high - np.clip(expected, -1, 1)).max() <= 0.5 / 127.5 + 1e-5
    small, target = made.degraded(picture.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(small, picture)
    assert target.shape == (16, 24, 3)
    capsys.readouterr()
    monkeypatch.setattr(restoration, 'score', lambda x, y, **_: restoration.Score(x.shape[0], 0.5))
    assert restore.main([*flags, f'--pictures={tmp_path / "pictures"}']) == 0
    assert capsys.readouterr().out.endswith('PSNR 16.0000 SSIM 0.5000\n')


def test_a_student_of_tad_sr_adds_a_residual(tmp_path, monkeypatch):
    config = kd_config.load('configs/sr/tad_sr.py:cpu')
    [(network, variables)] = begun(config, tmp_path, monkeypatch, 'full')
    made = of_stage(tmp_path / 'full', Asked())
    low, path = low_of(2, 4), network.module.schedule
    # Squares are enlarged each by itself, as those of the data were.
    halves = [low[:, :, :2], low[:, :, 2:]]
    large = [resample.resize(x.astype(np.float64), (8, 8), 'torch') for x in halves]
    large = np.concatenate(large, 2).astype(np.float32)
    apply = jax.jit(network.apply)
    assert path.high == 14

    def one(left, z):
        # kappa sqrt(eta_T) = 2 sqrt(.99) of noise.
        r_t = np.float32(2 * 0.99) * z
        return left + apply(variables, jnp.full(1, 14.0), r_t, low=left).logits

    wanted = by_squares(low, noise_of(0, 2, 4, 4), large, one)
    np.testing.assert_allclose(made.restore(low), wanted, atol=2e-4)


def test_a_decoder_mends_the_one_call_of_its_teacher(tmp_path, monkeypatch):
    config = kd_config.load('configs/sr/yonos_sr.py:cpu')
    both = begun(config, tmp_path, monkeypatch, 'decoder', 'distilled')
    (decoder, mend), (network, variables) = both
    made = of_stage(tmp_path / 'decoder', Asked())
    low, path = low_of(4, 2), network.module.schedule
    denoise, repair = jax.jit(network.apply), jax.jit(decoder.apply)

    def one(left, z):
        x = np.asarray(path.sigma(jnp.float32(path.high))) * z
        said = denoise(variables, jnp.full(1, path.high), x, low=left).logits
        return repair(mend, said).logits

    wanted = by_squares(low, noise_of(0, 4, 2, 4), low.repeat(4, 1).repeat(4, 2), one)
    np.testing.assert_allclose(made.restore(low), wanted, atol=2e-4)
    assert made.scale == 4


def test_latents_are_of_the_autoencoder_that_is_named(tmp_path, monkeypatch):
    config = kd_config.load('configs/sr/tad_sr.py')
    for name in ('teacher', 'reg', 'full'):
        config[name].network.network = dict(name='kd.models.shifted.ShiftedMLP', width=8, depth=1)
    config.data.source.of.fields = dict(input=(8, 8, 3), anchor=(8, 8, 3), low=(8, 8, 3))
    [(network, variables)] = begun(config, tmp_path, monkeypatch, 'reg')
    halved = Coder(lambda x: 0.5 * x[:, ::4, ::4], lambda z: 2 * z.repeat(4, 1).repeat(4, 2))
    asked = []
    monkeypatch.setattr(restorers, 'coder', lambda *told: asked.append(told) or halved)
    made = of_stage(tmp_path / 'reg', Asked(scale=4, autoencoder='hf:VQ'))
    assert asked == [('hf:VQ', 64)]
    low = low_of(8, 8)
    anchor = 0.5 * resample.resize(low.astype(np.float64), (32, 32), 'torch')[:, ::4, ::4]
    r_t = np.float32(2 * 0.99) * noise_of(0, 8, 8, 1, channels=3)
    said = network.apply(variables, jnp.full(1, 14.0), r_t, low=low, anchor=np.float32(anchor))
    wanted = 2 * (anchor + np.asarray(said.logits)).repeat(4, 1).repeat(4, 2)
    np.testing.assert_allclose(made.restore(low), wanted, atol=2e-4)
    with pytest.raises(UserError, match=r'is of latents; name their autoencoder, --autoencoder'):
        of_stage(tmp_path / 'reg', Asked(scale=4))
    with pytest.raises(UserError, match=r'is of latents; give --scale, a whole number'):
        of_stage(tmp_path / 'reg', Asked(autoencoder='hf:VQ'))


@pytest.mark.parametrize(
    ('recipe', 'stage', 'flags', 'told'),
    [
        ('sr/oftsr.py:cpu', 'student', ['--steps=4'], 'is a student of one call; leave --steps'),
        ('sr/oftsr.py:cpu', 'flow', ['--scale=2'], 'flow enlarges by 4, not by --scale=2.'),
        ('sr/oftsr.py:cpu', 'flow', ['--time=1.5'], '--time between 0 and 1'),
        ('sr/oftsr.py:cpu', 'flow', ['--autoencoder=hf:x'], 'is of pixels; leave --autoencoder'),
        ('sr/yonos_sr.py:cpu', 'decoder', ['--steps=0'], '--steps is from 1'),
        ('diffusion/ppcl.py:cpu', 'teacher', [], 'has no network of super-resolution'),
    ],
)
def test_what_a_stage_cannot_be_asked_is_told(recipe, stage, flags, told, tmp_path, monkeypatch,
                                              capsys):  # fmt: skip
    names = dict.fromkeys((stage, 'distilled' if stage == 'decoder' else stage))
    begun(kd_config.load(f'configs/{recipe}'), tmp_path, monkeypatch, *names)
    flags = [f'--run={tmp_path / stage}', '--input=a.png', *flags]
    assert process.entry(lambda: restore.main(flags)) == process.EXIT_USER
    assert told in capsys.readouterr().err
