"""Any image network as a denoiser: what it is told of the noise, and what its output means."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.losses.schedule import Kind, Schedule, convert
from kd.models.adapters import Adapted
from kd.ranges import Count, Positive

Precondition = Literal['none', 'edm', 'edm_shifted']


class Denoised(nn.Module):
    """mu(t, x_t) = E[x0 | x_t], in the parameters of `inner`; see `denoiser`.

    Attributes:
      inner: the network F, `F(c, x, **condition)` with c [B] what it is told of the noise, or a
        network of two times, `F(c, c, x, **condition)`.
      schedule: of the noise.
      kind: what F predicts; of the precondition 'none' alone.
      precondition: see `denoiser`.
      sigma_data: deviation of the data, of the preconditions of EDM.
    """

    inner: nn.Module
    schedule: Schedule
    kind: Kind = 'x0'
    precondition: Precondition = 'none'
    sigma_data: float = 0.5

    @property
    def num_classes(self) -> int | None:
        """Of the condition `label`, whose null is this number; None without one."""
        return getattr(self.inner, 'num_classes', None)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is conditioned on."""
        own = ('label',) if self.num_classes is not None else ()
        return tuple(getattr(self.inner, 'conditions', own))

    @property
    def variance(self) -> bool:
        """Whether F says something about variances too."""
        return self.precondition == 'none' and getattr(self.inner, 'variance', False)

    @property
    def adapter(self) -> Any:
        """What is trained beside F; None where F is trained itself."""
        return getattr(self.inner, 'adapter', None)

    @property
    def causal(self) -> int:
        """Frames of a block of videos that F makes block by block; 0 for none."""
        return getattr(self.inner, 'causal', 0)

    def setup(self) -> None:
        nn.share_scope(self, self.inner)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        x = spec['input']
        time = jax.ShapeDtypeStruct((1,), x.dtype)
        return time, jax.ShapeDtypeStruct((1, *x.shape), x.dtype)

    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        train: bool = False,
        variances: bool = False,
        **condition: jax.Array,
    ) -> jax.Array:
        """E[x0 | x_t] of times [B] and noised examples [B, ...], float32 at least.

        With `variances` a network of such `variance` says in as many further channels where between
        the least and the most, 0 and 1, the logarithm of the variance of a step lies.
        """
        asked = self.asked(t, x)
        if not variances:
            return self.answered(self.inner(*asked, train=train, **condition), t, x)
        both = self.inner(*asked, train=train, variances=True, **condition)
        raw, share = jnp.split(both, 2, axis=-1)
        x0 = self.answered(raw, t, x)
        return jnp.concatenate([x0, 0.5 * (share + 1).astype(x0.dtype)], axis=-1)

    def say(self, t: jax.Array, x: jax.Array, memory: Any, number: jax.Array, **told) -> jax.Array:
        """E[x0 | x_t] of block `number` [B, causal, ...], of a causal F with its memory."""
        return self.answered(self.inner.say(*self.asked(t, x), memory, number, **told), t, x)

    def remember(self, x: jax.Array, memory: Any, number: jax.Array, **told) -> Any:
        """Memory with that of a clean block [B, causal, ...]."""
        still = jnp.full(x.shape[:1], self.schedule.low, x.dtype)
        return self.inner.remember(*self.asked(still, x), memory, number, **told)

    def empty(self, z: jax.Array) -> Any:
        """Memory before the first block of videos like z [B, T, ...]."""
        return self.inner.empty(z)

    def asked(self, t: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        """What F is given: what it is told of the noise, once or twice, and its input."""
        told = self.schedule.condition(t).astype(x.dtype)
        own = self.inner.base if isinstance(self.inner, Adapted) else self.inner
        two_times = 's' in inspect.signature(type(own).__call__).parameters
        times = (told, told) if two_times else (told,)
        if self.precondition == 'none':
            return (*times, x)
        clean, _, total = self._scales(t, x)
        return (*times, (clean / total).astype(x.dtype))

    def answered(self, raw: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
        """E[x0 | x_t] by what F says."""
        if self.precondition == 'none':
            return convert(self.schedule, raw, x, t, self.kind, 'x0')
        (clean, noise, total), data = self._scales(t, x), self.sigma_data
        # Shifted, the network is the identity at the least noise there is.
        apart = noise - (self.schedule.low if self.precondition == 'edm_shifted' else 0.0)
        return data**2 / (apart**2 + data**2) * clean + apart * data / total * raw

    def _scales(self, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x_t and its noise where the data have the factor 1, and the deviation of both."""
        alpha, sigma = self.schedule.coefficients(t, x)
        noise = sigma / alpha
        return x / alpha, noise, jnp.sqrt(noise**2 + self.sigma_data**2)


def denoiser(
    *,
    network: Mapping[str, Any],
    schedule: Mapping[str, Any],
    kind: Kind = 'x0',
    precondition: Precondition = 'none',
    sigma_data: Positive = 0.5,
    num_classes: Count | None = None,
) -> Denoised:
    """A denoiser, whose variables are those of the network in it.

    | precondition | mu(x_t), with y = x_t / alpha, s = sigma / alpha, d = sigma_data |
    |---|---|
    | none | what F(c(t), x_t) says of x0, by its `kind` |
    | edm | d^2 / (s^2 + d^2) y + s d / sqrt(s^2 + d^2) F(c(t), y / sqrt(s^2 + d^2)) |
    | edm_shifted | the same, with s less its least value outside of the roots |

    Args:
      network: block of F, of this file's kind or of a flow's.
      schedule: block of one of `kd.losses.schedule`.
      kind: see `kd.losses.schedule.KINDS`.
      precondition: see above; 'edm' is arXiv:2206.00364, eq. 7, 'edm_shifted' that of consistency
        models (arXiv:2303.01469, appendix C) up to its root.
      sigma_data: d.
      num_classes: of F; None for a network without classes.
    """
    given = {} if num_classes is None else {'num_classes': num_classes}
    inner = config_lib.build({**network, **given}, where='network.network')
    path = config_lib.build(schedule, where='network.schedule')
    return Denoised(inner, path, kind, precondition, sigma_data)
