"""Sampling from a decoder: against argmax and enumeration, independence of rows, blocks, turns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kd.aot import hlo
from kd.models.decoder import SHARDING, Decoder
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import rollout, rollout_rules, tree_shardings
from kd.sampling.autoregressive import sampler, truncate

V, P, R = 12, 6, 10


@pytest.fixture(autouse=True)
def quick(request, quick_compilation):
    """Compilation is most of the time, but what is said of programs is said of optimised ones."""
    if 'gathered' in request.node.name:
        yield
    else:
        with quick_compilation():
            yield


@pytest.fixture(scope='module')
def decoder():
    return Decoder(
        num_classes=V, width=16, depth=1, heads=4, kv_heads=2, mlp_hidden=24, max_length=64
    )


@pytest.fixture(scope='module')
def variables(decoder):
    made = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    # Larger than they start, so that the law is far from uniform.
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, made)


@pytest.fixture(scope='module')
def prompts():
    """Two of six tokens and one of three, padded on the left by a token that occurs."""
    tokens = jax.random.randint(jax.random.key(1), (3, P), 0, V)
    mask = jnp.ones((3, P), bool).at[1, :3].set(False)
    return tokens, mask


def run(decoder, variables, prompts, key=2, rows=None, **options):
    draw = sampler(decoder, **{'max_new': R, **options})
    return jax.jit(draw)(variables, *prompts, jax.random.key(key), rows=rows)


def forced(decoder, variables, prompt, mask, tokens):
    """Logits [B, R, V] of a whole row at once for the answer's tokens."""
    row = jnp.concatenate([prompt, tokens], 1)
    seen = jnp.concatenate([mask, jnp.ones_like(tokens, bool)], 1)
    logits = jax.jit(decoder.apply)(variables, row, None, seen.astype(int))
    return logits[:, prompt.shape[1] - 1 : -1]


def test_at_temperature_0_every_token_is_the_most_probable_one(decoder, variables, prompts):
    found = run(decoder, variables, prompts, temperature=0.0, block=4)
    # The tokens that are the most probable ones of the whole row, each given those before it.
    logits = forced(decoder, variables, *prompts, found.tokens)
    assert (found.tokens == logits.argmax(-1)).all()
    np.testing.assert_allclose(found.log_probs, jax.nn.log_softmax(logits).max(-1), atol=1e-5)
    assert found.mask.all()
    assert found.truncated.all()


def test_draws_have_the_truncated_law_and_log_probs_of_the_whole_one(decoder, variables, prompts):
    """Pairs of tokens against enumeration at temperature .6, top-p .8, one token forbidden."""
    count, options = 4_000, dict(temperature=0.6, top_p=0.8, forbidden=(5,))
    prompt = [jnp.repeat(x[1:2], count, 0) for x in prompts]
    found = run(decoder, variables, prompt, max_new=2, **options)
    pairs = jnp.array(list(itertools.product(range(V), range(V))))
    one = [jnp.repeat(x[1:2], len(pairs), 0) for x in prompts]
    logits = forced(decoder, variables, *one, pairs).at[..., 5].set(-jnp.inf) / 0.6
    whole = jax.nn.log_softmax(logits)
    # Top-p by its definition: tokens by falling probability until 80 % are reached.
    kept = np.zeros(whole.shape, bool)
    for place in itertools.product(range(len(pairs)), range(2)):
        probs, total = np.exp(whole[place]), 0.0
        for token in np.argsort(-probs):
            if total >= 0.8:
                break
            kept[place][token], total = True, total + probs[token]
    law = np.where(kept, np.exp(whole), 0)
    law /= law.sum(-1, keepdims=True)
    joint = np.prod(np.take_along_axis(law, np.asarray(pairs)[..., None], 2)[..., 0], 1)
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    code = np.asarray(found.tokens[:, 0] * V + found.tokens[:, 1])
    seen = np.bincount(code, minlength=V * V)
    assert not seen[joint == 0].any()
    often = joint * count > 5
    counts, means = [*seen[often], seen[~often].sum()], [*joint[often], joint[~often].sum()]
    means = np.asarray(means) * count + 1e-9
    assert stats.chisquare(counts, means, sum_check=False).pvalue > 1e-3
    wanted = np.take_along_axis(np.asarray(whole), np.asarray(pairs)[..., None], 2)[..., 0]
    # So is the ratio of a policy loss 1 whatever truncates the draws.
    np.testing.assert_allclose(found.log_probs, wanted[code], atol=1e-4)


def test_a_row_depends_on_its_prompt_its_number_and_the_key_alone(decoder, variables, prompts):
    found = run(decoder, variables, prompts, stop=(3,))
    tokens, mask = prompts
    for block in (1, 4):
        assert (
            run(decoder, variables, prompts, stop=(3,), block=block).tokens == found.tokens
        ).all()
    alone = run(
        decoder, variables, (tokens[1:2, 3:], mask[1:2, 3:]), stop=(3,), rows=jnp.array([1])
    )
    assert (alone.tokens[0] == found.tokens[1]).all()
    wider = [jnp.pad(x, ((0, 0), (4, 0))) for x in prompts]
    assert (run(decoder, variables, wider, stop=(3,)).tokens == found.tokens).all()
    mesh = mesh_lib.make_mesh({'data': 2, 'fsdp': 2}, jax.devices()[:4])
    four = [jnp.concatenate([x, x[:1]]) for x in prompts]
    sharded = [jax.device_put(x, mesh_lib.batch_sharding(mesh)) for x in four]
    assert (run(decoder, variables, sharded, stop=(3,)).tokens[:3] == found.tokens).all()
    assert (run(decoder, variables, prompts, key=3, stop=(3,)).tokens != found.tokens).any()
    # Another row number draws otherwise from the same prompt.
    same = run(decoder, variables, [x[jnp.array([0, 0])] for x in prompts])
    assert (same.tokens[0] != same.tokens[1]).any()


def test_an_answer_ends_with_its_first_stop_token_even_where_that_is_the_padding(
    decoder, variables, prompts
):
    free = run(decoder, variables, prompts)
    stop = (int(free.tokens[0, 3]), int(prompts[0][2, 1]), 0)
    found = run(decoder, variables, prompts, stop=stop, block=2)
    for row in range(3):
        ends = [t for t in range(R) if int(free.tokens[row, t]) in stop]
        length = ends[0] + 1 if ends else R
        assert found.mask[row].tolist() == [t < length for t in range(R)]
        assert (found.tokens[row, :length] == free.tokens[row, :length]).all()
        assert not found.tokens[row, length:].any()
        assert not found.log_probs[row, length:].any()
        assert bool(found.truncated[row]) == (not ends)
    assert 0 < int(found.mask.sum()) < 3 * R


def test_blocks_after_the_last_stop_are_skipped(decoder, variables, prompts):
    draw = sampler(decoder, max_new=R, stop=tuple(range(V)), block=2)
    text = str(jax.make_jaxpr(draw)(variables, *prompts, jax.random.key(0)))
    # A scan of blocks under a condition: the number of turns is known, as a while loop's is not.
    assert 'cond[' in text
    assert 'while[' not in text.replace('scan', '')
    found = jax.jit(draw)(variables, *prompts, jax.random.key(0))
    assert found.mask.sum(1).tolist() == [1, 1, 1]
    # What a skipped block leaves in the cache is no token.
    cache = draw.start(3, P)
    _, cache = jax.jit(draw.turn)(variables, cache, *prompts, jax.random.key(0))
    assert cache.valid.sum(1).tolist() == [P + 1, P - 3 + 1, P + 1]
    assert int(cache.length) == cache.valid.shape[1] == P + R + 1


def test_what_a_block_draws_beyond_the_longest_answer_ends_none(decoder, variables, prompts):
    longer = run(decoder, variables, prompts, max_new=5)
    beyond = longer.tokens[:, 4]
    row = next(b for b in range(3) if beyond[b] not in longer.tokens[b, :4])
    # Five tokens are drawn: one, and two blocks of two.
    draw = sampler(decoder, max_new=4, block=2)
    of = lambda length: int(draw.turns(jnp.arange(4)[None] < length))  # noqa: E731
    assert [of(length) for length in range(1, 5)] == [1, 3, 3, 5]
    assert int(sampler(decoder, max_new=1).turns(jnp.ones((2, 1), bool))) == 1
    found = run(decoder, variables, prompts, max_new=4, block=2, stop=(int(beyond[row]),))
    assert (found.tokens[row] == longer.tokens[row, :4]).all()
    assert found.truncated[row]


def test_turns_go_on_where_the_last_one_ended(decoder, variables, prompts):
    draw, key = sampler(decoder, max_new=4, temperature=0.0, stop=(3,), block=3), jax.random.key(0)
    turn = jax.jit(draw.turn)
    cache = draw.start(3, P + 2, turns=2)
    first, cache = turn(variables, cache, *prompts, key)
    said = jnp.array([[0, 7], [1, 2], [4, 4]])
    heard = jnp.array([[False, True], [True, True], [False, False]])
    second, _ = turn(variables, cache, said, heard, key)
    texts = [
        np.concatenate([np.asarray(x)[row][np.asarray(m)[row]] for x, m in parts])
        for row in (0, 1)
        for parts in [[prompts, (first.tokens, first.mask), (said, heard)]]
    ]
    width = max(map(len, texts))
    rows = jnp.array([np.pad(text, (width - len(text), 0)) for text in texts])
    seen = jnp.array([[t >= width - len(text) for t in range(width)] for text in texts])
    whole = jax.jit(draw)(variables, rows, seen, key)
    assert (whole.tokens == second.tokens[:2]).all()
    # A row that heard nothing says nothing.
    assert not second.mask[2].any()
    assert not second.truncated[2]


@pytest.mark.parametrize(('fsdp', 'tensor'), [(4, 1), (2, 2)])
def test_no_weight_is_gathered_inside_the_loop(decoder, variables, prompts, fsdp, tensor):
    mesh = mesh_lib.make_mesh({'data': 1, 'fsdp': fsdp, 'tensor': tensor}, jax.devices()[:4])
    laid = jax.device_put(variables, tree_shardings(variables, SHARDING, mesh))
    batch = [
        jax.device_put(jnp.concatenate([x, x[:1]]), mesh_lib.batch_sharding(mesh)) for x in prompts
    ]
    draw = sampler(decoder, max_new=R, block=R)

    def answers(variables, *batch):
        variables = rollout(variables, rules=rollout_rules(SHARDING), mesh=mesh)
        return draw(variables, *batch, jax.random.key(0))

    text = jax.jit(answers).lower(laid, *batch).compile().as_text()
    found = hlo.collectives(text)
    weights = sum(x.size for x in jax.tree.leaves(variables) if x.ndim > 1)
    inside = [each for each in found if each.kind == 'all-gather' and each.times > 1]
    # At most what a row needs of activations, never a matrix.
    assert all(each.bytes < 4 * 16 * 16 for each in inside), inside
    once = sum(each.bytes for each in found if each.kind == 'all-gather' and each.times == 1)
    assert once >= 4 * weights // tensor


def test_top_k_and_top_p_keep_the_fewest_that_suffice():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.15, 0.05]]))
    kept = lambda **how: np.isfinite(truncate(logits, **how))[0].tolist()  # noqa: E731
    assert kept(top_k=2) == [False, True, True, False, False]
    assert kept(top_p=0.7) == [False, True, True, False, False]
    assert kept(top_p=0.71) == [False, True, True, True, False]
    assert kept(top_p=1e-6) == [False, True, False, False, False]
    # Of the two that are left, .4 / .7 is more than a half.
    assert kept(top_k=2, top_p=0.5) == [False, True, False, False, False]
    assert kept() == [True] * 5


def test_numbers_out_of_range_and_tokens_outside_the_vocabulary_are_told(decoder):
    for wrong in ({'max_new': 0}, {'block': 0}, {'temperature': -1}, {'top_p': 0}, {'top_k': -1}):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))}={next(iter(wrong.values()))}'):
            sampler(decoder, **{'max_new': 3, **wrong})
    with pytest.raises(ValueError, match='stop token 12 is outside the vocabulary of 12'):
        sampler(decoder, max_new=3, stop=(12,))
    with pytest.raises(ValueError, match='forbidden token -1 is outside the vocabulary of 12'):
        sampler(decoder, max_new=3, forbidden=(-1,))
