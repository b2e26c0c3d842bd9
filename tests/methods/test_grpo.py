"""GRPO and what methods on rollouts share, against plain forward passes and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd.claims import seeds
from kd.errors import UserError
from kd.method import with_nonfinite_guard
from kd.methods.rl import common
from kd.methods.rl.grpo import grpo
from kd.models.decoder import Decoder
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.parallel import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, P, R, G, LR, EOS = 12, 5, 4, 4, 0.5, 2
SHAPE = jax.ShapeDtypeStruct((1, P), jnp.int32)
SPEC = {
    'input': jax.ShapeDtypeStruct((P,), jnp.int32),
    'prompt_mask': jax.ShapeDtypeStruct((P,), bool),
}
SAMPLING = dict(group=G, max_new=R, stop=(EOS,), forbidden=(0, 1))


def even(context):
    """1 where the first token is even."""
    return lambda tokens, mask, batch: jnp.where(tokens[:, 0] % 2, 0.0, 1.0)


def constant(context, value):
    return lambda tokens, mask, batch: jnp.full(len(tokens), value)


def half_unjudged(context):
    """No verdict on odd answers."""
    return lambda tokens, mask, batch: jnp.where(tokens[:, 0] % 2, jnp.nan, 1.0)


def decoder(**changes):
    made = dict(num_classes=V, width=16, depth=1, heads=2, mlp_hidden=24, max_length=32)
    return from_linen(Decoder(**{**made, **changes}), SHAPE)


def sharp(network, seed):
    """Variables far from where they start, so that laws are far from uniform."""
    variables = jax.jit(network.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, variables)


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= P - np.array([P, 3, 1, 4])[:, None]
    tokens = np.where(mask, rng.integers(3, V, mask.shape), 0).astype(np.int32)
    return {'input': tokens, 'prompt_mask': mask}


def context(network, **fields):
    fields = {'optimizer': dict(name='sgd', lr=LR), 'steps': 10, 'spec': SPEC, **fields}
    return seeds.context(network=network, batch_size=4, **fields)


def method(network, reward='even', *, fields=(), sampling=(), **options):
    block = dict(name=f'test_grpo.{reward}') if isinstance(reward, str) else reward
    made = grpo(
        context(network, **dict(fields)),
        reward=block,
        sampling={**SAMPLING, **dict(sampling)},
        chunk=32,
        **options,
    )
    return with_nonfinite_guard(made, 'skip')


def begun(made, network, seed=1, frozen=None):
    state = jax.jit(made.init)(jax.random.key(0), frozen or {})
    return state.replace(params={'network': sharp(network, seed)['params']})


def stepped(made, network, batch, **options):
    state = begun(made, network, **options)
    return state, *jax.jit(made.step)(state, batch)


def value(metrics, name):
    total, count = metrics[name]
    return float(total / count)


def laws(network, variables, batch, temperature=1.0):
    """log-probabilities [B, R, V] of every answer, each row by itself without any padding."""
    found = np.zeros((*batch['tokens'].shape, V))
    for row in range(len(found)):
        asked = batch['input'][row][batch['prompt_mask'][row]]
        said = batch['tokens'][row][batch['mask'][row]]
        tokens = np.concatenate([asked, said])[None]
        logits = np.array(network.apply(variables, tokens).logits[0], np.float64) / temperature
        logits[:, :2] = -np.inf
        at = slice(len(asked) - 1, len(asked) - 1 + len(said))
        found[row, : len(said)] = special.log_softmax(logits[at], -1)
    return found


def answered(network, batch, seed=1, reward='even', **options):
    """The batch of answers that a step makes, as NumPy, and the policy that made it."""
    of = context(network)
    sampling = common.Sampling(**{**SAMPLING, **options.pop('sampling', {})})
    draw = common.drawing(of, sampling)
    judge = common.of_block(of, dict(name=f'test_grpo.{reward}'))
    collect = common.rollouts(of, draw, judge, group=G, **options)
    state = begun(method(network), network, seed)
    made = jax.jit(collect)(state, batch, jax.random.key(5))
    return jax.tree.map(np.asarray, made), state.variables(), draw


def test_a_batch_of_answers(network, batch):
    made, _, _ = answered(network, batch, aggregation='token_mean', overlong=2)
    assert made['tokens'].shape == (16, R)
    np.testing.assert_array_equal(made['input'], np.repeat(batch['input'], G, axis=0))
    np.testing.assert_array_equal(made['rewards'], made['tokens'][:, 0] % 2 == 0)
    wanted = made['mask'] * 16 / made['mask'].sum()
    np.testing.assert_allclose(made['weight'], wanted, rtol=1e-6)
    # The penalty is part of what is compared, and not of the reward.
    lengths = made['mask'].sum(1)
    valued = (made['rewards'] - np.clip((lengths - 2) / 2, 0, 1)).reshape(4, G)
    centred = valued - valued.mean(1, keepdims=True)
    wanted = centred / (valued.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(made['advantage'].reshape(4, G), wanted, atol=1e-5)
    np.testing.assert_array_equal(made['dead'], np.repeat(np.ptp(valued, axis=1) == 0, G))
    assert len(np.unique(lengths)) > 1
    assert (made['decoded'] == lengths.max()).all()


@pytest.mark.parametrize('sampling', [{}, dict(temperature=0.6, top_p=0.8)])
def test_scores_are_those_of_rows_alone_and_of_the_sampler(network, batch, sampling):
    made, variables, draw = answered(network, batch, sampling=sampling)
    found = jax.jit(lambda b: common.score(network, variables, b, draw, chunk=32))(made)
    law = laws(network, variables, made, sampling.get('temperature', 1.0))
    chosen = np.take_along_axis(law, made['tokens'][..., None], -1)[..., 0]
    wanted = np.where(made['mask'], chosen, 0)
    np.testing.assert_allclose(found.log_probs, wanted, atol=1e-4)
    np.testing.assert_allclose(made['sampler_log_probs'], wanted, atol=1e-4)
    p = np.exp(law)
    entropy = -np.where(p > 0, p * np.where(p > 0, law, 0), 0).sum(-1)
    np.testing.assert_allclose(found.entropy, np.where(made['mask'], entropy, 0), atol=1e-4)
    parts = jax.jit(lambda b: common.score(network, variables, b, draw, chunk=32, parts=4))(made)
    np.testing.assert_allclose(parts.log_probs, found.log_probs, atol=1e-6)


def test_a_step_is_reinforce_with_advantages_of_the_group(network, batch):
    """The gradient at rho = 1 is that of -mean_i mean_t A_i log p_it, by plain forward passes."""
    made = method(network)
    before, after, metrics = stepped(made, network, batch)
    # What the step has sampled.
    rolled = {}

    def spied(tokens, mask, batch):
        rolled.update(tokens=tokens, mask=mask, batch=batch)
        return jnp.where(tokens[:, 0] % 2, 0.0, 1.0)

    of = context(network)
    draw = common.drawing(of, common.Sampling(**SAMPLING))
    collect = common.rollouts(of, draw, spied, group=G)
    key = jax.random.fold_in(before.step_key(), __import__('zlib').crc32(b'collect'))
    whole = jax.jit(collect)(before, batch, key)

    @jax.jit
    @jax.grad
    def slope(params):
        tokens = jnp.concatenate([whole['input'], whole['tokens']], 1)
        there = jnp.concatenate([whole['prompt_mask'], whole['mask']], 1)
        logits = network.apply(
            {'params': params}, tokens, jnp.maximum(there.cumsum(1) - 1, 0), there.astype(int)
        ).logits[:, P - 1 : -1]
        log_q = jax.nn.log_softmax(logits.at[..., :2].set(-jnp.inf))
        log_p = jnp.take_along_axis(log_q, whole['tokens'][..., None], -1)[..., 0]
        log_p = jnp.where(whole['mask'], log_p, 0)
        return -(whole['advantage'] * log_p.sum(1) / whole['mask'].sum(1)).mean()

    wanted = slope(before.params['network'])
    moved = jax.tree.map(lambda x, y: (x - y) / LR, before.params, after.params)['network']
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), moved, wanted)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-2
    assert value(metrics, 'reward') == pytest.approx(float(whole['rewards'].mean()))
    assert value(metrics, 'ratio') == 1
    assert value(metrics, 'clip_fraction') == 0
    assert value(metrics, 'dead_groups') == pytest.approx(float(whole['dead'].mean()))
    assert value(metrics, 'sampler_ratio') == pytest.approx(1, abs=1e-4)
    assert value(metrics, 'length') == pytest.approx(float(whole['mask'].sum(1).mean()))
    share = whole['mask'].sum() / whole['decoded'].sum()
    assert value(metrics, 'sampling/fill') == pytest.approx(float(share))


@pytest.mark.parametrize('verdict', [0.0, 1.0, np.nan])
@pytest.mark.parametrize('updates', [1, 2])
def test_groups_of_equal_rewards_teach_nothing(network, batch, verdict, updates):
    made = method(network, dict(name='test_grpo.constant', value=verdict), updates=updates)
    before, after, metrics = stepped(made, network, batch)
    assert value(metrics, 'loss') == 0
    assert value(metrics, 'grad_norm') == 0
    assert value(metrics, 'nonfinite') == 0
    assert value(metrics, 'dead_groups') == 1
    assert value(metrics, 'unjudged') == np.isnan(verdict)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_answers_without_a_verdict_are_0_and_counted(network, batch):
    made, _, _ = answered(network, batch, reward='half_unjudged')
    odd = made['tokens'][:, 0] % 2 == 1
    np.testing.assert_array_equal(made['unjudged'], odd)
    np.testing.assert_array_equal(made['rewards'], ~odd)
    assert np.isfinite(made['advantage']).all()


def close(first, second, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)


OPTIONS = dict(updates=4, parts=2, aggregation='token_mean', high=0.28)


def test_micro_batches_change_nothing(network, batch):
    whole, torn = (stepped(method(network, micro_batches=m, **OPTIONS), network, batch)
                   for m in (1, 4))  # fmt: skip
    close(whole[1].params, torn[1].params)
    for name in set(whole[2]) - {'grad_norm'}:
        assert value(whole[2], name) == pytest.approx(value(torn[2], name), abs=1e-4), name
    # Clipping bites in the later updates, whose old policy stays that of the samples.
    assert value(whole[2], 'clip_fraction') > 0
    assert value(whole[2], 'ratio_max') > 1.01


def test_devices_change_nothing(network, batch):
    made = method(network, **OPTIONS)
    _, alone, _ = stepped(made, network, batch)
    sharding = mesh_lib.batch_sharding(mesh_lib.make_mesh({'data': 4}))
    _, spread, _ = stepped(made, network, mesh_lib.put_batch(batch, sharding))
    close(alone.params, spread.params)


def test_more_padding_changes_nothing(network, batch):
    wide = {
        name: np.pad(x, ((0, 0), (3, 0)), constant_values=7 if name == 'input' else False)
        for name, x in batch.items()
    }
    made = method(network)
    close(stepped(made, network, batch)[1].params, stepped(made, network, wide)[1].params)
    # On the right, by more room for answers that nobody needs.
    short, variables, draw = answered(network, batch)
    for name in ('tokens', 'mask'):
        short[name] = np.pad(short[name], ((0, 0), (0, 2)))
    found = jax.jit(lambda b: common.score(network, variables, b, draw))(short)
    np.testing.assert_array_equal(found.log_probs[:, R:], 0)
    np.testing.assert_allclose(
        found.log_probs[:, :R], answered(network, batch)[0]['sampler_log_probs'], atol=1e-4
    )


def test_answers_are_those_of_the_present_policy(network, batch):
    one, _, _ = answered(network, batch, seed=1)
    other, _, _ = answered(network, batch, seed=2)
    assert (one['tokens'] != other['tokens']).any()
    # With a rate of 0: the same law, other answers at every step.
    made = method(network, fields={'optimizer': dict(name='sgd', lr=0.0)})
    state, history = begun(made, network), []
    step = jax.jit(made.step)
    for _ in range(3):
        state, metrics = step(state, batch)
        history.append(value(metrics, 'length'))
    assert len(set(history)) > 1


class TestTeacher:
    @staticmethod
    def made(network, teacher, **options):
        fields = {'teacher': teacher, 'references': {'reference': teacher}}
        block = dict(name='test_grpo.constant', value=1.0)
        return method(network, block, fields=fields, **options)

    def test_dead_groups_learn_from_it_by_the_squared_log_ratio(self, network, batch):
        made = self.made(network, network, teacher_weight=0.3)
        teacher = sharp(network, 7)
        frozen = {'teacher': teacher, 'reference': teacher}
        metrics = stepped(made, network, batch, frozen=frozen)[2]
        assert value(metrics, 'grad_norm') > 0
        gap = value(metrics, 'kl_to_teacher')
        # The loss is the mean over answers of the mean over tokens of .3 d^2 / 2.
        assert value(metrics, 'loss') > 0.3 * gap**2 / 2 > 0
        # Perturbed, it says something else.
        other = jax.tree.map(lambda x: x + 1, teacher)
        frozen = {'teacher': other, 'reference': other}
        assert value(stepped(made, network, batch, frozen=frozen)[2], 'loss') != value(
            metrics, 'loss'
        )

    def test_one_that_is_the_student_changes_nothing(self, network, batch):
        made = self.made(network, network, teacher_weight=0.3, kl_weight=0.1)
        same = sharp(network, 1)
        frozen = {'teacher': same, 'reference': same}
        before, after, metrics = stepped(made, network, batch, frozen=frozen)
        assert value(metrics, 'loss') == pytest.approx(0, abs=1e-9)
        close(before.params, after.params, atol=1e-5)

    def test_tokens_that_it_lacks_are_never_said(self, network, batch):
        made = self.made(network, decoder(num_classes=6), teacher_weight=0.3)
        frozen = dict.fromkeys(('teacher', 'reference'), sharp(decoder(num_classes=6), 7))
        _, _, metrics = stepped(made, network, batch, frozen=frozen)
        assert np.isfinite(value(metrics, 'loss'))
        assert value(metrics, 'nonfinite') == 0

    def test_weights_without_a_network_are_told(self, network):
        with pytest.raises(UserError, match=r'kl_weight=0\.1 needs a reference of'):
            method(network, kl_weight=0.1)
        with pytest.raises(UserError, match=r'teacher_weight=0\.1 needs a teacher'):
            method(network, teacher_weight=0.1)


def test_a_self_teacher_reads_more_and_its_scores_stay_in_place(network, batch):
    made, variables, draw = answered(network, batch)
    rng = np.random.default_rng(4)
    there = np.arange(3) < rng.integers(0, 4, 16)[:, None]
    block = np.where(there, rng.integers(3, V, there.shape), 0)
    told = common.with_prompt(made, (block, there), (made['input'], made['prompt_mask']))
    told = jax.tree.map(np.asarray, told)
    row = int(np.flatnonzero(there.sum(1) == 2)[0])
    wanted = [*block[row][:2], *made['input'][row][made['prompt_mask'][row]]]
    assert told['input'][row][told['prompt_mask'][row]].tolist() == wanted
    assert told['prompt_mask'][row].argmax() == P + 3 - len(wanted)
    found = jax.jit(lambda b: common.score(network, variables, b, draw))(told)
    law = laws(network, variables, told)
    chosen = np.take_along_axis(law, made['tokens'][..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_probs, np.where(made['mask'], chosen, 0), atol=1e-4)
    assert 'SOL' not in made


def test_a_step_is_one_program_without_the_host(network, batch):
    made = method(network, **OPTIONS)
    text = jax.jit(made.step).lower(begun(made, network), batch).as_text()
    assert 'callback' not in text
    # All updates are turns of one loop.
    assert text.count('stablehlo.while') >= 1


def test_what_does_not_fit_is_told(network):
    other = from_linen(BottleneckLM(width=4), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    with pytest.raises(UserError, match='sampled from a decoder .* the network is BottleneckLM'):
        method(other)
    with pytest.raises(UserError, match=r"the data has no 'prompt_mask'; give data\.source"):
        method(network, fields={'spec': {'input': SPEC['input']}})
    with pytest.raises(UserError, match=r"the reward goes by 'printed', and the data have only"):
        method(network, dict(name='kd.rewards.printed.printed'))
