"""Transformers of text and latents together, and of videos, against diffusers; causal videos."""

import diffusion_files
import latent_cases
import numpy as np
import pytest
from latent_cases import (
    TEXT,
    TIMES,
    VIDEO,
    applied,
    module_of,
    said,
    variables_of,
)

from kd.models import wan

pytestmark = pytest.mark.usefixtures('compiled_quickly')
NAMES = ('sd3', 'sd35', 'flux', 'qwen', 'wan')


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
