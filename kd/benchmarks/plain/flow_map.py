"""Flow-map losses as their papers state them, for one example, and vmapped; written plainly by us.

Self-distillation by the Lagrangian, Eulerian and progressive equations (arXiv:2505.18825), in terms
of the map X_{s,t}(x) = x + (t - s) v(s, t, x), and MeanFlow (arXiv:2505.13447).
"""

import jax
import jax.numpy as jnp

stopped = jax.lax.stop_gradient


def lsd(v, s, t, x, dx):
    end, velocity = jax.jvp(lambda t: x + (t - s) * v(s, t, x), (t,), (1.0,))
    return velocity - stopped(v(t, t, end))


def esd(v, s, t, x, dx):
    field = stopped(v(s, s, x))
    _, ds = jax.jvp(lambda s: x + (t - s) * v(s, t, x), (s,), (1.0,))
    _, along = jax.jvp(lambda x: x + (t - s) * v(s, t, x), (x,), (field,))
    return ds + stopped(along)


def psd_midpoint(v, s, t, x, dx):
    u = (s + t) / 2
    first = v(s, u, x)
    return v(s, t, x) - stopped((first + v(u, t, x + (u - s) * first)) / 2)


def meanflow(v, s, t, x, dx):
    velocity, along = jax.jvp(v, (s, t, x), (1.0, 0.0, dx))
    return velocity - stopped(dx + (t - s) * along)


LOSSES = {'lsd': lsd, 'esd': esd, 'psd_midpoint': psd_midpoint, 'meanflow': meanflow}


def loss(name, network, weight, diagonal, params, key, x0, x1):
    """Mean over a batch of exp(-w) ||residual||^2 + w, its first examples those of flow matching.

    Args:
      name: of `LOSSES`.
      network, weight: linen modules of v(s, t, x) and w(s, t), on batches.
      diagonal: how many examples are of flow matching.
      params: {'network', 'weight'}, variables of both.
      key: of the times.
      x0, x1: noise and data, [B, ...].
    """
    first, second, _ = jax.random.split(key, 3)
    same = jax.random.uniform(first, (diagonal,))
    pair = jnp.sort(jax.random.uniform(second, (2, len(x0) - diagonal)), axis=0)
    s, t = jnp.concatenate([same, pair[0]]), jnp.concatenate([same, pair[1]])

    def v(s, t, x):
        return network.apply(params['network'], s[None], t[None], x[None])[0]

    def of_one(residual):
        def error(s, t, x0, x1):
            dx = x1 - x0
            w = weight.apply(params['weight'], s[None], t[None])[0]
            return jnp.exp(-w) * jnp.sum(residual(v, s, t, x0 + s * dx, dx) ** 2) + w

        return jax.vmap(error)

    matching = of_one(lambda v, s, t, x, dx: v(t, t, x) - dx)
    n = diagonal
    errors = (
        matching(s[:n], t[:n], x0[:n], x1[:n]),
        of_one(LOSSES[name])(s[n:], t[n:], x0[n:], x1[n:]),
    )
    return jnp.concatenate(errors).mean()
