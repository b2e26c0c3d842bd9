"""The decoder against a plain one in NumPy, its cache, packed rows, padding and stacked blocks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.models import decoder, rope
from kd.models.causal_attention import attend_causally
from kd.models.decoder import Decoder, head_of, init_cache, unstacked

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SIZES = dict(num_classes=40, width=24, depth=2, heads=4, mlp_hidden=36, max_length=64)
SHAPES = {
    'llama': dict(kv_heads=2),
    'qwen2': dict(kv_heads=1, qkv_bias=True, tied=False),
    'qwen3': dict(kv_heads=2, qk_norm=True, head_dim=10),
    'phi3': dict(window=5, tied=False),
    'gpt2': dict(mlp='gelu', norm='layer', bias=True, qkv_bias=True, rope_theta=None),
    'llada': dict(causal=False, tied=False),
}
T = 13


def module(shape='llama', **changes):
    return Decoder(**{**SIZES, **SHAPES[shape], **changes})


@pytest.fixture(scope='module')
def tokens():
    return jax.random.randint(jax.random.key(1), (2, T), 0, 40)


def variables_of(made):
    """Every leaf random, biases and norms too, so that none is a neutral element."""
    tree = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    drawn = [
        jnp.asarray(rng.normal(size=x.shape) * 0.2 + (x.ndim == 1), jnp.float32) for x in leaves
    ]
    return jax.tree.unflatten(structure, drawn)


# --- a plain decoder, token by token and head by head ---


def plain_norm(x, p, of, kind=None):
    if (kind or of.norm) == 'rms':
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + of.epsilon) * p['scale']
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + of.epsilon) * p['scale']
        + (p['bias'])
    )


def plain_dense(x, p):
    return x @ p['kernel'] + p.get('bias', 0.0)


def plain_rotated(x, position, theta):
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        # A complex number of the features i and i + half, turned.
        z = complex(x[i], x[i + half]) * np.exp(1j * position * theta ** (-2 * i / len(x)))
        out[i], out[i + half] = z.real, z.imag
    return out


def plain_row(params, of, row):
    size = of.size_of_head
    x = [params['embed']['embedding'][t] for t in row]
    if of.rope_theta is None:
        x = [h + params['positions'][i] for i, h in enumerate(x)]
    x = np.stack(x)
    for layer in range(of.depth):
        p = params[f'block{layer}']
        normed, out = plain_norm(x, p['norm1'], of), np.zeros((len(row), of.heads * size))
        q, k, v = (
            plain_dense(normed, p['attention'][name]).reshape(len(row), -1, size)
            for name in ('query', 'key', 'value')
        )
        if of.qk_norm:
            q = plain_norm(q, p['attention']['query_norm'], of)
            k = plain_norm(k, p['attention']['key_norm'], of)
        if of.rope_theta is not None:
            q, k = (
                np.array(
                    [[plain_rotated(h, i, of.rope_theta) for h in x_] for i, x_ in enumerate(y)]
                )
                for y in (q, k)
            )
        for i in range(len(row)):
            first = 0 if of.window is None else max(0, i - of.window + 1)
            end = i + 1 if of.causal else len(row)
            for h in range(of.heads):
                group = h // (of.heads // of.groups)
                scores = k[first:end, group] @ q[i, h] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[i, h * size : (h + 1) * size] = weights / weights.sum() @ v[first:end, group]
        x = x + plain_dense(out, p['attention']['output'])
        y = plain_norm(x, p['norm2'], of)
        up = plain_dense(y, p['mlp']['up'])
        if of.mlp == 'swiglu':
            gate = plain_dense(y, p['mlp']['gate'])
            up = gate / (1 + np.exp(-gate)) * up
        else:
            up = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + plain_dense(up, p['mlp']['down'])
    x = plain_norm(x, params['final_norm'], of)
    return x @ (params['embed']['embedding'].T if of.tied else params['head'])


@pytest.mark.parametrize('shape', SHAPES)
def test_logits_are_those_of_a_plain_decoder(shape, tokens):
    of = module(shape)
    variables = variables_of(of)
    found = jax.jit(of.apply)(variables, tokens)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    wanted = np.stack([plain_row(params, of, np.asarray(row)) for row in tokens])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize('shape', ['qwen3', 'phi3', 'gpt2'])
def test_a_prompt_read_whole_and_an_answer_token_by_token_are_one_row(shape, tokens):
    of = module(shape)
    variables = variables_of(of)
    step = jax.jit(lambda *a: of.apply(variables, *a, method='step'))
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    cache, found = init_cache(of, 2, T + 3), []
    for first, last in [(0, 6), *((i, i + 1) for i in range(6, T))]:
        hidden, cache = step(tokens[:, first:last], positions[:, first:last], cache)
        found.append(hidden)
    wanted = jax.jit(lambda t: of.apply(variables, t, method='hidden'))(tokens)
    np.testing.assert_allclose(jnp.concatenate(found, 1), wanted, atol=1e-5)
    logits = jax.jit(of.apply)(variables, tokens)
    np.testing.assert_allclose(wanted @ head_of(of, variables), logits, atol=1e-4)
    assert int(cache.length) == T
    assert cache.valid[:, :T].all()
    assert not cache.valid[:, T:].any()


def test_a_cached_step_projects_the_new_tokens_alone(tokens):
    of = module()
    variables = variables_of(of)
    cache = init_cache(of, 2, 50)
    text = str(
        jax.make_jaxpr(lambda *a: of.apply(variables, *a, method='step'))(
            tokens[:, :1], tokens[:, :1], cache
        )
    )
    # The keys of the slots are there, [2, 2, 50, 6], and no hidden state of them, [2, 50, 24].
    assert 'f32[2,2,50,6]' in text
    assert 'f32[2,50,24]' not in text


def test_documents_of_a_packed_row_are_as_alone_and_so_is_a_padded_prompt(tokens):
    of = module()
    variables = variables_of(of)
    alone, step = jax.jit(of.apply), jax.jit(lambda *a: of.apply(variables, *a, method='step'))
    hidden_of = jax.jit(lambda row: of.apply(variables, row, method='hidden'))
    long, short = tokens[0, :8], tokens[1, :5]
    row = jnp.concatenate([long, short, jnp.zeros(3, int)])[None]
    segments = jnp.array([[1] * 8 + [2] * 5 + [0] * 3])
    packed = alone(variables, row, None, segments)
    np.testing.assert_allclose(packed[0, :8], alone(variables, long[None])[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 8:13], alone(variables, short[None])[0], atol=1e-5)
    # Positions alone do not keep documents apart.
    assert decoder.positions_in((1, 16), segments).tolist() == [[*range(8), *range(5), *range(3)]]
    leaking = alone(variables, row, decoder.positions_in((1, 16), segments))
    assert np.abs(leaking[0, 8:13] - packed[0, 8:13]).max() > 0.1
    # A prompt that is padded on the left and then goes on.
    prompts = jnp.stack([jnp.concatenate([jnp.full(3, 7), short]), long])
    valid = jnp.array([[False] * 3 + [True] * 5, [True] * 8])
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, cache = step(prompts, positions, init_cache(of, 2, 10), valid)
    wanted = hidden_of(short[None])
    np.testing.assert_allclose(hidden[0, 3:], wanted[0], atol=1e-5)
    of_last, same = jax.jit(lambda *a: of.apply(variables, *a, last=True, method='step'))(
        prompts, positions, init_cache(of, 2, 10), valid
    )
    np.testing.assert_allclose(of_last, hidden[:, -1:], atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), same, cache)
    then = jnp.array([[3], [4]])
    hidden, _ = step(then, positions[:, -1:] + 1, cache)
    wanted = hidden_of(jnp.append(short, 3)[None])
    np.testing.assert_allclose(hidden[0, 0], wanted[0, -1], atol=1e-5)


def test_blocks_of_queries_remat_and_stacks_change_neither_logits_nor_gradients(tokens):
    of = module('phi3')
    variables = variables_of(of)
    segments = jnp.array([[1] * 6 + [2] * 7, [1] * T])

    def value(made, variables):
        logits = made.apply(variables, tokens, None, segments)
        return (jax.nn.log_softmax(logits)[..., 3] * jnp.arange(T)).sum(), logits

    def both(made, variables):
        return jax.jit(jax.grad(lambda v: value(made, v), has_aux=True))(variables)

    gradient, logits = both(of, variables)
    for changes in (dict(block=5), dict(remat='block'), dict(remat='dots')):
        found = both(of.clone(**changes), variables)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4),
            found,
            (gradient, logits),
        )
    blocks = [variables['params'][f'block{i}'] for i in range(2)]
    rest = {k: v for k, v in variables['params'].items() if not k.startswith('block')}
    stacks = {'params': {**rest, 'blocks': jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}
    stacked = of.clone(stacked=True, remat='block')
    abstract = jax.eval_shape(stacked.init, jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, stacks)
    np.testing.assert_allclose(both(stacked, stacks)[1], logits, atol=1e-5)
    apart, taken = unstacked(stacked, stacks)
    jax.tree.map(np.testing.assert_array_equal, taken, variables)
    assert not apart.stacked
    with pytest.raises(ValueError, match='take stacked blocks apart first'):
        stacked.apply(stacks, tokens, tokens, init_cache(of, 2, T), method='step')


def test_documents_that_see_both_ways_are_as_alone_in_blocks_of_queries_too(tokens):
    of = module('llada')
    variables, row = variables_of(of), jnp.concatenate(tokens)[None]
    segments = jnp.array([[1] * T + [2] * (T - 3) + [0] * 3])
    plain = jax.jit(of.apply)(variables, row, None, segments)
    alone = jax.jit(of.apply)(variables, row[:, T : 2 * T - 3])
    np.testing.assert_allclose(plain[:, T : 2 * T - 3], alone, atol=1e-4)
    blocks = jax.jit(of.clone(block=5).apply)(variables, row, None, segments)
    np.testing.assert_allclose(blocks, plain, atol=1e-4)


def test_long_rows_have_no_array_of_all_pairs():
    query = jax.ShapeDtypeStruct((1, 4096, 4, 8), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    both = jax.grad(lambda *a: attend_causally(*a, block=256).sum(), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(both)(query, key, key))
    assert '256,4096]' in text
    assert '4096,4096]' not in text


def test_rotations_know_differences_of_positions_alone_and_scalings_are_as_stated():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 5, 1, 16)), jnp.float32)
    at = jnp.arange(5)[None]

    def scores(shift):
        turned = rope.angles(at + shift, 16, 100.0)
        return jnp.einsum('bqhd,bkhd->bqk', rope.rotate(q, turned), rope.rotate(k, turned))

    np.testing.assert_allclose(scores(0), scores(37), atol=2e-4)
    plain, one = rope.frequencies(16, 100.0)
    np.testing.assert_allclose(plain, [100 ** (-i / 8) for i in range(8)])
    assert one == 1
    linear, _ = rope.frequencies(16, 100.0, dict(rope_type='linear', factor=4.0))
    np.testing.assert_allclose(linear, plain / 4)
    # Wavelengths 2 pi / w against n / 4 = 16 (kept below) and n / 1 = 64 (slowed above).
    scaled = dict(
        rope_type='llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    found, _ = rope.frequencies(16, 100.0, scaled)
    for w, got in zip(plain, found, strict=True):
        length = 2 * math.pi / w
        smooth = (64 / length - 1) / (4 - 1)
        mixed = (1 - smooth) * w / 8 + smooth * w
        assert got == pytest.approx(w if length < 16 else w / 8 if length > 64 else mixed)
    yarn = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=4096)
    found, stretch = rope.frequencies(128, 1e6, yarn)
    plain, _ = rope.frequencies(128, 1e6)
    turns = 4096 * plain / (2 * math.pi)
    assert stretch == pytest.approx(0.1 * math.log(4) + 1)
    np.testing.assert_allclose(found[turns > 32 * 1.3], plain[turns > 32 * 1.3])
    np.testing.assert_allclose(found[turns < 1 / 1.3], plain[turns < 1 / 1.3] / 4)
    assert np.all((found <= plain) & (found >= plain / 4))


def test_what_does_not_go_together_is_told():
    with pytest.raises(ValueError, match='width=24 must be divisible by heads=5'):
        module(heads=5)
    with pytest.raises(ValueError, match='heads=4 must be divisible by kv_heads=3'):
        module(kv_heads=3)
    with pytest.raises(ValueError, match='a head of 5 features cannot be rotated'):
        module(head_dim=5)
    with pytest.raises(ValueError, match="'ntk' is none of"):
        module(rope_scaling=dict(rope_type='ntk', factor=2.0))
    with pytest.raises(ValueError, match=r"'llama3' lacks .'low_freq_factor', 'high_freq_factor'"):
        module(
            rope_scaling=dict(rope_type='llama3', factor=2.0, original_max_position_embeddings=64)
        )
    with pytest.raises(ValueError, match='a window looks back; set window=None'):
        module('phi3', causal=False)
    both = module('llada')
    one, cache = jnp.ones((1, 1), int), init_cache(both, 1, 2)
    with pytest.raises(ValueError, match='one after another need a causal decoder'):
        both.apply(variables_of(both), one, one, cache, method='step')
    of = module()
    variables = variables_of(of)
    with pytest.raises(ValueError, match=r'integer tokens \[B, T\], got float32\[1, 3\]'):
        of.apply(variables, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match='a row of 65 tokens exceeds max_length=64'):
        of.apply(variables, jnp.zeros((1, 65), int))
    out = jax.jit(of.apply)(variables, jnp.array([[1, -1, 2], [3, 1, 40], [3, 1, 39]]))
    assert np.isnan(out).all((1, 2)).tolist() == [True, True, False]


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(tokens):
    of = module(dtype='bfloat16')
    variables = variables_of(of)
    assert of.apply(variables, tokens, method='hidden').dtype == jnp.bfloat16
    logits = jax.jit(of.apply)(variables, tokens)
    assert logits.dtype == jnp.float32
    wanted = jax.jit(module().apply)(variables, tokens)
    assert np.abs(logits - wanted).max() < 0.03 * np.abs(wanted).max()
    assert init_cache(of, 1, 4).keys[0].dtype == jnp.bfloat16


def test_weights_start_as_in_released_models_or_by_their_inputs():
    def deviations(**changes):
        made = decoder.Decoder(num_classes=400, width=32, depth=2, heads=2, tied=False, **changes)
        params = jax.jit(made.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
        block = params['block0']
        leaves = {
            'embedding': params['embed']['embedding'],
            'head': params['head'],
            'up': block['mlp']['up']['kernel'],
            'down': block['mlp']['down']['kernel'],
        }
        return {name: float(x.std()) for name, x in leaves.items()}

    # What ends a branch starts smaller, by the root of the number of branches.
    released = {'embedding': 0.02, 'head': 0.02, 'up': 0.02, 'down': 0.01}
    assert deviations() == pytest.approx(released, rel=0.1)
    inputs = {'embedding': 1.0, 'head': 32**-0.5, 'up': 32**-0.5, 'down': 128**-0.5 / 2}
    assert deviations(deviation=None) == pytest.approx(inputs, rel=0.1)


def test_blocks_that_are_stacked_are_traced_once_for_all(monkeypatch):
    traced, through = [], decoder.Block.__call__

    def counted(*arguments, **named):
        traced.append(1)
        return through(*arguments, **named)

    monkeypatch.setattr(decoder.Block, '__call__', counted)
    made = module(stacked=True)
    tree = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    traced.clear()
    jax.eval_shape(made.apply, tree, jnp.zeros((1, 2), jnp.int32))
    assert len(traced) == 1
