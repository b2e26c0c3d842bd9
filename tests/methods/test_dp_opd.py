"""DP-OPD: its loss by hand, whose continuations a batch has, and what a stage promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd import config as kd_config
from kd.claims import seeds
from kd.data import sources
from kd.data.builders import markov
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.method import Privacy, minimize, private
from kd.methods import privacy as budget
from kd.methods.lm import dp_opd
from kd.models.decoder import Decoder
from kd.models.structured import TableLM
from kd.network import from_linen
from kd.state import State
from kd.theory import privacy

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, K, N, ROWS, LR = 9, 7, 3, 40, 6, 0.5


def decoder(**changes):
    made = dict(num_classes=V, width=8, depth=1, heads=2, max_length=T, deviation=None)
    fields = ('input', 'positions', 'segments')
    module = Decoder(**{**made, 'fields': fields, **changes})
    return from_linen(module, *[jax.ShapeDtypeStruct((1, T), jnp.int32)] * 3)


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def table():
    return from_linen(TableLM(V), jax.ShapeDtypeStruct((1, T), jnp.int32))


@pytest.fixture(scope='module')
def teacher(network):
    return jax.jit(network.init)(jax.random.key(7))


@pytest.fixture(scope='module')
def batch():
    """Five records in six rows: one as long as its beginning, one shorter, one cut."""
    rng = np.random.default_rng(0)
    lengths = np.array([T, T, 5, K, 2, T])
    used = np.arange(T) < lengths[:, None]
    return {
        'input': np.where(used, rng.integers(0, V, (ROWS, T)), 0).astype(np.int32),
        'positions': np.where(used, np.arange(T), 0).astype(np.int32),
        'segments': used.astype(np.int32),
        'response_mask': used & (np.arange(T) > 0),
        'mask': np.arange(ROWS) < 5,
    }


def context(network, batch, *, poisson=8, rows=N, steps=5, records=N):
    spec = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batch.items() if k != 'mask'}
    arrays = {k: np.zeros((records, *x.shape), x.dtype) for k, x in spec.items()}
    data = sources.DataSet(
        'records', {'train': records}, lambda _: sources.in_memory(arrays), spec, V
    )
    return seeds.context(
        network=network, teacher=network, tx=optax.sgd(LR), num_classes=V, steps=steps,
        batch_size=rows, poisson=poisson, spec=spec,
        source=lambda split: sources.Source(data, split),
    )  # fmt: skip


@pytest.fixture(scope='module')
def step(network, teacher, batch):
    """`step(params, batch, beta)`: what a step without bound and noise descends along."""

    def make(beta):
        loss = dp_opd.distillation(context(network, batch), beta)
        return jax.jit(plain(loss, network).step)

    steps = {beta: make(beta) for beta in (0.0, 0.3)}

    def run(params, batch, beta=0.0):
        state = started(params).replace(frozen={'teacher': teacher})
        after, metrics = steps[beta](state, batch)
        return moved(state, after), metrics

    return run


def plain(loss, network, expected=5):
    along = private(Privacy(1e9, 0.0, expected))
    return minimize(loss, optax.sgd(LR), network.init, along=along)


def started(params):
    return State.create(jax.random.key(0), {'params': params}, optax.sgd(LR).init(params))


def moved(before, after):
    params = (state.params['network'] for state in (before, after))
    return jax.tree.map(lambda x, y: (x - y) / LR, *params)


@pytest.fixture(scope='module')
def params(network):
    return jax.jit(network.init)(jax.random.key(0))['params']


@pytest.fixture(scope='module')
def logits(network, batch):
    return jax.jit(lambda params: network.apply({'params': params}, *network.of(batch)).logits)


def shares(where):
    """How much each token counts in a mean over five records of the means over their tokens."""
    return where[:5] / np.maximum(where[:5].sum(1, keepdims=True), 1) / 5


def own_text(network, batch):
    """The batch as it is where the records' own text goes on."""
    return jax.jit(dp_opd.continuations(context(network, batch), K, 0.0))(
        None, batch, jax.random.key(0)
    )


@pytest.mark.parametrize('beta', [0.0, 0.3])
def test_with_the_records_own_text_it_is_a_mean_of_each_record_and_then_of_all(
    network, teacher, params, logits, batch, step, beta
):
    found, metrics = step(params, own_text(network, batch), beta)
    log_p, log_q = (
        special.log_softmax(np.asarray(logits(x), np.float64), -1)[:5, :-1]
        for x in (teacher['params'], params)
    )
    p, q = np.exp(log_p), np.exp(log_q)
    if beta:
        # The gradient in the logits of beta KL(p || m) + (1 - beta) KL(q || m).
        ratio = log_q - np.log(beta * p + (1 - beta) * q)
        slope = (1 - beta) * q * (ratio - (q * ratio).sum(-1, keepdims=True))
    else:
        slope = q - p
    # Tokens from the third on count, of records that have any.
    where = (batch['response_mask'] & (np.arange(T) >= K))[:, 1:]
    wanted = np.zeros((ROWS, T, V), np.float32)
    wanted[:5, :-1] = slope * shares(where)[..., None]
    pull = jax.jit(lambda params, slope: jax.vjp(logits, params)[1](slope)[0])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, pull(params, wanted)
    )
    assert (int(metrics['records'].total), int(metrics['loss'].count)) == (5, 3)


def test_the_baseline_is_the_same_with_the_tokens_of_the_records(table, batch):
    law = np.random.default_rng(3).normal(size=(V, V, V)).astype(np.float32)
    method = plain(dp_opd.cross_entropy(context(table, batch)), table)
    state = started({'table': jnp.asarray(law)})
    after, _ = jax.jit(method.step)(state, batch)
    tokens, q = batch['input'], special.softmax(law, -1)
    wanted = np.zeros((V, V, V))
    weights = shares(batch['response_mask'][:, 1:])
    for row, place in np.argwhere(weights):
        at = (tokens[row, place - 1] if place else 0), tokens[row, place]
        wanted[at] += weights[row, place] * (q[at] - np.eye(V)[tokens[row, place + 1]])
    np.testing.assert_allclose(moved(state, after)['table'], wanted, atol=1e-6)


def test_continuations_are_the_students_and_as_new_as_its_parameters(
    network, teacher, params, batch, step
):
    made, state = context(network, batch), started(params)
    collect = jax.jit(dp_opd.continuations(made, K, 1.0))
    found = collect(state, batch, jax.random.key(1))
    read = batch['segments'].sum(1) > K - 1
    np.testing.assert_array_equal(found['input'][read, :K], batch['input'][read, :K])
    # A record that is shorter than the beginning has no continuation; a cut one goes on.
    np.testing.assert_array_equal(found['response_mask'], read[:, None] & (np.arange(T) >= K))
    np.testing.assert_array_equal(found['mask'], batch['mask'])
    again = collect(state, batch, jax.random.key(1))['input']
    np.testing.assert_array_equal(again, found['input'])
    others = [
        collect(state, batch, jax.random.key(2)),
        collect(state.with_params(teacher['params']), batch, jax.random.key(1)),
    ]
    for other in others:
        assert (other['input'][read] != found['input'][read]).mean() > 0.1
    # What a record is answered does not depend on the others.
    swapped = {**batch, 'input': batch['input'].copy()}
    swapped['input'][1] = 5
    other = collect(state, swapped, jax.random.key(1))['input']
    np.testing.assert_array_equal(np.delete(other, 1, 0), np.delete(found['input'], 1, 0))
    # With lambda 0 they are the records' own.
    own = own_text(network, batch)
    np.testing.assert_array_equal(own['input'][read], batch['input'][read])
    # On either, a teacher that is the student teaches nothing; another one does.
    for text in (own, found):
        nothing, _ = step(teacher['params'], text)
        assert max(float(np.abs(x).max()) for x in jax.tree.leaves(nothing)) < 1e-6
        something, metrics = step(params, text)
        assert max(float(np.abs(x).max()) for x in jax.tree.leaves(something)) > 1e-2
    assert int(metrics['loss'].count) == 4


def test_a_stage_spends_what_it_promises_and_moves_by_noise_where_nothing_is_said(table, batch):
    rows = {name: np.resize(x, (N, *x.shape[1:])) for name, x in batch.items()}
    rows['mask'] = np.zeros(N, bool)
    made = context(table, batch)
    method = dp_opd.dp_sgd(made, clip_norm=0.7, epsilon=2.0, delta=1e-3)
    promised = budget.guarantee(made, 2.0, 1e-3)
    sigma = privacy.noise_multiplier(2.0, 1e-3, 0.2, 5)
    assert promised.noise_multiplier == pytest.approx(sigma, rel=1e-6)
    state = jax.jit(method.init)(jax.random.key(0), {})
    step, before = jax.jit(method.step), state
    for n in range(1, 7):
        state, metrics = step(state, rows)
        spent = privacy.spent(0.2, sigma, n, 1e-3)
        assert float(metrics['epsilon'].total) == pytest.approx(spent, rel=1e-5)
        if n == 5:
            assert float(metrics['epsilon'].total) == pytest.approx(2.0, rel=1e-5)
    # Six steps of sigma C / B each, and no record.
    assert np.std(moved(before, state)['table']) == pytest.approx(
        np.sqrt(6) * sigma * 0.7 / 8, rel=0.15
    )
    # By default delta is N^-1.1.
    assert budget.guarantee(made, 2.0).delta == pytest.approx(N**-1.1)


@pytest.mark.parametrize(
    ('changes', 'arguments', 'message'),
    [
        (dict(poisson=0), {}, r'privacy is accounted for batches that coins decide; set stage\.po'),
        (dict(poisson=8, rows=12), {}, r'batch_size=12 is too few rows for 8 .* take \d+ or more'),
        (dict(poisson=60, rows=60), {}, r'stage\.poisson=60 exceeds the 40 records'),
        ({}, dict(epsilon=1e-4), r'stage\.method: epsilon=0\.0001 is out of reach at delta'),
        ({}, dict(prompt=T), r'method\.prompt=7 leaves nothing of rows of 7 tokens'),
    ],
)
def test_what_cannot_be_promised_is_told(network, batch, changes, arguments, message):
    with pytest.raises(UserError, match=message):
        dp_opd.dp_opd(
            context(network, batch, **changes), clip_norm=1.0, **{'prompt': K, **arguments}
        )


def test_rows_that_are_said_to_be_enough_are(network, batch):
    with pytest.raises(UserError) as told:
        budget.guarantee(context(network, batch, poisson=8, rows=12), 2.0)
    enough = int(str(told.value).split('take ')[1].split()[0])
    budget.guarantee(context(network, batch, poisson=8, rows=enough), 2.0)
    with pytest.raises(UserError, match='too few rows'):
        budget.guarantee(context(network, batch, poisson=8, rows=enough - 1), 2.0)


def test_data_without_rows_of_text_is_told(network, batch):
    bare = {name: x for name, x in batch.items() if name != 'response_mask'}
    with pytest.raises(UserError, match=r"has no rows of text; .* with layout='rows'"):
        dp_opd.dp_opd(context(network, bare), prompt=K, clip_norm=1.0)


# The language.


def test_dialects_are_mixed_as_they_say_and_records_follow_their_law():
    public, domain, teacher = (markov.law(name, 3) for name in ('public', 'domain', 'teacher'))
    np.testing.assert_allclose(teacher, 0.85 * domain + 0.15 * public, atol=1e-5)
    other = (domain - 0.5 * public) / 0.8
    assert abs(np.corrcoef(other.ravel(), public.ravel())[0, 1]) < 0.2
    tokens = markov.make('train', size=20_000, seed=3)['input']
    chosen = special.log_softmax(domain, -1)
    contexts = chosen[tokens[:, 1:-2], tokens[:, 2:-1]]
    said = np.take_along_axis(contexts, tokens[:, 3:, None], -1)
    # The mean surprise is the entropy of the contexts met, and far below that of chance.
    entropy = -(np.exp(contexts) * contexts).sum(-1).mean()
    assert -said.mean() == pytest.approx(entropy, abs=0.01)
    assert 3.5 < np.exp(entropy) < 7
    # Tables are the next token's by the two before.
    table = from_linen(TableLM(markov.TOKENS), jax.ShapeDtypeStruct((1, 20), jnp.int32))
    logits = table.apply({'params': {'table': domain}}, tokens[:4]).logits
    np.testing.assert_allclose(logits[:, 1:], domain[tokens[:4, :-1], tokens[:4, 1:]])


def test_splits_of_the_language_differ_and_others_are_told():
    recipe = kd_config.Recipe(stages={}, data={}, seed=2)
    found = {
        split: markov.markov(SourceContext(split, recipe), size=50).fetch(np.arange(50))
        for split in ('train', 'validation')
    }
    assert (found['train']['input'] != found['validation']['input']).mean() > 0.8
    np.testing.assert_array_equal(found['train']['response_mask'].sum(1), markov.LENGTH - 2)
    with pytest.raises(sources.DataError, match=r"the language has the splits .*, not 'tests'"):
        markov.markov(SourceContext('tests', recipe))
