"""DMAE and masked autoencoders: masks, pixels, features, a step by hand, what is exported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import pixel
from kd.methods.vision.dmae import alignment, dmae, features
from kd.methods.vision.masked_autoencoder import masked_autoencoder
from kd.models.masked_autoencoder import Decoder, Encoder, preset, random_mask, visible_patches
from kd.models.mlp import MLP
from kd.models.vit import EncoderBlock
from kd.network import from_linen, parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, SIDE, L, V, LR = 3, 8, 16, 4, 0.1
IMAGE = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32)
STUDENT, TEACHER = Encoder(2, 8, 4, 2), Encoder(2, 12, 4, 2)
DECODER = dict(width=8, depth=1, heads=2)
BLOCKS = ('block2',)


def context(student=STUDENT, teacher=TEACHER, tx=None, **rest):
    return seeds.context(
        network=from_linen(student, IMAGE), teacher=from_linen(teacher, IMAGE),
        tx=tx or optax.sgd(LR), batch_size=B, spec={}, **rest,
    )  # fmt: skip


def images():
    return jax.random.normal(jax.random.key(7), (B, SIDE, SIDE, 1))


@pytest.fixture(scope='module')
def run():
    """(context, method, state before, state after, metrics) of a step with weight 2."""
    made = context()
    method = dmae(made, weight=2.0, decoder=DECODER)
    teacher = made.teacher.init(jax.random.key(1))
    state = method.init(jax.random.key(0), {'teacher': teacher})
    before = jax.device_get(state.params)
    after, metrics = jax.jit(method.step)(state, {'input': images()})
    return made, method, before, state, after, metrics


# Masks


def test_masks_restore_the_order_of_patches():
    mask = random_mask(jax.random.key(0), 50, L, V)
    np.testing.assert_array_equal(mask.hidden.sum(1), L - V)
    for keep, restore, hidden in zip(*map(np.asarray, mask), strict=True):
        others = np.flatnonzero(hidden)
        assert sorted(keep) == sorted(set(range(L)) - set(others))
        # Hidden ones in any order: a place says which one it is.
        tokens = np.full(L, -1)
        tokens[:V] = keep
        np.testing.assert_array_equal(tokens[restore][keep], keep)
        assert (tokens[restore][others] == -1).all()
    # Every patch is as likely as another.
    assert np.abs(np.asarray(mask.hidden).mean(0) - 0.75).max() < 0.25


def test_as_many_patches_are_seen_as_the_released_code_shows():
    """Fault of the paper's text: 10 and 4 tokens are 9 and 3 patches."""
    counts = [visible_patches(196, ratio) for ratio in (0.75, 0.95, 0.98)]
    assert counts == [49, 9, 3]
    assert visible_patches(10, 0.9) == 1
    with pytest.raises(UserError, match=r'mask_ratio=0\.95 leaves none of 16 patches to be seen'):
        visible_patches(16, 0.95)


# Pixels


def test_patches_are_those_of_a_loop_and_go_back():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    found = np.asarray(pixel.patchify(x, 2))
    for row in range(2):
        for column in range(3):
            square = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(found[:, 3 * row + column], square.reshape(2, -1))
    np.testing.assert_array_equal(pixel.unpatchify(found, 2, 2), x)
    with pytest.raises(ValueError, match=r'images \[2, 4, 6, 3\] are no grid of patches of 4'):
        pixel.patchify(x, 4)


def test_hidden_pixels_alone_count():
    rng = np.random.default_rng(1)
    predicted, patches = rng.normal(size=(2, 3, L, 5))
    hidden = np.zeros((3, L))
    hidden[0, :4] = hidden[1, 2] = 1.0
    loss = jax.jit(lambda p: pixel.masked_pixel(p, patches, hidden))
    value, slope = loss(predicted), jax.jit(jax.grad(lambda p: loss(p).sum()))(predicted)
    error = ((predicted - patches) ** 2).mean(-1)
    np.testing.assert_allclose(value, [error[0, :4].mean(), error[1, 2], 0.0], rtol=1e-5)
    assert (np.asarray(slope)[hidden == 0] == 0).all()
    assert (np.asarray(slope)[hidden == 1] != 0).all()
    assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match='patches of one shape'):
        pixel.masked_pixel(predicted[:, 1:], patches, hidden)


def test_normalised_patches_have_mean_0_and_variance_1():
    rng = np.random.default_rng(2)
    patches, hidden = 3 + 5 * rng.normal(size=(2, 4, 9)), np.ones((2, 4))
    target = (patches - patches.mean(-1, keepdims=True)) / patches.std(-1, keepdims=True, ddof=1)
    kept = pixel.masked_pixel(target, patches, hidden, normalise=True)
    np.testing.assert_allclose(kept, 0.0, atol=1e-6)


# Features


def test_alignment_is_l1_of_unit_tokens():
    rng = np.random.default_rng(3)
    s, t = rng.normal(size=(2, B, 5, 12)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (s, t)]
    wanted = np.abs(unit[0] - unit[1]).mean((1, 2))
    call = jax.jit(alignment)
    np.testing.assert_allclose(call(s, t), wanted, rtol=1e-5)
    scales = rng.uniform(0.1, 10, size=(2, B, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(call(scales[0] * s, scales[1] * t), wanted, rtol=1e-5)
    np.testing.assert_allclose(call(scales[0] * t, t), 0.0, atol=1e-6)
    # The bound is met by opposite vectors of equal entries.
    ones = np.ones_like(s)
    np.testing.assert_allclose(call(-ones, ones), 2 / np.sqrt(12), rtol=1e-6)
    assert (np.asarray(call(s, t)) <= 2 / np.sqrt(12)).all()


def plain(params, x, keep):
    """Tokens of an encoder behind its blocks, by the modules that `kd.models.vit` has."""
    width = params['cls'].shape[-1]
    patches = pixel.patchify(x, 2) @ params['patch_embed']['kernel'].reshape(-1, width)
    patches = patches + params['patch_embed']['bias'] + places(width)
    seen = jnp.stack([patches[i, k] for i, k in enumerate(keep)])
    x = jnp.concatenate([jnp.tile(params['cls'], (len(x), 1, 1)), seen], 1)
    block, found = EncoderBlock(2, 4 * width, jnp.float32), []
    for i in range(4):
        x = block.apply({'params': params[f'block{i}']}, x)
        found.append(x)
    return found


def places(width, side=4):
    """Columns, then rows, each by sines and cosines."""
    frequency = 1e4 ** (-np.arange(width // 4) / (width // 4))
    table = []
    for row in range(side):
        for column in range(side):
            halves = [f(at * frequency) for at in (column, row) for f in (np.sin, np.cos)]
            table.append(np.concatenate(halves))
    return np.asarray(table, np.float32)


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def test_a_step_is_the_gradient_of_pixels_and_features(run):
    """Both networks see one mask; the teacher is only read."""
    _, _, before, state, after, metrics = run
    mask = random_mask(jax.random.split(state.step_key())[1], B, L, V)
    x, teacher = images(), state.frozen['teacher']['params']

    @jax.jit
    def objective(params, teacher):
        own, beside = params['network'], params['decoder']
        tokens = plain(own, x, mask.keep)
        last = layer_norm(own['encoder_norm'], tokens[3]) @ beside['embed']['kernel']
        last = last + beside['embed']['bias']
        rows = []
        for i in range(B):
            place = {int(k): j + 1 for j, k in enumerate(keep[i])}
            rows.append(
                [last[i, place[p]] if p in place else beside['mask_token'][0, 0] for p in range(L)]
            )
        patches = jnp.stack([jnp.stack(row) for row in rows]) + places(8)
        y = jnp.concatenate([last[:, :1], patches], 1)
        y = EncoderBlock(2, 32, jnp.float32).apply({'params': beside['block0']}, y)
        y = layer_norm(beside['decoder_norm'], y) @ beside['pixels']['kernel']
        y = (y + beside['pixels']['bias'])[:, 1:]
        error = ((y - pixel.patchify(x, 2)) ** 2).mean(-1)
        pixels = (error * mask.hidden).sum() / mask.hidden.sum()
        linear = params['projectors']['block2']['linear']
        mapped = tokens[2] @ linear['kernel'] + linear['bias']
        target = plain(teacher, x, mask.keep)[2]
        unit = [z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (mapped, target)]
        features = jnp.abs(unit[0] - unit[1]).mean()
        return pixels + 2.0 * features, {'pixels': pixels, 'features': features}

    keep = np.asarray(mask.keep)
    (value, parts), slope = jax.value_and_grad(objective, has_aux=True)(before, teacher)
    for name, wanted in {**parts, 'loss': value}.items():
        np.testing.assert_allclose(metrics[name].total / metrics[name].count, wanted, rtol=2e-5)
    moved = jax.tree.map(lambda a, b: (a - b) / LR, before, jax.device_get(after.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), moved, slope)


def test_what_is_exported_is_the_encoder_alone(run):
    """Trap: projector and decoder stay parts of the state."""
    made, _, _, state, after, _ = run
    assert set(after.params) == {'network', 'decoder', 'projectors'}
    found = after.variables()['params']
    blocks = {f'block{i}' for i in range(4)}
    assert set(found) == {'cls', 'patch_embed', 'encoder_norm', *blocks}
    assert parameter_count(after.variables()) == parameter_count(
        made.network.init(jax.random.key(0))
    )
    jax.tree.map(np.testing.assert_array_equal, after.frozen['teacher'], state.frozen['teacher'])


def test_a_teacher_that_leaves_early_says_the_same_bit_for_bit(run):
    made, *_, state, _, _ = run
    keep = random_mask(jax.random.key(4), B, L, V).keep
    teacher, variables, x = made.teacher, state.frozen['teacher'], images()
    early = jax.jit(lambda k: features(teacher, variables, x, k, BLOCKS)[0])
    late = jax.jit(lambda k: teacher.apply(variables, x, keep=k, capture=BLOCKS).features['block2'])
    np.testing.assert_array_equal(early(keep), late(keep))
    assert early(keep).shape == (B, 1 + V, 12)
    # Trap: what the student does not see the teacher does not either.
    program = early.lower(keep).as_text()
    assert f'{B}x{1 + V}x12x' in program
    assert f'{B}x{1 + L}x12x' not in program
    # Trap: a second mask is another target.
    other = random_mask(jax.random.key(5), B, L, V).keep
    assert np.abs(early(keep) - early(other)).max() > 1e-3
    # The order of patches is no matter, but for the places of tokens.
    turned = early(keep[:, ::-1])
    np.testing.assert_allclose(turned[:, 1:][:, ::-1], early(keep)[:, 1:], atol=1e-5)
    np.testing.assert_allclose(turned[:, 0], early(keep)[:, 0], atol=1e-5)


def test_a_student_that_is_the_teacher_has_the_loss_of_an_autoencoder():
    made = context(teacher=STUDENT)
    method, alone = dmae(made, decoder=DECODER), masked_autoencoder(made, decoder=DECODER)
    state = method.init(jax.random.key(0), {'teacher': made.network.init(jax.random.key(3))})
    state = state.replace(frozen={'teacher': state.variables()})
    identity = {'linear': {'kernel': jnp.eye(8), 'bias': jnp.zeros(8)}}
    state = state.replace(params={**state.params, 'projectors': {'block2': identity}})
    batch = {'input': images()}
    metrics = jax.jit(method.step)(state, batch)[1]
    parts = {name: state.params[name] for name in ('network', 'decoder')}
    plain = jax.jit(alone.step)(state.replace(params=parts, opt_state=alone.init(
        jax.random.key(0)).opt_state), batch)[1]  # fmt: skip
    assert float(metrics['features'].total) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics['loss'].total) == pytest.approx(float(plain['loss'].total), rel=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(student=MLP(widths=(3,))), r'^stage\.network is a MLP; name an encoder'),
        (
            dict(teacher=Encoder(4, 8, 1, 2)),
            r'teacher has patches of 4 pixels and the student of 2',
        ),
        (dict(teacher_blocks=(4,)), r'teacher_blocks: there is no block 4 of 4, counted from 0'),
        (
            dict(student_blocks=(1, 1), teacher_blocks=(1, 2)),
            r'method\.student_blocks names a block twice',
        ),
        (dict(student_blocks=(1, 2)), '2 blocks of the student are held to 1 of the teacher'),
        (dict(decoder=dict(wide=3)), r"method\.decoder has an unknown key 'wide'"),
        (dict(decoder=dict(width=8, heads=3)), r'decoder: Decoder width=8 must be divisible'),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    modules = {name: options.pop(name) for name in ('student', 'teacher') if name in options}
    with pytest.raises(UserError, match=message):
        dmae(context(**modules), **{'decoder': DECODER, **options})


# Networks


@pytest.mark.parametrize(('of', 'millions'), [('vit_l', 303.1), ('vit_b', 85.6), ('vit_s', 21.6)])
def test_encoders_have_the_parameters_of_the_released_ones(of, millions):
    """Without the positions, which are fixed: 0.2 M of 303.3 in the release."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(preset(of).init, jax.random.key(0), image)
    assert parameter_count(variables) == pytest.approx(1e6 * millions, rel=2e-3)


def test_a_decoder_of_a_class_token_alone_has_no_patch_to_copy():
    """Where all patches are seen there is nothing to predict, and nothing breaks."""
    mask = random_mask(jax.random.key(0), 2, L, L)
    decoder = Decoder((4, 4), 4, **DECODER)
    tokens = jnp.ones((2, 1 + L, 8))
    variables = jax.jit(decoder.init)(jax.random.key(0), tokens, mask.restore)
    made = jax.jit(decoder.apply)(variables, tokens, mask.restore)
    assert made.shape == (2, L, 4)
    np.testing.assert_array_equal(pixel.masked_pixel(made, made + 1.0, mask.hidden), 0.0)
