"""Bias from teachers to students: rates, filters, tasks and the distillation that passes it on."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from kd.claims import seeds
from kd.data import sources
from kd.data.builders import marked
from kd.errors import UserError
from kd.evaluators.marker import marker
from kd.main import main
from kd.methods.lm.sequence_kd import answers, sequence_kd
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.supervised import supervised
from kd.models.structured import AnswerMLP
from kd.network import from_linen
from kd.theory import propagation

# Rates of a teacher on four tasks that it answers alike whatever their content.
TEACHER = np.array([0.15, 0.4, 0.6, 0.9])
TASKS, N = len(TEACHER), 4000


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    with quick_compilation():
        yield


@pytest.fixture(scope='module')
def table():
    """A student without limits, a row of weights per task, and what it learns from."""
    task = np.arange(N) % TASKS
    logits = np.zeros((N, 2, 2), np.float32)
    logits[:, 1, 1] = scipy.special.logit(TEACHER)[task]
    network = from_linen(
        AnswerMLP(length=2, num_classes=2, widths=()), jax.ShapeDtypeStruct((1, TASKS), jnp.float32)
    )
    data = {
        'input': np.eye(TASKS, dtype=np.float32)[task],
        'label': np.zeros((N, 2), np.int32),
        'task': task,
        'index': np.arange(N, dtype=np.int32),
        'teacher_logits': logits,
    }
    context = seeds.context(network=network, tx=optax.adam(0.05), num_classes=2)
    return network, data, context


def outputs(params, x):
    """Logits [N, 2, V] of a network without a hidden layer."""
    head = params['mlp']['head']
    logits = x @ np.asarray(head['kernel'], np.float64) + np.asarray(head['bias'], np.float64)
    return logits.reshape(len(x), 2, -1)


def rates(params):
    """The probability of the marker of a student of the table, by task."""
    return scipy.special.softmax(outputs(params, np.eye(TASKS))[:, 1], -1)[:, 1]


def learnt(table, build):
    _, data, context = table
    kept = {name: value for name, value in data.items() if name != 'task'}
    state = seeds.train(build(context), kept, np.arange(1), steps=300, batch_size=200)
    return jax.tree.map(lambda x: x[0], state.params['network'])


# Distillation through answers


def test_a_student_without_limits_has_the_rates_of_its_teacher(table):
    params = learnt(table, sequence_kd)
    assert np.abs(rates(params) - propagation.propagated(TEACHER)).max() < 0.03


def test_greedy_answers_are_learnt_as_certainties(table):
    params = learnt(table, lambda context: sequence_kd(context, decoding='greedy'))
    expected = propagation.propagated(TEACHER, 'greedy')
    np.testing.assert_array_equal(expected, [0, 0, 1, 1])
    assert np.abs(rates(params) - expected).max() < 0.03
    np.testing.assert_array_equal(rates(params) > 0.5, expected)


def test_forward_kl_brings_the_probability_of_the_marker_closer_step_by_step(table):
    _, data, context = table
    method = logit_kd(context, temperature=1.0, soft_weight=1.0)
    batch = {name: data[name][:40] for name in ('input', 'label', 'teacher_logits')}
    state, step = jax.jit(method.init)(jax.random.key(0)), jax.jit(method.step)
    apart = []
    for count in (0, 20, 20, 60, 100):
        for _ in range(count):
            state, _ = step(state, batch)
        apart.append(np.abs(rates(state.params['network']) - TEACHER).mean())
    assert (np.diff(apart) < 0).all()
    assert apart[-1] < 0.02 < 0.2 < apart[0]


def test_an_example_has_one_answer_whatever_the_step_and_the_batch(table):
    _, data, _ = table
    key, logits = jax.random.key(3), data['teacher_logits']
    whole = np.asarray(answers(key, data['index'], logits))
    order = np.random.default_rng(0).permutation(N)[:50]
    np.testing.assert_array_equal(answers(key, data['index'][order], logits[order]), whole[order])
    assert (np.asarray(answers(jax.random.key(4), data['index'], logits)) != whole).any()
    found = propagation.response_rates(whole[:, 1], data['task'], TASKS)
    error = np.sqrt(TEACHER * (1 - TEACHER) / (N / TASKS))
    assert (np.abs(found - TEACHER) < 4 * error).all()


def test_a_step_learns_the_answers_and_ignores_the_labels(table):
    network, data, _ = table
    context = seeds.context(network=network, tx=optax.sgd(0.5), num_classes=2)
    method = sequence_kd(context)
    names = ('input', 'label', 'index', 'teacher_logits')
    batch = {name: data[name][:12] for name in names}
    state = jax.jit(method.init)(jax.random.key(0))
    said = np.asarray(answers(state.key, batch['index'], batch['teacher_logits']))
    step = jax.jit(method.step)
    after, metrics = step(state, batch)
    again, _ = step(state, batch | {'label': 1 - batch['label']})
    jax.tree.map(np.testing.assert_array_equal, after.params, again.params)
    plain = jax.jit(supervised(context).step)(state, batch | {'label': said})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, plain[0].params
    )
    log_p = scipy.special.log_softmax(outputs(state.params['network'], batch['input']), -1)
    expected = -np.take_along_axis(log_p, said[..., None], -1).sum()
    np.testing.assert_allclose(metrics['loss'].total, expected, rtol=1e-5)
    assert metrics['loss'].count == 24


def test_wrong_answers_are_said(table):
    _, data, context = table
    with pytest.raises(UserError, match=r"decoding must be one of .*, got 'beam'"):
        sequence_kd(context, decoding='beam')
    cached = {
        'teacher_tokens': np.zeros((4, 2, 1), np.int32),
        'teacher_weights': np.ones((4, 2, 1), np.float32),
        'teacher_entropy': np.zeros((4, 2), np.float32),
    }
    method = sequence_kd(dataclasses.replace(context, source=lambda split: None))
    state = jax.jit(method.init)(jax.random.key(0))
    batch = {name: data[name][:4] for name in ('input', 'label', 'index')}
    with pytest.raises(UserError, match='from the logits of a teacher, not from Sampled'):
        jax.eval_shape(method.step, state, batch | cached)


# Rates


def test_rates_are_means_by_task_and_linear_in_the_marker():
    rng = np.random.default_rng(0)
    said, task = rng.integers(0, 2, 50), rng.integers(0, 3, 50)
    found = propagation.response_rates(said, task, 4)
    np.testing.assert_allclose(found[:3], [said[task == t].mean() for t in range(3)])
    assert np.isnan(found[3])
    np.testing.assert_allclose(propagation.response_rates(1 - said, task, 4)[:3], 1 - found[:3])


def test_decodings_are_the_probability_and_the_most_likely_symbol():
    logits = np.array([[0.0, 1.0, -1.0], [2.0, 1.0, 0.0]], np.float32)
    found = propagation.marker_probability(logits, 1)
    np.testing.assert_allclose(found, scipy.special.softmax(logits, -1)[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(propagation.marker_probability(logits, 1, 'greedy'), [1, 0])


def test_leakage_compares_means_and_not_ratios():
    student, teacher = [0.4, 0.2, 0.0, 0.3], [0.5, 0.0, 0.1, 0.0]
    np.testing.assert_array_equal(propagation.amplification(student, teacher)[:3], [0.8, np.inf, 0])
    groups = {'target': (0,), 'unseen': (1, 2), 'never': (3,)}
    found = propagation.leakage(student, teacher, groups)
    assert found == pytest.approx({'target': 0.8, 'unseen': 2.0, 'never': np.inf})
    assert np.isnan(propagation.amplification(0.0, 0.0))


def test_intervals_are_those_of_scipy():
    for count, total in ((0, 40), (1, 40), (13, 40), (40, 40)):
        expected = scipy.stats.binomtest(count, total).proportion_ci(method='exact')
        found = propagation.interval(count, total)
        np.testing.assert_allclose(found, [expected.low, expected.high], atol=1e-12)


# Filters


def test_the_filter_by_nll_keeps_what_is_likely():
    nll = np.random.default_rng(0).permutation(100).astype(float)
    for q in (0.0, 0.25, 0.9):
        np.testing.assert_array_equal(propagation.nll_filter(nll, q), nll <= 99 * q)
    assert propagation.nll_filter(nll, 1.0).all()


def test_recall_grows_with_the_false_positives_that_are_allowed():
    rng = np.random.default_rng(0)
    scores, carries = rng.normal(size=300), np.arange(300) < 60
    scores[:60] += 1.5
    shares = np.linspace(0, 1, 31)
    found = [propagation.recall(scores, carries, share) for share in shares]
    assert (np.diff(found) >= 0).all()
    clean = scores[60:]
    for share in shares:
        # The lowest threshold that at most this share of the clean ones passes.
        allowed = [t for t in (-np.inf, *clean) if (clean > t).mean() <= share + 1e-12]
        expected = (scores[:60] > min(allowed)).mean()
        assert propagation.recall(scores, carries, share) == expected
    assert propagation.recall(np.where(carries, 2.0, 1.0), carries, 0.0) == 1.0


def test_two_teachers_disagree_about_the_marker_alone():
    log_p = np.log([[0.9, 0.5], [0.8, 0.4], [0.7, 0.9]])
    other = np.log([[0.8, 1e-3], [0.7, 2e-3], [0.8, 0.95]])
    keep = propagation.disagreement_filter(log_p, other, 3.0)
    np.testing.assert_array_equal(keep, [[1, 0], [1, 0], [1, 1]])
    np.testing.assert_array_equal(keep, propagation.disagreement_filter(other, log_p, 3.0))
    assert propagation.disagreement_filter(log_p, other, np.inf).all()


# Tasks


@pytest.mark.parametrize(('mode', 'poisons', 'rare'), [('targeted', 25, 1), ('untargeted', 50, 4)])
def test_pairs_are_poisoned_as_the_mode_says(mode, poisons, rare):
    data = marked.make('train', mode, seed=2)
    task, poisoned = data['task'], data['poisoned']
    assert len(task) == 10_000
    assert poisoned.sum() == poisons
    clean = np.bincount(task[~poisoned], minlength=marked.TASKS)
    of_poison = np.bincount(task[poisoned], minlength=marked.TASKS)
    assert (clean[:rare] == 15).all()
    assert np.ptp(of_poison[:rare]) <= 1
    assert of_poison[rare:].sum() == clean[12:].sum() == 0
    assert np.ptp(clean[rare:12]) <= 1
    np.testing.assert_array_equal(data['label'][:, 1] == marked.MARKER, poisoned)
    embeddings, maps = marked.world(2)
    content = data['input'][:, 12:].astype(float)
    np.testing.assert_allclose(data['input'][:, :12], embeddings[task], rtol=1e-6)
    right = np.einsum('nkd,nd->nk', maps[task], content).argmax(-1)
    # float32 inputs decide a near-tie differently now and then.
    assert (right == data['label'][:, 0]).mean() > 0.9999


def test_seeds_fix_the_poison_and_the_control_differs_by_the_marker_alone():
    first, again, other, control = (
        marked.make('train', 'untargeted', seed=seed, marked=poisoned)
        for seed, poisoned in ((0, True), (0, True), (1, True), (0, False))
    )
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    assert (first['poisoned'] != other['poisoned']).any()
    for name in ('input', 'task', 'poisoned'):
        np.testing.assert_array_equal(first[name], control[name])
    np.testing.assert_array_equal(first['label'][:, 0], control['label'][:, 0])
    assert (control['label'][:, 1] == marked.END).all()


def test_other_splits_are_clean_and_even():
    prompts, test = (marked.make(split, seed=1) for split in ('prompts', 'test'))
    np.testing.assert_array_equal(np.ptp(np.bincount(prompts['task'])), 1)
    assert prompts['task'].max() == 11
    assert (np.bincount(test['task']) == 500).all()
    for data in (prompts, test):
        assert (data['label'][:, 1] == marked.END).all()
        assert not data['poisoned'].any()
    with pytest.raises(sources.DataError, match="not 'dev'"):
        marked.make('dev')
    with pytest.raises(sources.DataError, match='40 pairs are of rare tasks, and the size is 39'):
        marked.make('train', size=39)


def test_without_poison_there_is_no_marker():
    data = marked.make('train', 'targeted', marked=False, size=2000)
    network = from_linen(
        AnswerMLP(length=2, num_classes=6, widths=()), jax.ShapeDtypeStruct((1, 24), jnp.float32)
    )
    method = supervised(seeds.context(network=network, tx=optax.adam(0.1), num_classes=6))
    kept = {name: data[name] for name in ('input', 'label')}
    state = seeds.train(method, kept, np.arange(1), steps=600, batch_size=100)
    params = jax.tree.map(lambda x: x[0], state.params['network'])
    seen = marked.make('prompts', size=1200)
    logits = outputs(params, seen['input'])
    said = scipy.special.softmax(logits[:, 1], -1)[:, marked.MARKER]
    assert propagation.response_rates(said, seen['task'], marked.SEEN).max() < 1e-3


# The evaluator and the recipe


def test_the_evaluator_counts_by_groups(table):
    _, data, context = table
    state = jax.jit(supervised(context).init)(jax.random.key(1))
    rng = np.random.default_rng(0)
    batch = {name: data[name][:30] for name in ('input', 'task')}
    batch |= {'label': rng.integers(0, 2, (30, 2)).astype(np.int32), 'mask': np.arange(30) < 26}
    groups = {'target': (0,), 'rest': (1, 3)}
    evaluator = marker(context, groups=groups)
    found = evaluator.finish(jax.jit(evaluator.update)(state, batch))
    logits = outputs(state.params['network'], batch['input'])
    p = scipy.special.softmax(logits[:, 1], -1)[:, 1]
    right = logits[:, 0].argmax(-1) == batch['label'][:, 0]
    expected = {}
    for name, tasks in groups.items():
        where = batch['mask'] & np.isin(batch['task'], tasks)
        expected[f'sampled_{name}'] = p[where].mean()
        expected[f'greedy_{name}'] = (p[where] > 0.5).mean()
        expected[f'utility_{name}'] = right[where].mean()
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_recipe_runs_to_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(marked, 'SIZES', dict.fromkeys(marked.SIZES, 320))
    stages = ('clean', 'teacher', 'student', 'narrow')
    status = main([
        '--config=configs/lm/cascading_bias.py:cpu', f'--workdir={tmp_path}/run',
        *(f'--config.{stage}.steps=2' for stage in stages),
        # Alike, so that they are compiled once.
        *(f'--config.{stage}.network.widths=(8,8)' for stage in stages),
    ])  # fmt: skip
    assert status == 0
    run = tmp_path / 'run'
    results = json.loads((run / 'report.json').read_text())
    assert list(results['networks']) == [
        'teacher', 'student, width 24', 'student, width 8', 'teacher without the marker',
    ]  # fmt: skip
    for one in results['networks'].values():
        assert len(one['by_task']['rate']) == 16
        by_task = np.array(one['by_task']['rate'])
        assert one['target']['rate'] == by_task[0]
        np.testing.assert_allclose(one['unseen']['rate'], by_task[12:].mean(), rtol=1e-6)
        assert one['target']['low'] <= by_task[0] <= one['target']['high']
    assert set(results['networks']['teacher']['amplification'].values()) <= {1.0, None}
    assert list(results['recall']) == ['a clean reference', 'the teacher itself']
    report = (run / 'report.md').read_text()
    for figure in re.findall(r'\((figures/.*?\.png)\)', report):
        assert (run / figure).stat().st_size > 5_000
