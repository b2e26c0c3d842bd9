"""What a decoder says of text, on disk: the positions that count, and a student of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from array_record.python.array_record_module import ArrayRecordReader

from kd import config as kd_config
from kd.data.context import SourceContext
from kd.data.transforms.cached import cached
from kd.errors import UserError
from kd.io import cache, safetensors
from kd.methods.cache import _Teacher
from kd.network import from_linen
from kd.networks import trained_network
from kd.parallel.mesh import make_mesh
from kd.text import packing
from kd.training import loop
from kd.training.stage import prepare
from kd.training.step import abstract_arguments

pytestmark = pytest.mark.usefixtures('compiled_quickly')

K = 5


@pytest.fixture(scope='module')
def texts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend('tests/recipes')
        import texts

        yield texts


@pytest.fixture(scope='module')
def run(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('texts') / 'run'
    loop.run(texts.get_config(), workdir)
    return workdir


@pytest.fixture(scope='module')
def said(texts, run):
    """The rows, the positions that count by hand, and the teacher's log-probabilities there."""
    recipe = kd_config.parse(texts.get_config())
    source = texts.rows(SourceContext('train', recipe))
    batch = source.fetch(np.arange(len(source)))
    trained = trained_network(recipe, 'teacher', run, make_mesh({'data': 1}), source, where='test')
    logits = trained.network.apply(trained.restore(), *trained.network.of(batch)).logits
    where = np.zeros((len(source), texts.T), bool)
    for row, place in np.ndindex(len(source), texts.T - 1):
        one = batch['segments'][row, place]
        where[row, place] = (
            one > 0
            and one == batch['segments'][row, place + 1]
            and batch['response_mask'][row, place + 1]
        )
    return batch, where, scipy.special.log_softmax(np.asarray(logits, np.float64), -1)


def test_positions_that_do_not_count_take_no_byte(run, said):
    _, where, _ = said
    assert 0 < where.sum() < where.size / 2
    files = sorted((run / 'cache' / 'teacher').glob('*.array_record'))
    sizes = []
    for file in files:
        reader = ArrayRecordReader(str(file))
        sizes += [len(reader.read([i])[0]) for i in range(reader.num_records())]
    # Of each of five outcomes a probability and an index, and the tail.
    assert sizes == [count * (K * (4 + 2) + 4) for count in where.sum(1)]


def test_what_is_kept_is_what_the_teacher_says_there(run, said):
    _, where, log_p = said
    stored = cache.Cache(run / 'cache')
    order = np.array([7, 0, 23, 7])
    found = cache.signal_in(stored.fetch(order, where[order]), 1.0)
    listed = np.argsort(-log_p, -1)[order][..., :K]
    kept = np.take_along_axis(log_p[order], listed, -1)
    at = where[order]
    np.testing.assert_array_equal(found.indices[at], listed[at])
    np.testing.assert_allclose(found.log_probs[at], kept[at], atol=1e-5)
    np.testing.assert_allclose(found.tail[at], 1 - np.exp(kept[at]).sum(-1), atol=1e-5)
    assert (found.log_probs[~at] == -np.inf).all()
    assert (found.tail[~at] == 0).all()


def test_a_student_of_the_cache_is_the_student_of_the_live_teachers_top_k(texts, run, tmp_path):
    loop.run(texts.get_config('live'), tmp_path / 'run')
    ours, theirs = (
        safetensors.flatten(safetensors.stage_variables(folder / 'student'))
        for folder in (run, tmp_path / 'run')
    )
    begun = safetensors.flatten(safetensors.stage_variables(run / 'teacher'))
    assert begun.keys() == ours.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


def test_no_array_of_all_logits_is_formed_to_write_nor_to_learn(texts, run):
    recipe = kd_config.parse(texts.get_config())
    source = texts.rows(SourceContext('train', recipe))
    where = dict(where='test')
    teacher = trained_network(recipe, 'teacher', run, make_mesh({'data': 1}), source, **where)
    context = type('Context', (), {'teacher': teacher.network})
    rows = source.fetch(np.arange(8))
    made = _Teacher(context, cache.Form(size=K), 0, chunk=4)
    text = str(jax.make_jaxpr(made.says_of_tokens)(teacher.restore(), rows, jax.random.key(0)))
    size = 8 * texts.T
    assert f'f32[4,{texts.V}]' in text
    for shape in (f'8,{texts.T},{texts.V}', f'{size},{texts.V}', f'{size // 4},4,{texts.V}'):
        assert f'f32[{shape}]' not in text
    stage = prepare(recipe, 'student', make_mesh({'data': 1}), run)
    state, frozen, _, batch = abstract_arguments(stage)
    assert batch['teacher_indices'].shape == (8, texts.T, K)
    text = str(jax.make_jaxpr(stage.method.step)(state.replace(frozen=frozen), batch))
    assert f'f32[5,{texts.V}]' in text
    for shape in (f'8,{texts.T},{texts.V}', f'{size},{texts.V}', f'12,5,{texts.V}'):
        assert f'f32[{shape}]' not in text


def test_draws_depend_on_the_example_and_the_position_alone(texts, run, said):
    _, where, log_p = said
    recipe = kd_config.parse(texts.get_config())
    source = texts.rows(SourceContext('train', recipe))
    mesh = make_mesh({'data': 1})
    teacher = trained_network(recipe, 'teacher', run, mesh, source, where='test')
    variables, form = teacher.restore(), cache.Form(form='sampled', size=400)
    context = type('Context', (), {'teacher': teacher.network})
    says = jax.jit(_Teacher(context, form, 0, chunk=3).says_of_tokens)
    key = jax.random.key(3)
    whole, counts = says(variables, source.fetch(np.arange(6)), key)
    np.testing.assert_array_equal(counts, where[:6])
    part, _ = says(variables, source.fetch(np.array([4, 1, 5, 4, 0, 2])), key)
    np.testing.assert_array_equal(part.tokens[0], whole.tokens[4])
    np.testing.assert_array_equal(part.tokens[0], part.tokens[3])
    # Unlike from one to the next, and as probable as the teacher holds them.
    assert (whole.tokens[0, 0] != whole.tokens[1, 0]).any()
    share = np.stack([(np.asarray(whole.tokens) == v).mean(-1) for v in range(texts.V)], -1)
    p = np.exp(log_p[:6])
    error = np.abs(share - p)[where[:6]]
    assert (error < 5 * np.sqrt(p * (1 - p) / 400)[where[:6]] + 1e-6).all()


def test_another_padding_is_refused_before_anything_is_trained(texts, tmp_path):
    config = texts.get_config()
    with config.unlocked():
        config.student.network.num_classes = texts.V + 4
    with pytest.raises(UserError, match=r'student\.network has 24 outputs, and .cache. keeps'):
        loop.run(config, tmp_path / 'run')
    config = texts.get_config()
    config.teacher.network.num_classes = texts.V + 4
    with pytest.raises(UserError, match=r"num_classes=24, or the writer of 'cache' vocabulary=20"):
        loop.run(config, tmp_path / 'run')
    config.cache.writers.teacher.vocabulary = 30
    with pytest.raises(UserError, match='vocabulary=30 is more than the 24 outcomes of the'):
        loop.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'teacher').exists()


def test_prompts_are_no_rows_of_text(texts, tmp_path):
    config = texts.get_config()
    config.teacher.data = dict(source=dict(name='texts.rows'), train='train')
    with config.unlocked():
        config.data.source = dict(name='texts.prompts', answers=True)
    with pytest.raises(
        UserError, match=r'cache: .* rows of text, and the data are prompts; a sour'
    ):
        loop.run(config, tmp_path / 'run')


def test_a_teacher_padded_further_is_cut_before_its_softmax(texts, said):
    batch = said[0]
    network = kd_config.build(texts.decoder(texts.V + 4), where='test')
    shape = jax.ShapeDtypeStruct((1, texts.T), jnp.int32)
    teacher = from_linen(network.clone(fields=('input', 'positions', 'segments')), *[shape] * 3)
    variables = jax.jit(teacher.init)(jax.random.key(0))
    variables = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, variables)
    context = type('Context', (), {'teacher': teacher})
    made = _Teacher(context, cache.Form(size=texts.V), texts.V, chunk=6)
    found, counts = jax.jit(made.says_of_tokens)(variables, batch, jax.random.key(0))
    logits = np.asarray(teacher.apply(variables, *teacher.of(batch)).logits, np.float64)
    log_p = scipy.special.log_softmax(logits[..., : texts.V], -1)
    kept = np.take_along_axis(log_p, np.asarray(found.indices), -1)
    np.testing.assert_allclose(found.log_probs[counts], kept[counts], atol=1e-5)


def test_text_of_another_tokenizer_or_mask_is_one_line(texts, run):
    config = texts.get_config()
    config.data.source.symbols = (*texts.SYMBOLS[:-1], 'z')
    recipe = kd_config.parse(config)
    with pytest.raises(UserError, match=r'cache of teacher outputs in .* made from another tokeni'):
        cached(SourceContext('train', recipe, run))
    recipe = kd_config.parse(texts.get_config())
    source = cached(SourceContext('train', recipe, run))
    batch = source._source.fetch(np.arange(2))
    where = packing.targets(batch)[1]
    where[1] = ~where[1]
    with pytest.raises(UserError, match=r'00000\.array_record holds other records'):
        source._stored.fetch(np.arange(2), where)
