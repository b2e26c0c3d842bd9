"""The axiom predicates: they pass what conforms, and refute by a counter-example that is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.theory import meta_distillation as md
from kd.theory.axioms import check_axioms
from kd.theory.statements.meta_operators import BROKEN

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.mark.parametrize('power', [1.0, 0.0])
def test_anchored_operators_obey_all_seven(power):
    result = check_axioms(functools.partial(md.anchor, power=power), draws=200)
    assert len(result) == 7
    assert all(verdict.holds for verdict in result.values())
    assert all(verdict.counter_example is None for verdict in result.values())


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_operator_fails_its_axiom(name):
    operator, axiom = BROKEN[name]
    verdict = check_axioms(operator, draws=200, names=(axiom,))[axiom]
    assert not verdict.holds
    assert verdict.worst > verdict.tolerance


def test_the_counter_example_of_non_expansion_is_one():
    operator, _ = BROKEN['extrapolated past the student']
    verdict = check_axioms(operator, draws=50, names=('non_expansion',))['non_expansion']
    log_s, log_t, lam = (verdict.counter_example[name] for name in ('log_s', 'log_t', 'lam'))
    with jax.enable_x64(True):
        log_m = np.asarray(operator(log_s[None], log_t[None], lam[None]))[0]
    before, after = (np.sum(np.exp(x) * (x - log_t)) for x in (log_s, log_m))
    np.testing.assert_allclose(after - before, verdict.worst, rtol=1e-6)
    assert after > before


def test_softening_that_sharpens_fails_in_entropy_and_boundary_but_keeps_ranks():
    result = check_axioms(lambda log_p, tau: md.soften(log_p, 1 / tau), 'softening', draws=100)
    failed = {name for name, verdict in result.items() if not verdict.holds}
    assert failed == {'entropy', 'boundary'}


def test_a_pool_that_ignores_weights_fails_monotonicity():
    result = check_axioms(
        lambda log_ps, weights: jnp.log(jnp.exp(log_ps).mean(axis=0)), 'aggregation', draws=100
    )
    assert not result['convexity'].holds
    assert result['positivity'].holds
    # It does not move at all, which is not farther away: only strictness would catch that.
    assert result['monotonicity'].worst == 0


def test_unknown_kinds_and_axioms_are_refused():
    with pytest.raises(ValueError, match='kind must be one of'):
        check_axioms(md.anchor, 'pooling')
    with pytest.raises(ValueError, match=r"Unknown axioms \['rank'\]"):
        check_axioms(md.anchor, names=('rank',))


def test_float64_is_not_left_enabled():
    check_axioms(md.anchor, draws=10, names=('validity',))
    assert jnp.ones(()).dtype == jnp.float32
