"""SODA: pairs with the student's own first answers, and the step of DPO from the fine-tuned one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd import config as kd_config
from kd.claims import seeds
from kd.errors import UserError
from kd.io import safetensors
from kd.main import main
from kd.methods.lm.preference import REFERENCE
from kd.methods.lm.soda import INITIAL, soda, with_own_answers
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.parallel.mesh import make_mesh
from kd.state import State
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, V, LR, BETA = 64, 6, 0.5, 0.3


@pytest.fixture(scope='module')
def network():
    module = BottleneckLM(num_classes=V, embedding=5, width=4)
    return from_linen(module, jax.ShapeDtypeStruct((1, 2), jnp.int32))


@pytest.fixture(scope='module')
def frozen(network):
    """q_0, and q_w as start and as reference."""
    init = jax.jit(network.init)
    initial, warm = (jax.tree.map(lambda x: 3 * x, init(jax.random.key(seed))) for seed in (0, 1))
    return {'start': warm, REFERENCE: warm, INITIAL: initial}


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'input': rng.integers(0, V, (B, 2)).astype(np.int32),
        'label': rng.integers(0, V, B).astype(np.int32),
        'index': np.arange(100, 100 + B, dtype=np.int32),
    }


@pytest.fixture(scope='module')
def context(network):
    return seeds.context(
        network=network,
        tx=optax.sgd(LR),
        references=dict.fromkeys(('start', REFERENCE, INITIAL), network),
    )


@pytest.fixture(scope='module')
def paired(context, frozen):
    """`with_own_answers` of a state with other parameters and another key, by seed."""

    @jax.jit
    def made(batch, seed, run):
        params = jax.tree.map(lambda x: x + run, frozen['start'])
        state = State.create(jax.random.key(run), params, frozen=frozen)
        return with_own_answers(context, state, batch, jax.random.key(seed))

    return made


def log_q(network, variables, batch):
    return special.log_softmax(network.apply(variables, batch['input']).logits, -1)


def test_rejected_answers_are_of_the_first_student_and_of_nothing_else(
    network, frozen, batch, paired
):
    made = paired(batch, 0, 0)
    np.testing.assert_array_equal(made['label'][:, 0], batch['label'])
    np.testing.assert_array_equal(made['input'], np.stack([batch['input']] * 2, 1))
    own = np.asarray(made['label'][:, 1])
    # Bit for bit the same in another run, at another step, in another order.
    np.testing.assert_array_equal(paired(batch, 0, 5)['label'][:, 1], own)
    turned = {name: value[::-1] for name, value in batch.items()}
    np.testing.assert_array_equal(paired(turned, 0, 0)['label'][::-1, 1], own)
    assert (paired(batch, 1, 0)['label'][:, 1] != own).any()
    # By the law of q_0: the draws of one context.
    one = {**batch, 'input': np.tile(batch['input'][:1], (B, 1))}
    draws = np.concatenate([paired(one, seed, 0)['label'][:, 1] for seed in range(100)])
    law = np.exp(log_q(network, frozen[INITIAL], one)[0])
    np.testing.assert_allclose(np.bincount(draws, minlength=V) / draws.size, law, atol=0.02)
    assert np.abs(law - np.exp(log_q(network, frozen['start'], one)[0])).max() > 0.1


def test_the_first_step_pulls_the_answers_apart_by_half_of_beta(
    network, frozen, batch, context, paired
):
    """Over the pairs of two answers; the loss is log 2, and the margin 0."""
    method = soda(context, beta=BETA)
    before = jax.jit(method.init)(jax.random.key(3), frozen)
    after, metrics = jax.jit(method.step)(before, batch)
    label = np.asarray(paired(batch, 0, 0)['label'])
    apart = label[:, 0] != label[:, 1]
    assert 0 < apart.sum() < B

    @jax.jit
    @jax.grad
    def wanted(params):
        logits = network.apply({'params': params}, batch['input']).logits
        sums = jnp.take_along_axis(jax.nn.log_softmax(logits), label, 1)
        return -BETA / 2 * ((sums[:, 0] - sums[:, 1]) * apart).sum() / apart.sum()

    followed = jax.tree.map(
        lambda x, y: (x - y) / LR, before.params['network'], after.params['network']
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        followed,
        wanted(frozen['start']['params']),
    )
    for name, value in (('loss', np.log(2)), ('margin', 0), ('accuracy', 0)):
        total, count = metrics[name]
        assert float(count) == apart.sum()
        assert float(total / count) == pytest.approx(value, abs=1e-6)


RECIPE = """
from kd import config as kd_config

PREFERENCE = 'kd.methods.lm.preference.preference'
SUMS = 'kd.methods.reference_sums.reference_sums'

def get_config():
    splits = dict(train='train', validation='validation')
    config = kd_config.recipe(
        stages=('tuned', 'sums', 'held', 'read'),
        data=dict(
            source=dict(name='kd.data.builders.table.preferences', tokens=7, size=50), **splits
        ),
        mesh=dict(data=1),
    )

    def stage(**fields):
        return kd_config.stage(
            network=dict(name='kd.models.structured.BottleneckLM', width=4),
            optimizer=dict(name='sgd', lr=1.0),
            steps=3, batch_size=16, log_every=1,
            evaluators=dict(pairs=dict(name='kd.evaluators.preference.preference')),
            **fields,
        )

    config.tuned = stage(method=dict(name=PREFERENCE, alpha=0.0))
    config.sums = kd_config.stage(
        teacher='tuned', steps=1, batch_size=16,
        method=dict(name='kd.methods.cache.nothing'),
        writers=dict(sums=dict(name=SUMS, per_file=20)),
    )
    soda = dict(name='kd.methods.lm.soda.soda', beta=2.0)
    config.held = stage(method=soda, references=dict(start='tuned', reference='tuned'))
    anchored = dict(name='kd.data.transforms.anchored.anchored')
    config.read = stage(
        method=soda, references=dict(start='tuned'), data=dict(source=anchored, **splits)
    )
    return config
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run in which a reference is held, and one in which its sums are read."""
    folder = tmp_path_factory.mktemp('soda')
    (folder / 'recipe.py').write_text(RECIPE)
    assert main([f'--config={folder}/recipe.py', f'--workdir={folder}/run']) == 0
    return folder / 'run'


def test_sums_of_the_reference_on_disk_are_as_good_as_the_reference(run):
    held, read, tuned = (
        safetensors.stage_variables(run / stage) for stage in ('held', 'read', 'tuned')
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), held, read)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), held, tuned)
    assert max(jax.tree.leaves(moved)) > 1e-3
    metrics = [
        json.loads((run / stage / 'done.json').read_text())['metrics'] for stage in ('held', 'read')
    ]
    # Of the validation split there are no sums: margins need the reference.
    assert set(metrics[0]) - set(metrics[1]) == {'pairs/margin', 'pairs/accuracy'}
    shards = sorted(file.name for file in (run / 'sums' / 'anchors').glob('*.array_record'))
    assert shards == ['00000.array_record', '00001.array_record']


def test_sums_are_of_pairs_and_of_the_same_pairs(run):
    def made(stage, **source):
        config = kd_config.load(f'{run.parent}/recipe.py')
        config.data.source.update(source)
        return prepare(kd_config.parse(config), stage, make_mesh({'data': 1}), run)

    assert made('read').context.spec['anchor_log_p'].shape == (2,)
    with pytest.raises(UserError, match='was made from another data'):
        made('read', size=40)
    with pytest.raises(UserError, match=r'sums are of pairs of answers, and table is not in pairs'):
        made('sums', name='kd.data.builders.table.table')


def test_what_cannot_be_is_told(context, network, frozen, batch):
    state = State.create(jax.random.key(0), frozen['start'], frozen=frozen)
    long = {**batch, 'label': np.stack([batch['label']] * 3, 1)}
    with pytest.raises(UserError, match=r'initial gives answers of one token, .* \[64, 3\]; '):
        with_own_answers(context, state, long, jax.random.key(0))
    with pytest.raises(UserError, match=r'compares with a reference; name one'):
        soda(seeds.context(network=network, tx=optax.sgd(LR)))
