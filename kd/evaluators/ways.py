"""Ways to restore images by networks of few steps, out of what is left of them and of noise.

    way = of_denoiser(network, steps=1)
    image = jax.jit(way)(variables, {'low': low}, noise)

`fields` are those of a batch that the network is told, [B, ...] by name; `noise` [B, ...] is of
unit deviation, and images are like it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.data.patches import LOW
from kd.evaluators.flow_samples import advance_of
from kd.losses.rectified import vp_mix
from kd.models.shifted import ANCHOR
from kd.network import Network
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.sampling.flow import time_grid
from kd.sampling.velocity import fields_of, velocity_function
from kd.state import PyTree

# (variables, fields, noise) -> images
Way = Callable[[PyTree, Mapping[str, jax.Array], jax.Array], jax.Array]


def of_flow(network: Network, *, share: float, steps: int) -> Way:
    """Steps of Euler of a flow that begins at `low` with a share of noise, each a call."""
    advance = jax.jit(advance_of(network, 'euler', 1.0))

    def way(variables, fields, noise):
        x, told = vp_mix(fields[LOW], noise, share), fields_of(network, fields)
        for s, t in itertools.pairwise(time_grid(steps)):
            x = advance(variables, s, t, x, fields.get('label'), told)
        return x

    return way


def of_one_call(network: Network, *, share: float, time: float) -> Way:
    """x0 + v(x0, t): the one call of a student of OFTSR, see `kd.methods.sr.oftsr`."""

    @jax.jit
    def way(variables, fields, noise):
        x0, then = vp_mix(fields[LOW], noise, share), jnp.full(len(noise), time)
        told = fields_of(network, fields)
        return x0 + velocity_function(network, variables, fields.get('label'), told=told)(
            then, then, x0
        )

    return way


def of_denoiser(
    network: Network,
    *,
    steps: int,
    trained_by: Mapping[str, Any] | None = None,
    mend: Network | None = None,
) -> Way:
    """Steps of DDIM of a denoiser that is told `low`, from noise alone, each a call.

    Args:
      network: the denoiser.
      steps: its calls.
      trained_by: block of the method that trained it.
      mend: what is asked of the result, see `kd.methods.sr.yonos_sr.decoder_tuning`; variables are
        then {'of': those of the denoiser, 'mend': those of this network}.
    """
    own = denoisers.of_network(network, trained_by)
    path = own.schedule
    grid = times.grid(times.even(path), steps, last=1 / steps)

    @jax.jit
    def way(variables, fields, noise):
        of = variables if mend is None else variables['of']
        x = path.mix(jnp.zeros_like(noise), noise, jnp.float32(path.high))
        denoise = own.bind(of, denoisers.conditions(network, fields))
        # Unrolled: convolutions in loops are slow on CPU.
        made = diffusion.sample(path, denoise, x, grid, jax.random.key(0), unroll=True)
        return made if mend is None else mend.apply(variables['mend'], made).logits

    return way


def of_residuals(network: Network, *, steps: int) -> Way:
    """Steps of a denoiser of residuals (`kd.models.shifted`), from the noisiest time on."""
    own = denoisers.of_network(network)
    path, grid = own.schedule, times.sampling(own.schedule, steps)
    anchor = anchor_of(network)

    @jax.jit
    def way(variables, fields, noise):
        z = path.mix(jnp.zeros_like(noise), noise, jnp.float32(path.high))
        denoise = own.bind(variables, denoisers.conditions(network, fields))
        made = diffusion.sample(path, denoise, z, grid, jax.random.key(0))
        return fields[anchor] + made

    return way


def anchor_of(network: Network) -> str:
    """The field that residuals are added to."""
    return ANCHOR if ANCHOR in getattr(network.module, 'conditions', ()) else LOW
