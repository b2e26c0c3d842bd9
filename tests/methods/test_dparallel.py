"""Certainty forcing: a step against NumPy, what has no gradient, answers and calls, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd.claims import seeds
from kd.data import sources
from kd.data.builders import running_sums
from kd.errors import UserError
from kd.evaluators import masked_answers
from kd.methods.discrete import dparallel
from kd.methods.discrete.dparallel import certainty_forcing
from kd.models.decoder import Decoder
from kd.models.transformer import Transformer
from kd.network import from_linen
from kd.sampling import masked

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, N, K, LR, BLOCK = 6, 6, 4, 0.5, 4
S = 2 * N


@pytest.fixture(scope='module')
def network():
    module = Transformer(K, width=8, depth=1, heads=2, max_length=S, causal=False, extra_symbols=1)
    return from_linen(module, jax.ShapeDtypeStruct((1, S), jnp.int32))


@pytest.fixture(scope='module')
def batch():
    """Prompts of two lengths."""
    made = running_sums.make('train', length=N, size=B)
    return {**made, 'prompt_length': np.array([6, 6, 4, 4, 6, 4], np.int32)}


def context(network, **changes):
    return seeds.context(
        network=network, **(dict(tx=optax.sgd(LR), num_classes=K, steps=4) | changes)
    )


def stepped(method, batch, monkeypatch=None):
    """The state before a step, after it, metrics, and the masks of its blocks."""
    seen = {}
    if monkeypatch is not None:
        block_mask = dparallel.losses.block_mask

        def looked(*rest, **options):
            drawn = block_mask(*rest, **options)
            jax.debug.callback(lambda *x: seen.update(zip('abc', x, strict=True)), *drawn)
            return drawn

        monkeypatch.setattr(dparallel.losses, 'block_mask', looked)
    state = jax.jit(method.init)(jax.random.key(0))
    after, metrics = jax.jit(method.step)(state, batch)
    jax.effects_barrier()
    return state, after, metrics, [np.asarray(seen[name]) for name in seen]


def test_a_step_is_that_of_both_copies_of_the_block_alone(network, batch, monkeypatch):
    method = certainty_forcing(context(network), block=BLOCK, certainty=2.0, temperature=0.5)
    state, after, metrics, (active, complement, later) = stepped(method, batch, monkeypatch)
    tokens = batch['input']

    def loss(params):
        """All logits formed, and sums over whole rows."""
        total = 0.0
        for hidden in (active, complement):
            z = np.where(hidden | later, K, tokens)
            logits = network.apply({'params': params}, z).logits
            log_p, tempered = jax.nn.log_softmax(logits), jax.nn.log_softmax(2 * logits)
            nll = -jnp.take_along_axis(log_p, tokens[..., None], 2)[..., 0]
            entropy = -(jnp.exp(tempered) * tempered).sum(-1)
            right = hidden & (logits.argmax(-1) == tokens)
            for values, where in ((nll, hidden), (2 * entropy, right)):
                total += ((values * where).sum(1) / jnp.maximum(where.sum(1), 1)).mean()
        return total

    value, wanted = jax.jit(jax.value_and_grad(loss))(state.params['network'])
    total, count = metrics['loss']
    assert float(total / count) == pytest.approx(float(value), rel=1e-5)
    moved = jax.tree.map(
        lambda x, y: (x - y) / LR, state.params['network'], after.params['network']
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), moved, wanted)
    # Prompts are seen, blocks of two lengths begin at their own places, and what is behind hides.
    assert not (active | complement | later)[np.arange(S) < batch['prompt_length'][:, None]].any()
    assert later.any()


def test_micro_batches_of_ragged_prompts_change_nothing(network, batch):
    ends = []
    for parts in (1, 3):
        method = certainty_forcing(context(network), block=BLOCK, micro_batches=parts)
        ends.append(stepped(method, batch)[1].params['network'])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *ends)


def test_the_head_of_a_decoder_sees_blocks_alone():
    """No logits of a whole row are formed: [2 B, block, V] of [2 B, S, V]."""
    decoder = Decoder(64, width=8, depth=1, heads=2, causal=False, tied=False, max_length=S)
    network = from_linen(decoder, jax.ShapeDtypeStruct((1, S), jnp.int32))
    method = certainty_forcing(context(network), block=BLOCK, mask=63, shift=True)
    made = running_sums.make('train', length=N, size=B)
    state = jax.eval_shape(method.init, jax.random.key(0))
    text = str(jax.make_jaxpr(method.step)(state, made))
    assert f'f32[{2 * B},{BLOCK},64]' in text
    assert f'[{2 * B},{S},64]' not in text


def test_text_says_by_its_answer_where_prompts_end(batch):
    text = {'response_mask': np.arange(S) >= batch['prompt_length'][:, None]}
    assert (dparallel.prompt_length(text) == batch['prompt_length']).all()
    assert dparallel.prompt_length(batch) is batch['prompt_length']


def test_answers_are_right_and_calls_counted_by_threshold(network):
    """A network that knows the sums is right; how sure it is decides how many calls it takes."""

    class Sums(Transformer):
        def __call__(self, x, *, train=False, padding=None):
            digits = x[:, :N]
            right = jnp.concatenate([digits, jnp.cumsum(digits, 1) % K], axis=1)
            # Sure of what follows a sum that is there, and not of the rest.
            ready = jnp.concatenate([jnp.ones_like(x[:, :1], bool), x[:, :-1] != K], axis=1)
            sharp = jnp.where(ready, 9.0, 1.5)[..., None]
            return sharp * jax.nn.one_hot(right, K)

    module = Sums(K, causal=False, extra_symbols=1)
    knowing = from_linen(module, jax.ShapeDtypeStruct((1, S), jnp.int32))
    rows = running_sums.make('test', length=N, size=10)
    batch = {**rows, 'mask': np.arange(10) < 7}
    unsure = special.softmax([1.5, 0, 0, 0])
    entropy = float(special.entr(unsure).sum())
    spec = {'input': jax.ShapeDtypeStruct((S,), jnp.int32)}
    probe = masked_answers.masked_answers(
        context(knowing, spec=spec), block=3, limit=N, thresholds=(0.1, entropy + 0.01), examples=5
    )

    class Variables:
        def variables(self, ema=None):
            return {'params': {}}

    found = probe.run(Variables(), iter([batch]))
    assert {found[f'exact_{name}'] for name in ('one', 0.1, entropy + 0.01)} == {1.0}
    assert found['calls_one'] == N
    # One after another within a block, all at once where it need not be sure.
    assert found['calls_0.1'] == N
    assert found[f'calls_{entropy + 0.01}'] == 2
    spoiled = {**batch, 'input': rows['input'] * (np.arange(S) != S - 1)}
    wrong = probe.run(Variables(), iter([spoiled]))
    share = (rows['input'][:5, -1] == 0).mean()
    assert wrong['exact_one'] == pytest.approx(share)
    assert share < 1


def test_calls_at_equal_accuracy_are_the_fewest_that_reach_it():
    exact, calls = np.array([0.99, 0.97, 0.9]), np.array([9.0, 6.0, 3.0])
    assert masked_answers.calls_at(exact, calls, 0.95, 12.0) == 6
    assert masked_answers.calls_at(exact, calls, 0.9, 12.0) == 3
    assert masked_answers.calls_at(exact, calls, 1.0, 12.0) == 12


def test_running_sums_are_sums_and_small_digits_the_likely_ones():
    made = running_sums.make('train', modulus=5, length=7, decay=0.5, size=4_000)
    digits, sums = made['input'][:, :7], made['input'][:, 7:]
    total = np.zeros(4_000, int)
    for i in range(7):
        total = (total + digits[:, i]) % 5
        assert (sums[:, i] == total).all()
    law = 0.5 ** np.arange(5)
    seen = np.bincount(digits.ravel()) / digits.size
    np.testing.assert_allclose(seen, law / law.sum(), atol=0.01)
    assert (made['response_mask'] == (np.arange(14) >= 7)).all()
    with pytest.raises(sources.DataError, match="not 'dev'"):
        running_sums.make('dev')


def test_what_cannot_be_is_told(network, batch):
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    with pytest.raises(UserError, match=r'block=12: rows have 12 tokens, and a block has to fit'):
        certainty_forcing(context(network, spec=spec), block=S)
    with pytest.raises(UserError, match="neither 'prompt_length' nor 'response_mask'"):
        certainty_forcing(context(network, spec={'input': spec['input']}), block=BLOCK)
    with pytest.raises(UserError, match='limit=12 leaves no room for a prompt in rows of 12 tok'):
        masked_answers.masked_answers(context(network, spec=spec), block=BLOCK, limit=S)
    causal = from_linen(Transformer(K), jax.ShapeDtypeStruct((1, S), jnp.int32))
    with pytest.raises(UserError, match=r'stage\.network: Transformer sees only what came before'):
        certainty_forcing(context(causal), block=BLOCK)
    assert masked.mask_of(network) == K


@pytest.mark.parametrize('tail', [True, False])
def test_a_row_without_an_answer_teaches_nothing_of_its_prompt(tail):
    """Traps: a block before the prompt's end, or from the first token on."""
    length, block = 8, 3
    prompts = jnp.array([8, 11, 7])
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = jax.vmap(
        lambda key: dparallel.losses.block_mask(key, prompts, length, block=block, tail=tail)
    )(keys)
    hidden, second, after = (np.asarray(x) for x in drawn)
    for each in (hidden, second, after):
        assert not each[:, :2].any()
        assert not each[:, 2, :7].any()
    # With a token of an answer there is one.
    assert (hidden | second)[:, 2, 7].any()
    mask = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    found = dparallel.prompt_length({'response_mask': jnp.asarray(mask)})
    np.testing.assert_array_equal(found, [2, 4, 0])
