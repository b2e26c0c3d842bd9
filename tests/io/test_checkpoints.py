"""Checkpoints: which are kept, which is best, what is damaged."""

import errno
import gc
import json
import math
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from kd.errors import UserError
from kd.io import checksums
from kd.io.checkpoints import Checkpoints
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def state(step):
    made = State.create(jax.random.key(0), {'params': {'w': jnp.full(2, 1.0 * step)}})
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


@pytest.fixture
def two(tmp_path):
    """The folder of a stage with checkpoints 1 and 2, and the open `Checkpoints`."""
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        saved.save(state(step), {}, {'next_index': step})
    saved.wait()
    yield tmp_path, saved
    saved.close()


def restored(saved):
    found = saved.restore_latest(abstract(state(0)), {})
    return (
        None
        if found is None
        else (int(found[0].step), found[0].params['network']['w'].tolist(), found[2])
    )


def abstract(tree):
    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(one, tree)


def damaged(folder, how):
    checkpoint = folder / 'checkpoints' / '2'
    [*arrays] = (f for f in (checkpoint / 'training').rglob('d/*') if f.is_file())
    if how == 'position':
        (checkpoint / 'data' / 'metadata').write_text('')
    elif how == 'missing':
        arrays[0].unlink()
    elif how == 'bit':
        content = bytearray(arrays[0].read_bytes())
        content[len(content) // 2] ^= 1
        arrays[0].write_bytes(content)
    else:
        (checkpoint / 'checksums.json').write_text('{"a": ')


@pytest.mark.parametrize('how', ['position', 'missing', 'bit', 'checksums'])
def test_what_is_known_to_be_damaged_is_set_aside(two, caplog, how):
    folder, saved = two
    damaged(folder, how)
    assert restored(saved) == (1, [1.0, 1.0], {'next_index': 1})
    assert 'Checkpoint 2 is damaged (' in caplog.text
    assert (folder / 'broken_checkpoints' / '2').is_dir()


@pytest.mark.parametrize(
    'trouble',
    [OSError(errno.EIO, 'Input/output error'), MemoryError(), OSError(errno.EMFILE, 'Too many')],
    ids=['EIO', 'memory', 'files'],
)
@pytest.mark.parametrize('where', ['restoring', 'verifying'])
def test_a_passing_trouble_leaves_the_checkpoint_where_it_is(two, monkeypatch, trouble, where):
    folder, saved = two

    def fail(*_, **__):
        raise trouble

    with monkeypatch.context() as patch:
        if where == 'restoring':
            patch.setattr(ocp.CheckpointManager, 'restore', fail)
        else:
            patch.setattr(checksums, '_of_file', fail)
        with pytest.raises((UserError, MemoryError)) as told:
            restored(saved)
    if isinstance(told.value, UserError):
        assert 'checkpoint 2 cannot be read' in str(told.value)
        assert 'It is not damaged and stays where it is' in str(told.value)
    assert saved.steps() == [1, 2]
    assert not (folder / 'broken_checkpoints').exists()
    assert restored(saved) == (2, [2.0, 2.0], {'next_index': 2})


# Orbax leaves a coroutine behind where files are missing.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_without_checksums_nothing_is_known_to_be_damaged(two):
    folder, saved = two
    damaged(folder, 'bit')
    (folder / 'checkpoints' / '2' / 'checksums.json').unlink()
    [*arrays] = (folder / 'checkpoints' / '2' / 'training').rglob('d/*')
    for file in arrays:
        file.unlink()
    with pytest.raises(UserError, match='Whether it is damaged cannot be known and stays'):
        restored(saved)
    assert saved.steps() == [1, 2]
    gc.collect()


def test_checksums_are_in_a_checkpoint_before_it_has_its_name(two):
    folder, _ = two
    for step in ('1', '2'):
        kept = json.loads((folder / 'checkpoints' / step / 'checksums.json').read_text())
        assert {name.split('/')[0] for name in kept} == {'variables', 'training', 'data'}
        for name, told in kept.items():
            content = (folder / 'checkpoints' / step / name).read_bytes()
            assert told == f'{len(content)} {zlib.crc32(content):08x}'
