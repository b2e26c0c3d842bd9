"""What is left behind where updates are not finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import config as kd_config
from kd.data import sources
from kd.errors import NonFiniteError
from kd.io import safetensors
from kd.method import Objective, Player, alternate
from kd.metrics import mean
from kd.training import loop, nonfinite

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SUPERVISED = dict(name='kd.methods.vision.supervised.supervised')
BAD = 3
SAVED = 'Some updates .* after them is saved in .*_3 beside the batch, .* goes on from '


def recipe(**teacher):
    data = dict(name='two_moons', train='train[:64]')
    config = kd_config.recipe(stages=('teacher',), data=data, mesh=dict(data=1))
    run = dict(
        network=dict(name='kd.models.mlp.MLP', widths=(4,)),
        optimizer=dict(lr=0.1),
        steps=6,
        batch_size=16,
        log_every=2,
    )
    config.teacher = kd_config.stage(**{**run, **teacher})
    return config


def moves(context, *, repeats: int):
    """A network that moves `repeats` times in a step; the last move of step `BAD` is not finite."""

    def loss(params, state, batch, key):
        bad = (state.step == BAD) & (batch.get('move', 0) == repeats - 1)
        logits = context.network.apply({'params': params}, batch['input']).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        return Objective(mean(losses * jnp.where(bad, jnp.nan, 1.0)))

    def init(key):
        return {'network': context.network.init(key)}

    return alternate({'network': Player(loss, context.tx, repeats=repeats)}, init)


@pytest.mark.parametrize(
    ('repeats', 'checkpoint_every', 'message', 'kept'),
    [
        (1, 2, r'The state before that step is saved as checkpoint 3, the batch in .*_3/batch', 3),
        (2, 2, SAVED + r'checkpoint 2\.', 2),
        (2, 6, SAVED + r'its beginning\.', 0),
    ],
)
def test_a_run_that_was_halted_goes_on_as_one_that_was_not(
    tmp_path, repeats, checkpoint_every, message, kept
):
    method = dict(name=f'{__name__}.moves', repeats=repeats)
    config = recipe(method=method, checkpoint_every=checkpoint_every)
    stage = tmp_path / 'halted' / 'teacher'
    for _ in range(2):  # It halts again at the same place.
        with pytest.raises(NonFiniteError, match=f'^teacher: .* at step 3\\. {message}'):
            loop.run(config, tmp_path / 'halted')
    steps = [int(p.name) for p in (stage / 'checkpoints').iterdir() if p.name.isdigit()]
    assert max(steps, default=0) == kept
    # What is for a look alone lies apart.
    assert (stage / 'nonfinite_3' / 'checkpoints' / '3').exists() == (kept < BAD)
    assert np.load(stage / 'nonfinite_3' / 'batch.npz')['label'].shape == (16,)
    config.on_nonfinite = 'skip'
    for run in ('halted', 'skipped'):
        loop.run(config, tmp_path / run)
    halted, skipped = (
        safetensors.stage_variables(tmp_path / run / 'teacher') for run in ('halted', 'skipped')
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), halted, skipped)


def not_a_number(context):
    labels = np.arange(64, dtype=np.int32) % 2
    arrays = {'input': np.full((64, 2), np.nan, np.float32), 'label': labels}
    spec = sources.example_spec((2,))
    data = sources.DataSet('nan', {'train': 64}, lambda _: sources.in_memory(arrays), spec, 2)
    return sources.Source(data, context.split)


def test_a_stage_that_has_updated_nothing_is_not_done(tmp_path):
    config = recipe(method=SUPERVISED)
    config.data = dict(source=dict(name=f'{__name__}.not_a_number'), train='train')
    config.on_nonfinite = 'skip'
    for _ in range(2):  # Nor is it when it is begun again.
        with pytest.raises(NonFiniteError, match=r'^teacher: the last 6 updates were not'):
            loop.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'teacher' / 'done.json').exists()


@pytest.mark.parametrize(
    ('shares', 'count'),
    [
        ([1.0] * 10, 500),
        ([0.0, 1.0, 1.0], 100),
        ([0.0, 1.0], None),
        ([1.0, 0.98, 1.0], None),
        ([0.0] * 10, None),
        ([], None),
    ],
)
def test_a_hundred_updates_left_out_in_a_row_end_a_stage(tmp_path, shares, count):
    lines = [{'step': 50 * (i + 1), 'train/nonfinite': share} for i, share in enumerate(shares)]
    lines.insert(1, {'step': 60, 'validation/accuracy': 0.5})
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if count is None:
        nonfinite.check_updates('a', tmp_path, 1000)
        return
    with pytest.raises(NonFiniteError, match=f'^a: the last {count} updates were not finite'):
        nonfinite.check_updates('a', tmp_path, 1000)
