"""What is known and what is left to choose, against sums by hand and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd.claims import seeds
from kd.evaluators.choices import choice_metrics, choices, expected_pass
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_metrics_of_facts_and_of_choices_by_hand():
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(6), size=4)
    valid = np.array([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [0] * 6, [0, 0, 0, 1, 1, 0]], bool)
    found = choice_metrics(np.log(q), valid, tries=5)
    one, several = [True, False, False, False], [False, True, False, True]
    wanted = {
        'fact': ((q * valid).sum(-1), one),
        'entropy': (special.entr(q).sum(-1), several),
        'valid': ((q * valid).sum(-1), several),
        'pass': (
            [np.mean(1 - (1 - row[v]) ** 5) if v.any() else 0.0
             for row, v in zip(q, valid, strict=True)],
            several,
        ),
    }  # fmt: skip
    assert set(found) == set(wanted)
    for name, (value, where) in wanted.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-5)
        np.testing.assert_array_equal(found[name][1], where)


def test_the_expected_pass_is_that_of_draws():
    rng = np.random.default_rng(1)
    q, valid = np.array([0.05, 0.3, 0.15, 0.5]), np.array([1, 1, 1, 0], bool)
    rewarded = rng.integers(0, 3, 100_000)
    drawn = rng.choice(4, p=q, size=(100_000, 3))
    share = (drawn == rewarded[:, None]).any(-1).mean()
    assert float(expected_pass(np.log(q), valid, 3)) == pytest.approx(share, abs=0.006)
    # Certainty of an answer that may be the one: a third.
    certain = np.array([40.0, -40.0, -40.0, -40.0], np.float32)
    assert float(expected_pass(certain, valid, 16)) == pytest.approx(1 / 3, rel=1e-6)


def test_the_evaluator_leaves_padding_out():
    network = from_linen(
        BottleneckLM(num_classes=6, width=3), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
    rng = np.random.default_rng(2)
    batch = {
        'input': rng.integers(0, 6, (5, 2)).astype(np.int32),
        'valid': np.arange(6) < np.array([1, 2, 1, 3, 4])[:, None],
        'mask': np.array([True, True, True, True, False]),
    }
    variables = jax.jit(network.init)(jax.random.key(1))
    evaluator = choices(seeds.context(network=network, num_classes=6), tries=3)
    sums = jax.jit(evaluator.update)(State.create(jax.random.key(0), variables), batch)
    logits = jax.jit(network.apply)(variables, batch['input']).logits
    by_hand = choice_metrics(logits, batch['valid'], tries=3)
    counted = {'fact': [0, 2], 'entropy': [1, 3], 'valid': [1, 3], 'pass': [1, 3]}
    wanted = {n: float(np.mean(by_hand[n][0][np.array(of)])) for n, of in counted.items()}
    assert evaluator.finish(sums) == pytest.approx(wanted, rel=1e-5)
