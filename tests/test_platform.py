"""That the platform computes what it is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401  (brings a BLAS of its own)
import threadpoolctl

import kd  # noqa: F401  (sets what XLA is told)


def test_products_with_filled_arrays_are_right_where_they_are_summed():
    x, y = (jax.random.normal(key, (4_096, 2)) for key in jax.random.split(jax.random.key(0)))
    filled = np.full((2, 2), 0.1, np.float32)
    found = jax.jit(lambda x, y: jnp.sum(jnp.square(y - x @ jnp.full((2, 2), 0.1)), -1))(x, y)
    wanted = np.square(np.asarray(y) - np.asarray(x) @ filled).sum(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_worker_of_the_tests_keeps_to_one_core():
    """Two threads of BLAS cost an eigh of 64 x 64 fifty times what one costs."""
    threads = {pool['filepath']: pool['num_threads'] for pool in threadpoolctl.threadpool_info()}
    assert threads
    assert set(threads.values()) == {1}
