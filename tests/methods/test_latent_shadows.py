"""Masked diffusion and its consistency distillation: steps against NumPy, rounds, evaluators."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd.claims import seeds
from kd.data import sources
from kd.data.builders import sparse_chain
from kd.errors import UserError
from kd.evaluators import masked_text
from kd.losses import masked_diffusion as losses
from kd.methods.discrete import common
from kd.methods.discrete.latent_shadows import TEACHER, Pace, latent_shadows
from kd.methods.discrete.masked_diffusion import masked_diffusion
from kd.methods.lm.common import token_losses
from kd.models.decoder import Decoder
from kd.models.transformer import Transformer
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, L, K, LR, STEPS = 6, 8, 12, 0.5, 8


def network_of(**changes):
    options = dict(width=8, depth=1, heads=2, max_length=L, causal=False, extra_symbols=1) | changes
    return from_linen(Transformer(K, **options), jax.ShapeDtypeStruct((1, L), jnp.int32))


@pytest.fixture(scope='module')
def network():
    return network_of()


@pytest.fixture(scope='module')
def batch():
    return {'input': sparse_chain.make('train', length=L, size=B)}


def context(network, **changes):
    options = dict(tx=optax.sgd(LR), num_classes=K, steps=STEPS) | changes
    return seeds.context(network=network, **options)


def stepped(method, batch, state=None):
    state = state or jax.jit(method.init)(jax.random.key(0))
    return state, *jax.jit(method.step)(state, batch)


def collected(method, batch, monkeypatch, name):
    """The state before a step, the batch as its loss gets it, the state after and metrics."""
    seen = {}

    def looked(network, variables, batch, *rest, **options):
        jax.debug.callback(lambda found: seen.update(found), batch)
        return token_losses(network, variables, batch, *rest, **options)

    monkeypatch.setattr(f'kd.methods.discrete.{name}.token_losses', looked)
    state, after, metrics = stepped(method, batch)
    jax.effects_barrier()
    return state, {key: np.asarray(x) for key, x in seen.items()}, after, metrics


def laws(network, params, z):
    return special.log_softmax(
        np.asarray(network.apply({'params': params}, z).logits, np.float64), -1
    )


def test_the_teacher_minimises_the_bound(network, batch, monkeypatch):
    method = masked_diffusion(context(network))
    state, seen, _, metrics = collected(method, batch, monkeypatch, 'masked_diffusion')
    hidden = seen['response_mask']
    assert (hidden == (seen['input'] == K)).all()
    assert (seen['label'] == batch['input']).all()
    assert (seen['input'][~hidden] == batch['input'][~hidden]).all()
    # One time in each sixth of [0, 1], at which the log-linear schedule weighs 1 / t.
    weights = np.where(hidden, seen['token_weight'] * L, 0).max(1)
    t = 1 / weights[weights > 0]
    assert ((t > np.arange(B)[weights > 0] / B) & (t < (np.arange(B)[weights > 0] + 1) / B)).all()
    log_p = laws(network, state.params['network'], seen['input'])
    nll = -np.take_along_axis(log_p, batch['input'][..., None], 2)[..., 0]
    wanted = (nll * np.where(hidden, 1, 0) * seen['token_weight']).sum() / B
    total, count = metrics['loss']
    assert float(total / count) == pytest.approx(wanted, rel=1e-5)


def test_the_student_learns_what_the_teacher_says_earlier_on_the_path(network, batch, monkeypatch):
    method = latent_shadows(context(network), delta=0.25, round_steps=2, temperature=(0.8, 0.8))
    state, seen, _, metrics = collected(method, batch, monkeypatch, 'latent_shadows')
    params = state.params['network']
    hidden, shown = seen['response_mask'], seen['shown']
    before, after = seen['teacher_input'], seen['input']
    # What the student sees the teacher sees.
    assert not ((before == K) & (after != K)).any()
    assert (shown == (before != K)).all()
    assert (hidden & shown).any()
    log_q = laws(network, params, before) / 0.8
    log_q -= special.logsumexp(log_q, -1, keepdims=True)
    log_p = laws(network, params, after)
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    nll = -np.take_along_axis(log_p, batch['input'][..., None], 2)[..., 0]
    each = np.where(hidden, np.where(shown, nll, kl), 0).sum(1) / np.maximum(hidden.sum(1), 1)
    total, count = metrics['loss']
    assert float(total / count) == pytest.approx(each.mean(), rel=1e-5)
    agreement, places = metrics['agreement']
    assert float(agreement) == (hidden & shown).sum()
    assert float(places) == hidden.sum()


def test_all_the_way_is_cross_entropy_with_the_text(network, batch):
    """delta = 1 shows the teacher all of it and the student nothing."""
    method = latent_shadows(
        context(network), delta=1.0, temperature=(0.5, 0.5), coupling='independent'
    )
    before, _, metrics = stepped(method, batch)
    assert float(metrics['agreement'].total) == float(metrics['agreement'].count) == B * L
    log_p = laws(network, before.params['network'], np.full((B, L), K))
    nll = -np.take_along_axis(log_p, batch['input'][..., None], 2)
    total, count = metrics['loss']
    assert float(total / count) == pytest.approx(nll.mean(), rel=1e-5)


def test_independent_masks_hide_from_the_teacher_what_the_student_sees(network, monkeypatch):
    many = {'input': sparse_chain.make('train', length=L, size=300)}
    method = latent_shadows(context(network), delta=0.25, coupling='independent')
    _, seen, _, _ = collected(method, many, monkeypatch, 'latent_shadows')
    visible = seen['input'] != K
    share = ((seen['teacher_input'] == K) & visible).sum() / visible.sum()
    # E[(1 - alpha_s) alpha_t] / E[alpha_t] of t uniform in [.25, 1], s = t - .25.
    t = 0.25 + 0.75 * (np.arange(10_000) + 0.5) / 10_000
    wanted = ((t - 0.25) * (1 - t)).mean() / (1 - t).mean()
    assert share == pytest.approx(wanted, abs=0.03)


def test_rounds_copy_the_student_and_double_the_gap(network, batch):
    method = latent_shadows(context(network), delta=0.25, round_steps=2)
    state = jax.jit(method.init)(jax.random.key(0))
    step, taught, gaps, copies = jax.jit(method.step), [], [], [state.params['network']]
    for _ in range(6):
        taught.append(state.ema[TEACHER]['network'])
        state, metrics = step(state, batch)
        gaps.append(float(metrics['delta'].total))
        copies.append(state.params['network'])
    assert gaps == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    for n, of in enumerate(taught):
        wanted = copies[n // 2 * 2]
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), of, wanted)
    pace = Pace(1 / 512, 10_000, (0.96, 0.75), 50_001)
    assert float(pace.gap(jnp.int32(49_999))) == 16 / 512
    taus = [float(pace.tau(jnp.int32(n))) for n in (0, 25_000, 50_000)]
    np.testing.assert_allclose(taus, [0.96, 0.855, 0.75], rtol=1e-6)
    # It never passes the beginning of the path.
    assert float(pace.gap(jnp.int32(200_000))) == 1


def test_a_decoder_of_packed_text_is_the_same_in_slabs_and_micro_batches(batch):
    """Padding is never hidden, and the mask is an unused id."""
    decoder = Decoder(
        K + 2, width=8, depth=1, heads=2, causal=False, tied=False, max_length=L,
        fields=('input', 'positions', 'segments'),
    )  # fmt: skip
    network = from_linen(decoder, *[jax.ShapeDtypeStruct((1, L), jnp.int32)] * 3)
    segments = np.tile([1, 1, 1, 2, 2, 2, 2, 0], (B, 1)).astype(np.int32)
    text = {
        **batch,
        'positions': np.tile([0, 1, 2, 0, 1, 2, 3, 0], (B, 1)).astype(np.int32),
        'segments': segments,
        'response_mask': segments > 0,
    }
    found = []
    for chunk, parts in ((0, 1), (4, 3)):
        method = latent_shadows(
            context(network), delta=0.5, mask=K, chunk=chunk, micro_batches=parts
        )
        _, after, metrics = stepped(method, text)
        found.append((after.params['network'], metrics['loss'].total))
        assert float(metrics['agreement'].count) <= B * (L - 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *found)
    assert int(common.counting(text).sum()) == B * (L - 1)


def test_the_bound_of_a_split_is_near_the_truth_for_the_true_law():
    """A network of independent uniform symbols: the bound is log K but for noise."""

    class Uniform(Transformer):
        @nn.compact
        def __call__(self, x, *, train=False, padding=None):
            return jnp.zeros((*x.shape, K)) + self.param('zero', lambda _: jnp.zeros(()))

    module = Uniform(K, causal=False, extra_symbols=1)
    network = from_linen(module, jax.ShapeDtypeStruct((1, L), jnp.int32))
    evaluator = masked_text.likelihood(context(network))
    state = masked_diffusion(context(network)).init(jax.random.key(0))
    rows = sparse_chain.make('train', length=L, size=4_000)
    mask = np.arange(4_000) < 3_900
    sums = jax.jit(evaluator.update)(
        state, {'input': rows, 'mask': mask, 'index': np.arange(4_000)}
    )
    found = evaluator.finish(jax.device_get(sums))
    assert found['hidden_nll'] == pytest.approx(np.log(K), rel=1e-5)
    # The weights 1 / t have a tail, so that the mean of 31,200 symbols is rough.
    assert found['nll'] == pytest.approx(np.log(K), rel=0.05)
    assert found['perplexity'] == pytest.approx(np.exp(found['nll']))


def test_the_chain_has_its_successors_and_its_judge_knows_them():
    law = sparse_chain.law(3)
    assert ((law > -np.inf).sum(-1) == 4).all()
    np.testing.assert_allclose(np.exp(law).sum(-1), 1, rtol=1e-5)
    rows = sparse_chain.make('test', seed=3, size=3_000)
    log_p = sparse_chain.log_probs(law, rows)
    assert log_p.shape == (3_000, sparse_chain.LENGTH - 2)
    assert log_p[5, 7] == law[rows[5, 7], rows[5, 8], rows[5, 9]]
    pairs = rows[:, :-2] * 12 + rows[:, 1:-1]
    entropy = special.entr(np.exp(law)).sum(-1).ravel()[pairs].mean()
    assert -log_p.mean() == pytest.approx(entropy, rel=0.01)
    with pytest.raises(sources.DataError, match=r"the splits \['train'.*not 'dev'"):
        sparse_chain.make('dev')
    with pytest.raises(sources.DataError, match='of 3 symbols no 4 can follow'):
        sparse_chain.make('train', tokens=3)


def test_metrics_of_samples_are_what_they_say():
    rows = np.array([[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]])
    found = masked_text.sample_metrics(
        rows, lambda said: np.where(said[:, 1:] == 0, -np.inf, np.log(0.5))
    )
    assert found['impossible'] == 0.5
    assert found['nll'] == pytest.approx(np.log(2))
    assert found['entropy'] == pytest.approx(special.entr([0.6, 0.4]).sum())
    assert found['bigram_entropy'] == pytest.approx(np.log(2))
    # Runs of four: 0101 and 1010, each twice.
    assert found['distinct'] == 0.5


def test_the_judge_of_runs_is_witten_and_bells():
    text = np.array([[0, 1, 0, 1, 2, 0]])

    class Text:
        num_classes = 3

        def __len__(self):
            return 1

        def fetch(self, rows):
            return {'input': text[rows]}

    judge = masked_text.ngram_judge(
        seeds.context(source=lambda split: Text(), num_classes=3), order=2
    )
    # Unigrams 3, 2, 1 of 6, three kinds; behind 1 come 0 and 2, once each; behind 2 comes 0.
    one = (np.array([3, 2, 1]) + 3 / 3) / 9
    wanted = [
        (1 + 2 * one[2]) / 4,  # 1 2
        (1 + 1 * one[0]) / 2,  # 2 0
        (0 + 1 * one[0]) / 3,  # 0 0: 0 is followed by 1 alone, twice
    ]
    np.testing.assert_allclose(np.exp(judge(np.array([[1, 2, 0, 0]]))[0]), wanted, rtol=1e-6)


def test_a_network_without_a_mask_and_a_start_of_another_path_are_told():
    for changes, words in (
        (dict(causal=True), 'stage.network: Transformer sees only what came before'),
        (dict(extra_symbols=0), 'stage.network: Transformer has no symbol for the mask'),
    ):
        with pytest.raises(UserError, match=words):
            latent_shadows(context(network_of(**changes)))
    learnt = dataclasses.replace(
        context(network_of()), trained_by={'start': {'name': 'x', 'schedule': 'cosine'}}
    )
    with pytest.raises(
        UserError, match=r"='log_linear', and references\.start was trained with 'cos"
    ):
        latent_shadows(learnt)
    assert latent_shadows(learnt, schedule='cosine')
    assert common.noise(context(network_of(extra_symbols=0)), 'cosine', 3).mask == 3
    assert losses.outcomes(3, 1).tolist() == [True, False, True]
