"""Teacher outputs on disk: what comes back, what it costs, and what is the wrong cache."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd import config as kd_config
from kd.data import catalogue, sources
from kd.errors import UserError
from kd.io import cache, checksums, safetensors
from kd.losses import divergence
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

MADE_OF = {'teacher': 'aa', 'data': 'bb'}
RNG = np.random.default_rng(0)


def _write(directory, form, logits, per_file, made_of=MADE_OF):
    writer = cache.Writer(directory, form, logits.shape[1:], len(logits), per_file, made_of)
    for file in writer.begin():
        rows = logits[file * per_file : (file + 1) * per_file]
        signal = form.signal(jnp.asarray(rows), jax.random.fold_in(jax.random.key(0), file))
        writer.write(file, {name: getattr(signal, name) for name in writer.record.names})
    return writer.finish()


def _signal(stored, indices):
    return cache.signal_in(stored.fetch(np.asarray(indices)), stored.form.temperature)


def test_float32_comes_back_as_it_was_in_any_order(tmp_path):
    logits = RNG.normal(size=(11, 3, 20)).astype('f4')
    form = cache.Form(form='dense', dtype='float32')
    _write(tmp_path, form, logits, per_file=4)
    order = [10, 0, 3, 4, 4, 7]
    np.testing.assert_array_equal(_signal(cache.Cache(tmp_path), order).logits, logits[order])


def test_sampled_outputs_come_back_with_weights_entropy_and_temperature(tmp_path):
    logits = RNG.normal(size=(6, 20)).astype('f4')
    form = cache.Form(form='sampled', size=5, temperature=2.0, proposal_temperature=3.0)
    _write(tmp_path, form, logits, per_file=6)
    found = _signal(cache.Cache(tmp_path, form), range(6))
    p = scipy.special.softmax(logits.astype('f8') / 2.0, axis=-1)
    r = scipy.special.softmax(logits.astype('f8') / 3.0, axis=-1)
    take = np.take_along_axis
    expected = take(p, found.tokens, -1) / take(r, found.tokens, -1) / 5
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    assert found.temperature == 2.0


def test_top_64_of_131072_costs_less_than_a_150th_and_keeps_its_bound(tmp_path):
    outcomes, k, tokens = 131_072, 64, 128
    # A language model's spread: a few likely words, a long tail.
    logits = (RNG.normal(size=(tokens, outcomes)) * 2.5).astype('f4')
    sizes = _write(tmp_path, cache.Form(form='top_k', size=k), logits, per_file=tokens)
    assert sizes['record_bytes'] == 64 * (2 + 4) + 4
    assert sizes['dense_bytes_per_example'] == 4 * outcomes
    assert sizes['bytes_per_example'] * 150 <= sizes['dense_bytes_per_example']

    found = _signal(cache.Cache(tmp_path), range(8))
    p = scipy.special.softmax(logits[:8].astype('f8'), axis=-1)
    listed = np.argsort(-p, axis=-1)[:, :k]
    np.testing.assert_array_equal(np.sort(found.indices), np.sort(listed))
    kept = np.take_along_axis(p, np.asarray(found.indices), -1)
    np.testing.assert_allclose(found.tail, 1 - kept.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.log_probs).sum(-1) + found.tail, 1.0, atol=1e-6)

    student = (logits[:8] + RNG.normal(size=(8, outcomes))).astype('f4')
    log_q = scipy.special.log_softmax(student.astype('f8'), axis=-1)
    dense = (p * (np.log(p) - log_q)).sum(-1)
    log_q_kept = np.take_along_axis(log_q, np.asarray(found.indices), -1)
    tail_q = np.log(-np.expm1(scipy.special.logsumexp(log_q_kept, axis=-1)))
    tail_p = 1 - kept.sum(-1)
    gaps = np.log(kept) - log_q_kept
    exact = (kept * gaps).sum(-1) + tail_p * (np.log(tail_p) - tail_q)
    # What is lost is the divergence within the tail, times its mass.
    assert np.all(exact <= dense)
    d = 2.0**-10 * np.abs(np.log(kept)).max(-1)
    widest = np.maximum(np.abs(gaps).max(-1), np.abs(np.log(tail_p) - tail_q))
    bound = np.exp(d) * d + np.expm1(d) * widest
    measured = np.asarray(divergence.forward_kl(student, found))
    assert np.all(np.abs(measured - exact) <= bound)
    assert np.all(measured <= dense + bound)


def test_a_cache_cut_off_goes_on_with_the_files_that_are_missing(tmp_path):
    logits = RNG.normal(size=(10, 20)).astype('f4')
    form = cache.Form(form='top_k', size=3, dtype='float32')
    whole = tmp_path / 'whole'
    _write(whole, form, logits, per_file=4)
    writer = cache.Writer(tmp_path / 'cut', form, (20,), 10, 4, MADE_OF)
    assert writer.begin() == [0, 1, 2]
    signal = form.signal(jnp.asarray(logits[4:8]), jax.random.key(0))
    writer.write(1, {name: getattr(signal, name) for name in writer.record.names})
    # What a process leaves that dies while it writes.
    (writer.files.folder / '00002.array_record.partial').write_bytes(b'half')
    with pytest.raises(UserError, match='is not complete; run its stage'):
        cache.Cache(tmp_path / 'cut')
    again = cache.Writer(tmp_path / 'cut', form, (20,), 10, 4, MADE_OF)
    assert again.begin() == [0, 2]
    _write(tmp_path / 'cut', form, logits, per_file=4)
    a, b = (cache.Cache(x).fetch(np.arange(10)) for x in (whole, tmp_path / 'cut'))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_cache_of_something_else_is_one_clear_line(tmp_path):
    logits = RNG.normal(size=(4, 20)).astype('f4')
    form = cache.Form(form='top_k', size=3)
    with pytest.raises(UserError, match='has no cache of teacher outputs'):
        cache.Cache(tmp_path)
    _write(tmp_path, form, logits, per_file=4)
    other = MADE_OF | {'teacher': 'cc'}
    with pytest.raises(UserError, match=r'was made from another teacher \(aa, not cc\); delete it'):
        cache.Writer(tmp_path, form, (20,), 4, 4, other).begin()
    with pytest.raises(UserError, match=r'from another data \(bb, not dd\)'):
        cache.Cache(tmp_path, form, {'data': 'dd'})
    warmer = cache.Form(form='top_k', size=3, temperature=2.0)
    with pytest.raises(UserError, match=r'temperature was 1\.0 and is 2\.0'):
        cache.Cache(tmp_path, warmer)
    with pytest.raises(UserError, match='form was'):
        cache.Cache(tmp_path, cache.Form(form='dense'))
    [shard] = (tmp_path / 'teacher').glob('*.array_record')
    shard.rename(tmp_path / 'away')
    with pytest.raises(UserError, match=r'lacks 1 of its 1 files, the first is 00000\.array'):
        cache.Cache(tmp_path)
    manifest = tmp_path / 'teacher' / 'manifest.json'
    manifest.write_text(manifest.read_text().replace('"dtype"', '"dtypo"'))
    with pytest.raises(UserError, match=r'manifest\.json lacks dtype; delete'):
        cache.Cache(tmp_path)
    manifest.write_text('{')
    with pytest.raises(UserError, match=r'manifest\.json is damaged: it is not the JSON'):
        cache.Cache(tmp_path)


def test_logits_that_float16_cannot_hold_are_refused_and_minus_infinity_is_kept(tmp_path):
    logits = np.array([[1.0, -np.inf, 7e4]], np.float32)
    with pytest.raises(UserError, match=r"reach 7e\+04, more than float16 holds; .* 'float32'"):
        _write(tmp_path / 'half', cache.Form(form='dense'), logits, per_file=1)
    form = cache.Form(form='dense', dtype='float32')
    _write(tmp_path / 'whole', form, logits, per_file=1)
    np.testing.assert_array_equal(_signal(cache.Cache(tmp_path / 'whole'), [0]).logits, logits)
    logits[0, 2] = 2.0
    _write(tmp_path / 'fits', cache.Form(form='dense'), logits, per_file=1)
    np.testing.assert_array_equal(_signal(cache.Cache(tmp_path / 'fits'), [0]).logits, logits)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(form='dens'), "'dense', 'top_k' or 'sampled'"),
        (dict(form='top_k'), 'only dense has size 0'),
        (dict(form='dense', size=3), 'only dense has size 0'),
        (dict(form='dense', temperature=2.0), 'leave temperature at 1'),
        (dict(form='top_k', size=3, dtype='int8'), "'float32' or 'float16'"),
    ],
)
def test_impossible_forms_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        cache.Form(**arguments)


def test_a_teachers_fingerprint_is_of_its_bits_and_not_of_their_place():
    tree = {'a': jnp.arange(16.0).reshape(8, 2), 'b': {'c': jnp.ones(3, jnp.bfloat16)}}
    mesh = jax.make_mesh((8,), ('x',))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    sharded = tree | {'a': jax.device_put(tree['a'], split)}
    found = checksums.fingerprint(tree)
    assert checksums.fingerprint(sharded) == found
    changed = [
        tree | {'a': tree['a'].at[3, 1].set(np.nextafter(np.float32(7), np.float32(8)))},
        tree | {'a': tree['a'][::-1]},
        tree | {'a': tree['a'].reshape(2, 8)},
        {'A': tree['a'], 'b': tree['b']},
    ]
    assert len({found, *map(checksums.fingerprint, changed)}) == 5


def test_a_splits_fingerprint_is_of_its_examples():
    load = catalogue.load
    found = {
        sources.fingerprint(load(name, split))
        for name, split in (('two_moons', 'train'), ('two_moons', 'test'), ('rings', 'train'))
    }
    assert len(found) == 3
    assert sources.fingerprint(load('two_moons', 'test')) in found


def _recipe(tmp_path, variant):
    config = kd_config.load(f'configs/vision/cached_kd.py:{variant}')
    splits = dict(train='train[:300]', validation='test[:64]', test='test[64:128]')
    config.data = dict(name='two_moons', **splits)
    config.student.data.update(splits)
    config.data_dir, config.report = str(tmp_path), {}
    config.teacher.network = dict(name='kd.models.mlp.MLP', widths=(8,))
    config.teacher.method = dict(name='kd.methods.vision.supervised.supervised')
    config.cache.batch_size = 64
    with config.cache.unlocked():
        config.cache.writers.teacher.per_file = 64
    for stage in (config.teacher, config.student):
        stage.steps, stage.log_every = 20, 20
    return config


@pytest.fixture(scope='module')
def distilled(tmp_path_factory):
    """A run whose student has learnt from dense cached outputs."""
    folder = tmp_path_factory.mktemp('cached')
    loop.run(_recipe(folder, 'dense'), folder / 'run')
    return folder / 'run'


def test_a_student_of_cached_logits_is_the_student_of_the_teacher(distilled, tmp_path):
    assert len(list((distilled / 'cache' / 'teacher').glob('*.array_record'))) == 5
    config = _recipe(tmp_path, 'dense')
    config.student.data, config.student.teacher = {}, 'teacher'
    loop.run(config, tmp_path / 'run')
    ours, theirs = (
        safetensors.flatten(safetensors.stage_variables(run / 'student'))
        for run in (distilled, tmp_path / 'run')
    )
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


def test_a_stage_cut_off_writes_what_is_missing_and_nothing_else(distilled, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(distilled, run, ignore=shutil.ignore_patterns('.lock', 'student'))
    folder = run / 'cache' / 'teacher'
    (run / 'cache' / 'done.json').unlink()
    shutil.rmtree(run / 'cache' / 'checkpoints')
    (folder / '00003.array_record').unlink()
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob('*.array_record')}
    config = _recipe(distilled.parent, 'dense')
    loop.run(config, run)
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob('*.array_record')}
    assert set(after) - set(before) == {'00003.array_record'}
    assert {name: after[name] for name in before} == before
    assert (folder / '00003.array_record').read_bytes() == (
        distilled / 'cache' / 'teacher' / '00003.array_record'
    ).read_bytes()


def test_a_finished_cache_that_lost_files_makes_them_again(distilled, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(distilled, run, ignore=shutil.ignore_patterns('.lock', 'student'))
    folder = run / 'cache' / 'teacher'
    gone, short, manifest = (
        folder / name for name in ('00002.array_record', '00003.array_record', 'manifest.json')
    )
    before = {file: file.read_bytes() for file in folder.iterdir()}
    gone.unlink()
    short.write_bytes(before[short][:-100])
    manifest.unlink()
    loop.run(_recipe(distilled.parent, 'dense'), run)
    assert '[cache] teacher/00002.array_record is missing or cut' in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert (run / 'student' / 'done.json').exists()


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        ('bit', 'cannot be read'),
        ('short', 'is damaged: it has 0 records'),
        ('empty', 'is damaged: it has 0 records'),
        ('records', 'is damaged: it has 3 records'),
        ('size', 'holds other records'),
    ],
)
def test_a_damaged_file_of_a_cache_is_told_by_its_name(tmp_path, damage, words):
    logits = RNG.normal(size=(8, 20)).astype('f4')
    form = cache.Form(form='dense', dtype='float32')
    _write(tmp_path, form, logits, per_file=4)
    file = tmp_path / 'teacher' / '00001.array_record'
    content = bytearray(file.read_bytes())
    if damage == 'bit':
        content[content.index(logits[5].tobytes()[:8])] ^= 1
    elif damage == 'records':
        _write(tmp_path / 'other', form, logits[:3], per_file=4)
        content = (tmp_path / 'other' / 'teacher' / '00000.array_record').read_bytes()
    elif damage == 'size':
        _write(tmp_path / 'other', form, logits[:4, :10], per_file=4)
        content = (tmp_path / 'other' / 'teacher' / '00000.array_record').read_bytes()
    else:
        content = content[: len(content) // 2] if damage == 'short' else b''
    file.write_bytes(content)
    stored = cache.Cache(tmp_path)
    np.testing.assert_array_equal(_signal(stored, [0, 3]).logits, logits[[0, 3]])
    with pytest.raises(UserError, match=rf'00001\.array_record {words}.*; delete what is damaged'):
        stored.fetch(np.array([0, 5]))


def test_a_student_refuses_the_cache_of_another_teacher(distilled, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(distilled, run, ignore=shutil.ignore_patterns('.lock', 'student'))
    done = run / 'teacher' / 'done.json'
    done.write_text(done.read_text().replace('"step": 20', '"step": 20, "again": true'))
    with pytest.raises(UserError, match='was made from another training of the teacher'):
        loop.run(_recipe(distilled.parent, 'dense'), run)


def test_a_student_at_another_temperature_than_its_cache_is_refused(tmp_path):
    config = _recipe(tmp_path, 'cpu')
    config.cache.writers.teacher.size = 1
    config.student.method.temperature = 2.0
    with pytest.raises(UserError, match=r'recorded at temperature 4\.0 cannot be used at'):
        loop.run(config, tmp_path / 'run')


@pytest.mark.parametrize('entry', [('crop', 1), 'flip', ('mixup', 0.2)])
def test_a_student_that_augments_what_its_cache_holds_is_refused(tmp_path, entry):
    config = kd_config.load('configs/vision/cached_kd.py:cpu')
    config.data_dir, config.report = str(tmp_path), {}
    with config.student.unlocked():
        config.student.method.augmentation = (entry,)
    with pytest.raises(UserError, match=r'brings teacher_indices, .* cannot be augmented'):
        loop.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'teacher').exists()


def test_a_student_whose_teacher_is_not_that_of_its_cache_is_refused(tmp_path):
    config = _recipe(tmp_path, 'cpu')
    config.stages = ('teacher', 'other', 'cache', 'student')
    with config.unlocked():
        config.other = config.teacher
    config.cache.writers.teacher.size = 1
    config.student.teacher = 'other'
    with pytest.raises(UserError, match="'other', and its data bring what 'teacher' has said"):
        loop.run(config, tmp_path / 'run')
