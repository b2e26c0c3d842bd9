"""DMAE: a masked autoencoder whose features are those of a larger one (arXiv:2208.12256)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import feature_maps
from kd.method import Method, Objective, minimize
from kd.methods import start
from kd.methods.vision.feature_kd import PROJECTORS
from kd.methods.vision.masked_autoencoder import DECODER, Block, autoencoder, checked
from kd.metrics import mean
from kd.models.projectors import Linear
from kd.network import Network, from_linen
from kd.ranges import Count, Decay, NonNegative, Size
from kd.state import NETWORK, PyTree


def dmae(
    context: Context,
    *,
    mask_ratio: Decay = 0.75,
    student_blocks: Sequence[Size] = (),
    teacher_blocks: Sequence[Size] = (),
    weight: NonNegative = 1.0,
    decoder: Block = None,
    normalise: bool = False,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Hidden pixels, and a teacher's tokens of the patches that are seen.

        loss = masked_pixel + w sum_i mean_{n, d} | N(A_i s_i)_nd - N(sg t_i)_nd |

    with N the scaling of a token to unit length, s_i and t_i what a block of the student and one of
    the teacher make of the same patches, the class token among them, and A_i a linear map with a
    bias. Both see one mask. The teacher is an encoder that was not fine-tuned; it leaves after the
    last block that is asked for, on the patches that are seen, where the released code runs all of
    it and its decoder.

    The encoder is the stage's result; parts `decoder` and `projectors` are not exported.

    Args:
      context: the stage; its network and teacher are encoders of `kd.models.masked_autoencoder` of
        one size of patches. The network begins as `references.start`, if there is one.
      mask_ratio: share of hidden patches, rounded up to whole ones.
      student_blocks, teacher_blocks: numbers of the blocks, from 0, that are held to each other; ()
        for the one at three quarters of the depth, 8 of 12 and 17 of 24.
      weight: w.
      decoder, normalise, augmentation, micro_batches: as of
        `kd.methods.vision.masked_autoencoder.masked_autoencoder`.

    Raises:
      UserError: networks of another kind, patches of other sizes, blocks that are not there.
    """
    of = autoencoder(context, mask_ratio=mask_ratio, decoder=decoder, normalise=normalise)
    student = checked(of.network, f'{context.stage}.network')
    teacher = checked(context.teacher, f'{context.stage}.teacher')
    if teacher.patch != student.patch:
        raise UserError(
            f'{context.stage}.teacher has patches of {teacher.patch} pixels and the student of '
            f'{student.patch}: their tokens are of different places.'
        )
    ours = _blocks(student_blocks, student.depth, f'{context.stage}.method.student_blocks')
    theirs = _blocks(teacher_blocks, teacher.depth, f'{context.stage}.method.teacher_blocks')
    if len(ours) != len(theirs):
        raise UserError(
            f'{context.stage}.method: {len(ours)} blocks of the student are held to {len(theirs)} '
            'of the teacher; name as many.'
        )
    if len(set(ours)) < len(ours):
        # Projectors bear the names of the student's blocks.
        raise UserError(f'{context.stage}.method.student_blocks names a block twice: {ours}.')
    tokens = jax.ShapeDtypeStruct((1, 1 + of.visible, student.width), jnp.float32)
    projector = from_linen(Linear(teacher.width, initial='xavier'), tokens)

    def init(key: jax.Array) -> dict[str, PyTree]:
        keys = (jax.random.fold_in(key, 1 + i) for i in range(len(ours)))
        made = {name: projector.init(each)['params'] for name, each in zip(ours, keys, strict=True)}
        return {**of.init(key), PROJECTORS: {'params': made}}

    def loss(params, state, batch, key) -> Objective:
        augment_key, mask_key = jax.random.split(key)
        images = augment.augment(augment_key, batch, augmentation, context.num_classes)['input']
        mask = of.mask(mask_key, len(images))
        output = of.encode({'params': params[NETWORK]}, images, mask, ours)
        pixels = of.loss({'params': params[DECODER]}, output.logits, images, mask)
        taught = features(context.teacher, state.frozen['teacher'], images, mask.keep, theirs)
        apart = jnp.zeros(len(images))
        for name, target in zip(ours, taught, strict=True):
            own = projector.apply({'params': params[PROJECTORS][name]}, output.features[name])
            apart += alignment(own.logits, target)
        return Objective(
            mean(pixels + weight * apart), {'pixels': mean(pixels), 'features': mean(apart)}
        )

    started = start.from_reference(init, context)
    return minimize(loss, context.tx, started, micro_batches=micro_batches)


def features(
    teacher: Network, variables: PyTree, images: jax.Array, keep: jax.Array, names: Sequence[str]
) -> list[jax.Array]:
    """Tokens [B, 1 + V, D] behind blocks of a teacher, which goes no further than the last of them.

    Args:
      teacher: of an `Encoder`.
      variables: its own; no gradient flows to them.
      images: [B, H, W, C].
      keep: int [B, V], the patches that it sees.
      names: 'block17', ...
    """
    last = max(int(name.removeprefix('block')) for name in names)
    found = teacher.apply(variables, images, keep=keep, stop=last + 1, capture=tuple(names))
    return [jax.lax.stop_gradient(found.features[name]) for name in names]


def alignment(projected: jax.Array, target: jax.Array) -> jax.Array:
    """mean_{n, d} | N(projected)_nd - N(target)_nd | of tokens [B, N, D], [B], at most 2 / sqrt(D).

    Source: DMAE 2022, arXiv:2208.12256, as released.
    """
    distance = feature_maps.direction(projected, target, order=1)
    return jnp.mean(distance, axis=-1) / target.shape[-1]


def _blocks(given: Sequence[int], depth: int, where: str) -> tuple[str, ...]:
    """Names of blocks, by default of the one at three quarters of the depth."""
    numbers = tuple(given) or (max(3 * depth // 4 - 1, 0),)
    if missing := [number for number in numbers if number >= depth]:
        raise UserError(f'{where}: there is no block {missing[0]} of {depth}, counted from 0.')
    return tuple(f'block{number}' for number in numbers)
