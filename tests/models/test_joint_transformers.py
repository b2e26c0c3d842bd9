"""Transformers of text and latents together, and of videos, against diffusers; causal videos."""

import diffusion_files
import jax
import jax.numpy as jnp
import latent_cases
import numpy as np
import pytest
from latent_cases import (
    FRAMES,
    TEXT,
    TIMES,
    VIDEO,
    applied,
    module_of,
    said,
    variables_of,
)

from kd.losses import schedule
from kd.models import wan
from kd.models.denoiser import Denoised
from kd.network import from_linen
from kd.sampling import causal

pytestmark = pytest.mark.usefixtures('compiled_quickly')
NAMES = ('sd3', 'sd35', 'flux', 'qwen', 'lumina2', 'z_image', 'wan')


@pytest.mark.parametrize('name', NAMES)
def test_a_directory_is_read_and_says_what_diffusers_does(name, tmp_path):
    latent_cases.check_directory(name, tmp_path)


@diffusion_files.asked_anew
@pytest.mark.parametrize('name', NAMES)
def test_diffusers_says_so(name, tmp_path):
    latent_cases.check_anew(name, tmp_path)


def test_a_causal_video_does_not_see_what_comes():
    whole = module_of('wan')
    causal = wan.Wan(**{**{k: getattr(whole, k) for k in (
        'width', 'depth', 'heads', 'hidden', 'context', 'epsilon')}, 'causal': 2})  # fmt: skip
    apply, variables = applied(causal), variables_of('wan')
    later = VIDEO.copy()
    later[:, 2:] += 1
    first = apply(variables, TIMES, VIDEO, text=TEXT)
    other = apply(variables, TIMES, later, text=TEXT)
    # Blocks of two frames: the first two see each other alone.
    np.testing.assert_array_equal(first[:, :2], other[:, :2])
    assert np.abs(first[:, 2:] - other[:, 2:]).min() > 0
    assert np.abs(said('wan')[:, :2] - first[:, :2]).max() > 0.01
    # Times of frames, all equal, are those of videos.
    each = apply(variables, np.repeat(TIMES[:, None], 3, 1), VIDEO, text=TEXT)
    np.testing.assert_allclose(each, first, rtol=1e-5, atol=1e-5)


def test_blocks_with_a_memory_say_what_the_whole_says_of_clean_blocks_before():
    """Of each block the whole, with the clean ones at time 0 before it and its own at its time."""
    whole = module_of('wan')
    settings = {k: getattr(whole, k) for k in ('width', 'depth', 'heads', 'hidden', 'context')}
    inner = wan.Wan(**settings, causal=2)
    module = Denoised(inner, schedule.flow(), 'flow')
    videos = np.concatenate([VIDEO, VIDEO[:, :1] - 0.5], axis=1)
    variables, noisy = variables_of('wan'), np.float32(0.7)
    network = from_linen(module, *module.example_inputs({'input': jax.ShapeDtypeStruct(
        videos.shape[1:], np.float32)}))  # fmt: skip
    made = causal.of_network(network, where='here')
    assert made.frames == 2

    @jax.jit
    def by_blocks(variables, z):
        cache, said = made.empty(z, {'text': TEXT, 'null_text': TEXT}), []
        for block in (z[:, :2], z[:, 2:]):
            said.append(made.denoise(variables, cache, block, np.full(2, noisy)))
            cache = made.remember(variables, cache, block)
        return jnp.concatenate(said, axis=1)

    found = by_blocks(variables, videos)
    for block in (0, 1):
        t = np.zeros((2, 4), np.float32)
        t[:, 2 * block : 2 * block + 2] = 1_000 * noisy
        flow = applied(inner)(variables, t, videos, text=TEXT)
        at = slice(2 * block, 2 * block + 2)
        np.testing.assert_allclose(
            found[:, at], (videos - noisy * flow)[:, at], rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match='makes no videos of 3 frames block by block'):
        inner.empty(VIDEO)


def test_a_picture_is_a_video_of_one_frame():
    module, variables = module_of('wan_autoencoder'), variables_of('wan_autoencoder')

    @jax.jit
    def asked(variables, frames):
        both, first = (module.apply(variables, x, method='encode')[0] for x in (
            frames, frames[:, :1]
        ))  # fmt: skip
        shown = (module.apply(variables, x, method='decode') for x in (both, both[:, :1]))
        return both, first, *shown, module.unscaled(module.scaled(both))

    both, first, videos, pictures, again = asked(variables, FRAMES[:1, :5])
    np.testing.assert_allclose(first, both[:, :1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pictures, videos[:, :1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again, both, rtol=1e-4, atol=1e-5)
