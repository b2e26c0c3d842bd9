"""Checkpoints: which are kept, which is best, what is damaged."""

import json
import math

import jax
import jax.numpy as jnp

from kd.io.checkpoints import Checkpoints
from kd.state import State


def state(step):
    made = State.create(jax.random.key(0), {'w': jnp.full(2, 1.0 * step)}, ())
    return made.replace(step=jnp.int32(step))


def test_a_metric_that_is_nan_or_absent_never_makes_the_best(tmp_path, caplog):
    saved = Checkpoints(tmp_path, keep=1, best='-val/nll')
    for step, value in enumerate((0.9, 0.3, math.nan, 0.7, None, math.inf), 1):
        # Saved first and looked at then, as the loop does.
        saved.save(state(step), {}, {})
        saved.rank(step, {} if value is None else {'val/nll': value})
        saved.wait()
    assert saved.best_step() == 2
    assert saved.steps() == [2, 6]
    saved.close()
    # What was measured is there for the next process, as JSON.
    assert json.loads((tmp_path / 'merits.json').read_text())['2'] == {'val/nll': 0.3}
    again = Checkpoints(tmp_path, keep=1, best='-val/nll')
    assert again.best_step() == 2
    again.close()
    other = Checkpoints(tmp_path, keep=1, best='val/accuracy')
    assert not caplog.records
    assert other.best_step() == 6
    assert 'has a finite val/accuracy: the last one counts' in caplog.text
    other.close()
