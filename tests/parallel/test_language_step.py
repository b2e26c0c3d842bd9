"""A step of a language model over several devices: what it moves between them, to the byte."""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.aot import hlo
from kd.claims import seeds
from kd.methods.lm.distillation import distillation
from kd.methods.rl.grpo import grpo
from kd.models.decoder import SHARDING, Decoder
from kd.network import from_linen
from kd.parallel import layout
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import rollout, rollout_rules, tree_shardings
from kd.sampling.autoregressive import sampler

pytestmark = pytest.mark.usefixtures('compiled_quickly')

# Lengths that differ, so that a shape tells what it is of.
V, T, B, CHUNK = 96, 24, 8, 6
MESHES = [
    dict(fsdp=2, tensor=2),
    *(pytest.param(each, marks=pytest.mark.slow) for each in (dict(fsdp=4), dict(data=2, fsdp=2))),
]


def decoder(width, depth, hidden, **changes):
    shape = jax.ShapeDtypeStruct((1, T), jnp.int32)
    module = Decoder(
        num_classes=V, width=width, depth=depth, mlp_hidden=hidden, heads=4, kv_heads=2,
        stacked=True, remat='block', fields=('input',), max_length=T, **changes,
    )  # fmt: skip
    return from_linen(module, shape)


def drawn(init, *arguments):
    """As `init(key, *arguments)`, but numbers are NumPy's, for which nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype)
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0), *arguments))


@pytest.fixture(scope='module')
def problem():
    """A step of distillation, its state, its batch and what it does on one device."""
    student, teacher = decoder(32, 2, 48), decoder(64, 3, 80, tied=False)
    context = seeds.context(network=student, teacher=teacher, tx=optax.sgd(0.1), num_classes=V)
    method = distillation(context, chunk=CHUNK)
    rng = np.random.default_rng(0)
    batch = {
        'input': rng.integers(0, V, (B, T)).astype(np.int32),
        'response_mask': rng.integers(0, 2, (B, T)).astype(bool),
    }
    frozen = {'teacher': drawn(teacher.init)}
    state = drawn(method.init, frozen).replace(frozen=frozen)
    return method, state, batch, jax.jit(method.step)(state, batch)


def compiled(step, mesh, state, batch):
    """A step over a mesh, its arguments, and what it moves."""

    def over_devices(state, batch):
        with layout.inside(mesh):
            return step(state, batch)

    lying = tree_shardings(state, SHARDING, mesh)
    state, batch = jax.device_put((state, batch), (lying, mesh_lib.batch_sharding(mesh)))
    program = jax.jit(over_devices, out_shardings=(lying, None)).lower(state, batch).compile()
    return program, (state, batch), hlo.collectives(program.as_text())


def weights(params):
    """Bytes of the matrices of the blocks, and of each of the others."""
    sizes = jax.tree.map(lambda x: x.nbytes, params)
    blocks = sum(x.nbytes for x in jax.tree.leaves(params['blocks']) if x.ndim == 3)
    head = sizes['embed']['embedding']
    return blocks, head


def moved(found, kind):
    return sum(each.times * each.bytes for each in found if each.kind == kind)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_weights_are_gathered_once_each_way_and_gradients_added_once(problem, sizes):
    method, state, batch, (alone, told) = problem
    sizes = dict(dict(data=1, fsdp=1, tensor=1), **sizes)
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:4])
    program, arguments, found = compiled(method.step, mesh, state, batch)
    tensor, rows = sizes['tensor'], B * T // (sizes['data'] * sizes['fsdp'])
    blocks, head = weights(state.params['network'])
    frozen, theirs = weights(state.frozen['teacher']['params'])

    # Blocks for the forward and, computed again, for the backward pass; the head, which is the
    # embedding, once; of the teacher each weight and the head once, and no table that is looked up.
    # Numbers of tokens come to all columns of the tables, and once more for the gradient; and so
    # does one number for each, which tells whether all count alike.
    gathered = (2 * blocks + head + frozen + theirs) / tensor
    tokens = B * T * 4
    assert gathered <= moved(found, 'all-gather') <= gathered + 4 * tokens

    # Every gradient once, over all that share the batch; a data axis has a share of it once more.
    # The head's and the embedding's come apart. Norms and numbers are small.
    norms = sum(x.nbytes for x in jax.tree.leaves(state.params)) - blocks - head
    added = (blocks + 2 * head) / tensor
    if sizes['data'] > 1:
        added += added / sizes['fsdp']
    # Along tensor, hidden states: two of a block, of which the student's are computed again but for
    # the last sum, and two of its gradients (queries, keys and values apart, gate and up); what is
    # looked up; and of a sweep over slabs, of which two are counted though the second is only for
    # weights that differ, the gradient of each token and 16 numbers at most.
    wide, wider = rows * 32 * 4, rows * 64 * 4
    if tensor > 1:
        added += 2 * (4 + 5) * wide + 3 * 2 * wider + (wide + wider)
        added += 2 * (wide + rows * 16 * 4)
    assert moved(found, 'all-reduce') <= added + 2 * norms + 1024

    # Inside the loop over slabs nothing but what a vocabulary that is cut asks for.
    slabs = rows // CHUNK
    often = [each for each in found if each.times >= slabs]
    assert bool(often) == (tensor > 1)
    assert all(each.kind == 'all-reduce' for each in often)
    assert sum(each.bytes for each in often) <= 2 * CHUNK * (32 + 16) * 4

    new, metrics = program(*arguments)
    np.testing.assert_allclose(np.divide(*metrics['loss']), np.divide(*told['loss']), rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), new.params, alone.params)


@pytest.mark.slow
def test_left_to_itself_xla_moves_more(problem):
    """What the layout is for: the same step without it, where the test above fails."""
    method, state, batch, _ = problem
    mesh = mesh_lib.make_mesh(dict(data=2, fsdp=2), jax.devices()[:4])
    lying = tree_shardings(state, SHARDING, mesh)
    placed = jax.device_put((state, batch), (lying, mesh_lib.batch_sharding(mesh)))
    program = jax.jit(method.step, out_shardings=(lying, None)).lower(*placed).compile()
    assert max(each.times for each in hlo.collectives(program.as_text())) >= B * T // CHUNK


PROMPT, ANSWER, GROUP = 8, 11, 2


def even(context):
    """Rewards answers that begin with an even token."""
    del context
    return lambda tokens, mask, batch: jnp.where(tokens[:, 0] % 2, 0.0, 1.0)


def prompts():
    """Four of them, padded on the left."""
    asked = np.arange(PROMPT) >= PROMPT - np.array([PROMPT, 3, 1, 4])[:, None]
    rng = np.random.default_rng(0)
    return {
        'input': np.where(asked, rng.integers(3, V, asked.shape), 0).astype(np.int32),
        'prompt_mask': asked,
    }


def test_no_weight_is_gathered_for_a_token_of_a_rollout():
    network, batch = decoder(32, 2, 48), prompts()
    variables = drawn(network.init)
    draw = sampler(network.module, max_new=ANSWER, stop=(2,), block=5)
    alone = jax.jit(draw.of)(variables, batch, jax.random.key(0))
    mesh = mesh_lib.make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])

    def over_devices(variables, batch):
        laid_out = rollout(variables, rules=rollout_rules(SHARDING), mesh=mesh)
        with layout.inside(mesh):
            return draw.of(laid_out, batch, jax.random.key(0))

    lying = tree_shardings(variables, SHARDING, mesh), mesh_lib.batch_sharding(mesh)
    arguments = jax.device_put((variables, batch), lying)
    program = jax.jit(over_devices).lower(*arguments).compile()
    blocks, head = weights(variables['params'])
    found = hlo.collectives(program.as_text())
    # Once, before the loop: blocks, and the embedding as a table and as a head.
    once = [each for each in found if each.times == 1]
    assert blocks / 2 <= moved(once, 'all-gather') <= (blocks + 2 * head) / 2 + 4 * 4 * PROMPT
    # For every token sums along tensor, of its hidden states and of what is said of the vocabulary.
    loop = [each for each in found if each.times > 1]
    assert {each.kind for each in loop} == {'all-reduce'}
    said = program(*arguments)
    np.testing.assert_array_equal(said.tokens, alone.tokens)
    np.testing.assert_allclose(said.log_probs, alone.log_probs, atol=1e-5)


@pytest.fixture(scope='module')
def rollouts():
    """`made(mesh)`, a step of GRPO with a teacher; its state, prompts and what it does alone."""
    student, teacher = decoder(32, 2, 48), decoder(64, 3, 80, tied=False)
    spec = {
        'input': jax.ShapeDtypeStruct((PROMPT,), jnp.int32),
        'prompt_mask': jax.ShapeDtypeStruct((PROMPT,), bool),
    }
    context = seeds.context(
        network=student, teacher=teacher, tx=optax.sgd(0.1), spec=spec, batch_size=4
    )

    def made(mesh):
        laid_out = context
        if mesh is not None:
            rolled = partial(rollout, rules=rollout_rules(SHARDING), mesh=mesh)
            laid_out = dataclasses.replace(context, rollout=rolled)
        return grpo(
            laid_out,
            reward=dict(name=f'{__name__}.even'),
            sampling=dict(group=GROUP, max_new=ANSWER, stop=(2,), block=5),
            chunk=CHUNK,
            teacher_weight=0.1,
        )

    batch = prompts()
    frozen = {'teacher': drawn(teacher.init)}
    alone = made(None)
    state = drawn(alone.init, frozen).replace(frozen=frozen)
    return made, state, batch, jax.jit(alone.step)(state, batch)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [dict(data=2, fsdp=2), dict(fsdp=2, tensor=2)], ids=str)
def test_a_step_of_grpo_gathers_weights_for_its_rollout_once_and_none_for_a_token(rollouts, sizes):
    made, state, batch, (alone, told) = rollouts
    mesh = mesh_lib.make_mesh(dict(dict(data=1), **sizes), jax.devices()[:4])
    program, arguments, found = compiled(made(mesh).step, mesh, state, batch)
    tensor, tokens = sizes.get('tensor', 1), 4 * GROUP * (PROMPT + ANSWER) * 4
    blocks, head = weights(state.params['network'])
    frozen, theirs = weights(state.frozen['teacher']['params'])
    # Blocks for the rollout, forward and backward; the head, and as a table, for it, and once.
    gathered = (3 * blocks + 3 * head + frozen + theirs) / tensor
    assert moved(found, 'all-gather') <= gathered + 4 * tokens
    # Of the decoding loop: sums over tensor, of a token's hidden states and of the vocabulary.
    loop = [each for each in found if each.times >= ANSWER - 1]
    assert bool(loop) == (tensor > 1)
    assert {each.kind for each in loop} <= {'all-reduce'}
    new, metrics = program(*arguments)
    np.testing.assert_allclose(np.divide(*metrics['loss']), np.divide(*told['loss']), atol=1e-6)
    assert np.divide(*metrics['length']) == np.divide(*told['length'])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), new.params, alone.params)


def test_layouts_are_heeded_inside_a_mesh_of_several_devices_alone():
    rows = jnp.ones((8, 2))
    mesh = mesh_lib.make_mesh(dict(data=2, fsdp=2), jax.devices()[:4])
    one = mesh_lib.make_mesh(dict(data=1), jax.devices()[:1])
    for around in (contextlib.nullcontext(), layout.inside(one)):
        with around:
            assert layout.lying(rows, 'rows') is rows
            assert layout.shards(8) == 1
    with layout.inside(mesh):
        # As many devices share rows; what does not divide is left alone.
        assert (layout.shards(8), layout.shards(6)) == (4, 1)
        whole = jax.device_put(rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        lying = jax.jit(lambda x: layout.lying(x, 'rows'))
        assert lying(whole).sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)
        assert lying(whole[:6]).shape == (6, 2)

        def local(x):
            return layout.lying(x, 'rows') * layout.shards(8)

        spec = jax.sharding.PartitionSpec(mesh_lib.BATCH_AXES)
        mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(rows)
    np.testing.assert_array_equal(mapped, rows)
