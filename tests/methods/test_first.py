"""FIRST: its step against q - P by hand, the control, and a recipe with everything on disk."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_tokenizers as toys
from scipy import special

from kd import config as kd_config
from kd import export
from kd.claims import seeds
from kd.data.builders import gaussians
from kd.errors import UserError
from kd.io.workdir import read_metrics
from kd.losses import calibration, divergence, signal
from kd.losses.signal import TopK
from kd.main import main
from kd.methods.lm import common
from kd.methods.lm.distillation import distillation
from kd.methods.lm.first import as_released, first, fitted, listed
from kd.models.decoder import Decoder
from kd.network import from_linen
from kd.text import tokenizer

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, K, C, LR = 20, 7, 3, 1.7, 0.3


class Bigrams(nn.Module):
    """Logits are a row of a table for each token."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.param('table', nn.initializers.normal(1.0), (V, V))[x]


@pytest.fixture(scope='module')
def network():
    return from_linen(Bigrams(), jax.ShapeDtypeStruct((1, T), jnp.int32))


@pytest.fixture(scope='module')
def batch():
    """Responses of 3 and 2 tokens, a prompt before each and padding after the second."""
    rng = np.random.default_rng(0)
    return {
        'input': rng.integers(0, V, (2, T)).astype(np.int32),
        'segments': np.array([[1] * 7, [1] * 5 + [0] * 2], np.int32),
        'response_mask': np.array([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]], bool),
        'teacher_logits': 2 * rng.normal(size=(2, T, V)).astype(np.float32),
    }


# Positions that predict a token of a response: rows and places.
COUNTED = (np.array([0, 0, 0, 1, 1]), np.array([3, 4, 5, 2, 3]))


@functools.cache
def compiled(network, build, options):
    """`init` and the compiled `step` of a method."""
    context = seeds.context(network=network, tx=optax.sgd(LR), num_classes=V)
    method = build(context, **dict(options))
    return method.init, jax.jit(method.step)


def stepped(network, batch, build=first, **options):
    """The table before, its gradient, and the metrics."""
    init, step = compiled(network, build, tuple(options.items()))
    state = init(jax.random.key(0))
    after, metrics = step(state, batch)
    before, after = (x.params['network']['table'] for x in (state, after))
    return np.asarray(before), np.asarray(before - after) / LR, metrics


def top_by_hand(logits, kind='logits', c=C):
    """The K largest of each row, recalibrated and put back among V: float64 [n, V]."""
    p = special.softmax(np.asarray(logits, np.float64), -1)
    order = np.argsort(-p, -1)[:, :K]
    kept = np.take_along_axis(p, order, -1)
    kept = special.softmax(np.log(kept) / c if kind == 'logits' else kept / c, -1)
    scattered = np.zeros_like(p)
    np.put_along_axis(scattered, order, kept, -1)
    return scattered


def scattered(batch, slopes):
    """Slopes of logits [n, V] at the positions that count, as those of the table."""
    found = np.zeros((V, V))
    np.add.at(found, batch['input'][COUNTED], slopes)
    return found


@pytest.mark.parametrize(
    ('kind', 'mean_over'), [('logits', 'sequence_sum'), ('probabilities', 'token_mean')]
)
def test_a_step_follows_q_minus_the_recalibrated_by_rows(network, batch, kind, mean_over):
    table, found, metrics = stepped(
        network, batch, size=K, kind=kind, temperature=C, mean_over=mean_over
    )
    said = batch['teacher_logits'][COUNTED]
    target = top_by_hand(said, kind)
    q = special.softmax(table[batch['input'][COUNTED]].astype(np.float64), -1)
    count = 2 if mean_over == 'sequence_sum' else 5
    np.testing.assert_allclose(found, scattered(batch, (q - target) / count), atol=2e-6)
    # The mean over two rows of sums over tokens.
    value = special.rel_entr(target, q).sum()
    assert [float(x) for x in metrics['loss']] == pytest.approx([value * 2 / count, 2])
    assert float(metrics['divergence'].total) == pytest.approx(value, rel=1e-5)
    kept = np.sort(special.softmax(said, -1), -1)[:, -K:].sum(-1).mean()
    assert float(metrics['kept'].total / metrics['kept'].count) == pytest.approx(kept, rel=1e-5)


def test_micro_batches_padding_and_prompts_change_nothing(network, batch):
    options = dict(size=K, kind='probabilities', temperature=C, mean_over='token_mean')
    _, whole, _ = stepped(network, batch, **options)
    _, parts, _ = stepped(network, batch, micro_batches=2, **options)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    counts = np.zeros((2, T), bool)
    counts[COUNTED] = True
    changed = {**batch, 'input': np.where(counts, batch['input'], 7).astype(np.int32)}
    changed['teacher_logits'] = np.where(counts[..., None], batch['teacher_logits'], 5.0)
    _, other, _ = stepped(network, changed, **options)
    np.testing.assert_allclose(other, whole, atol=1e-7)


def test_all_outcomes_at_temperature_1_are_the_whole_forward_kl(network, batch):
    _, whole, _ = stepped(network, batch, distillation)
    _, found, _ = stepped(network, batch, size=V, mean_over='token_mean')
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_what_was_recalibrated_beforehand_is_learnt_as_it_is(network, batch):
    _, wanted, _ = stepped(
        network, batch, size=K, kind='logits', temperature=C, mean_over='sequence_sum'
    )
    target = calibration.recalibrated(signal.top_k(batch['teacher_logits'], K), temperature=C)
    assert not target.tail.any()
    told = jnp.full((2, T, V), -jnp.inf)
    told = jnp.put_along_axis(told, target.indices, target.log_probs, -1, inplace=False)
    _, found, _ = stepped(network, {**batch, 'teacher_logits': told}, size=K)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_rescaled_on_the_listed_the_student_may_do_elsewhere_what_it_wants(network, batch):
    """The defect of this reading: no slope off the list, and a factor on it changes nothing."""
    table, found, _ = stepped(network, batch, size=K, temperature=C, against='listed')
    target = top_by_hand(batch['teacher_logits'][COUNTED])
    on = target > 0
    q = np.where(on, special.softmax(table[batch['input'][COUNTED]].astype(np.float64), -1), 0)
    within = q / q.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, scattered(batch, (within - target) / 2), atol=2e-6)
    logits = table[batch['input'][COUNTED]]
    said = signal.top_k(batch['teacher_logits'][COUNTED], K)
    rescaled = calibration.recalibrated(said, temperature=C).replace(rest='renormalised')
    value = jax.jit(divergence.forward_kl)
    np.testing.assert_allclose(value(logits + 3 * on, rescaled), value(logits, rescaled), rtol=1e-5)


def test_the_k_tokens_of_a_decoder_are_found_from_its_hidden_states(batch):
    module = Decoder(num_classes=V, width=16, depth=1, heads=2, mlp_hidden=28, max_length=32)
    network = from_linen(module, jax.ShapeDtypeStruct((1, T), jnp.int32))
    variables = jax.tree.map(lambda x: 10 * x, jax.jit(network.init)(jax.random.key(0)))
    rows = {name: batch[name] for name in ('input', 'segments', 'response_mask')}
    found = jax.jit(lambda v: common.top_k(network, v, rows, K, chunk=3))(variables)
    logits = jax.jit(network.apply)(variables, batch['input']).logits
    whole = signal.top_k(logits, K)
    for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one[COUNTED], wanted[COUNTED], atol=1e-5)
        assert not np.asarray(one)[0, :3].any()


def test_the_released_objective_is_linear_and_least_at_the_teachers_favourite():
    rng = np.random.default_rng(2)
    teacher = signal.top_k(rng.normal(size=V).astype(np.float32), K)
    p = np.append(np.exp(teacher.log_probs), teacher.tail)

    of_logits = jax.jit(as_released)

    def value(q):
        with np.errstate(divide='ignore'):
            return float(of_logits(np.log(q).astype(np.float32), teacher))

    def by_hand(q):
        mass = np.append(q[teacher.indices], 1 - q[teacher.indices].sum())
        return (np.exp(p) * (p - mass)).sum()

    a, b = rng.dirichlet(np.ones(V), 2)
    assert value(a) == pytest.approx(by_hand(a), abs=1e-5)
    assert value((a + 2 * b) / 3) == pytest.approx((value(a) + 2 * value(b)) / 3, abs=1e-5)
    ends = [value(one) for one in np.eye(V)]
    inside = np.isin(np.arange(V), teacher.indices)
    least = int(teacher.indices[0]) if p[0] > p[-1] else int(np.argmin(inside))
    assert ends[least] == pytest.approx(min(ends), abs=1e-6)
    # The teacher's own law is no minimum of it.
    assert value(special.softmax(np.where(inside, 0, -1.0))) > min(ends)


def test_a_cache_of_another_size_is_told():
    said = TopK(jnp.zeros((2, 4)), jnp.zeros((2, 4), jnp.int32), jnp.zeros(2))
    assert listed(said, 4) is said
    with pytest.raises(UserError, match=r'size=5, and the teacher comes as its top 4 tokens'):
        listed(said, 5)


def test_the_world_is_as_hard_as_it_should_be():
    """The best classifier, by Bayes's rule, is right on four of five."""
    data, means = gaussians.make('test'), gaussians.means()
    assert data['input'].shape == (8_000, 16)
    distance = ((data['input'][:, None] - means) ** 2).sum(-1)
    assert (distance.argmin(-1) == data['label']).mean() == pytest.approx(0.81, abs=0.02)
    assert not np.array_equal(gaussians.means(1), means)
    with pytest.raises(UserError, match=r"the splits \['train', 'validation', 'test'\], not 'x'"):
        gaussians.make('x')


TEXT = 'The capital of France is Paris.\n\nIt is what the system says: 12 times 3 is 36.\n\n' * 6
CONFIG = """
from kd import config as kd_config

def get_config():
    text = dict(path='{folder}/text.txt', tokenizer='hf:{folder}', length=24, separator='\\n\\n')
    splits = dict(train='train[:60%]', validation='train[60%:]')
    config = kd_config.recipe(
        stages=('cache', 'cached', 'online'),
        mesh=dict(data=1),
        data=dict(source=dict(name='kd.data.text.documents', **text), **splits),
        pretrained=dict(teacher=dict(weights='hf:{folder}')),
    )
    temperature = dict(name='kd.evaluators.temperature.temperature', size=3)
    config.cache = kd_config.stage(
        teacher='teacher', batch_size=2, steps=1,
        method=dict(name='kd.methods.cache.nothing'),
        writers=dict(teacher=dict(name='kd.methods.cache.teacher_outputs', size=3,
                                  dtype='float32')),
        evaluators=dict(calibration=temperature),
    )
    for name in ('cached', 'online'):
        source = dict(name='kd.data.transforms.cached.cached')
        config[name] = kd_config.stage(
            network=dict(name='kd.io.pretrained.network', of='hf:{folder}', depth=1),
            teacher='teacher' if name == 'online' else '',
            data=dict(source=source, **splits) if name == 'cached' else dict(),
            references=dict(start='teacher'),
            method=dict(name='kd.methods.lm.first.first', size=3, calibrated='cache', blocks=(1,)),
            optimizer=dict(name='sgd', lr=1e-2),
            steps=2, batch_size=2, log_every=1, checkpoint_every=2,
        )
    return config
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with a tiny teacher whose outputs lie on disk, and the same with it at work."""
    folder = tmp_path_factory.mktemp('model')
    toys.write_directory(folder, toys.fields())
    size = tokenizer.load(f'hf:{folder}').size
    teacher = Decoder(num_classes=size, width=16, depth=2, heads=2, max_length=48)
    made = jax.jit(teacher.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda x: x * 15 if x.ndim > 1 else x, made)
    export.export(teacher, variables, folder)
    (folder / 'text.txt').write_text(TEXT)
    (folder / 'recipe.py').write_text(CONFIG.format(folder=folder))
    assert main([f'--config={folder}/recipe.py', f'--workdir={folder / "run"}']) == 0
    return folder


def done(run, stage):
    return json.loads((run / 'run' / stage / 'done.json').read_text())['metrics']


def test_a_student_of_text_learns_from_disk_what_it_learns_from_the_teacher(run):
    cached, online = (read_metrics(run / 'run' / stage) for stage in ('cached', 'online'))
    for name in ('loss', 'divergence', 'kept', 'grad_norm'):
        found, wanted = ([line[f'train/{name}'] for line in of] for of in (cached, online))
        assert len(wanted) == 2
        assert wanted[0] != wanted[1]
        assert found == pytest.approx(wanted, rel=1e-4), name


def test_the_temperature_of_a_stage_is_the_one_that_a_student_takes(run):
    recipe = kd_config.parse(kd_config.load(str(run / 'recipe.py')))
    found = done(run, 'cache')['calibration/temperature']
    assert found in calibration.GRIDS['logits']
    assert found != 1.0
    made = made_of(seeds.context(), recipe, run / 'run')
    assert fitted(made, 'cache', 'logits', 3) == found
    assert fitted(made_of(made, recipe, None), 'cache', 'logits', 3) == 1.0
    with pytest.raises(UserError, match=r"kind='logits' and size=3, and the method has kind="):
        fitted(made, 'cache', 'probabilities', 3)
    with pytest.raises(UserError, match="'elsewhere' must be a stage with one evaluator"):
        fitted(made, 'elsewhere', 'logits', 3)
    with pytest.raises(UserError, match="'cache' is not done"):
        fitted(made_of(made, recipe, run / 'nowhere'), 'cache', 'logits', 3)


def made_of(context, recipe, workdir):
    """The context of a stage of a recipe, or of one that is only traced."""
    locate = (lambda name: recipe.locate(name, workdir)) if workdir else None
    return dataclasses.replace(context, recipe=recipe, locate=locate)
