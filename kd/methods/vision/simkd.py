"""SimKD: a student that learns the teacher's last maps and has its classifier.

    config.student = stage(
        network=dict(name='kd.models.reused.reused_head', network=dict(...), width=64),
        teacher='teacher',
        method=dict(name='kd.methods.vision.simkd.simkd'))

Source: Chen et al. 2022, arXiv:2203.14001.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import feature_maps
from kd.method import Method, Objective, minimize
from kd.metrics import mean
from kd.models.reused import ReusedHead
from kd.network import feature_names, feature_shape
from kd.ranges import Count
from kd.state import PyTree

HEAD, PROJECTED = 'head', 'projected'


def simkd(
    context: Context,
    *,
    teacher: str = 'map',
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """The mean square between the projected maps of the student and those of the teacher.

        loss = mean (P(f(x)) - g(x))^2

    over positions and channels; labels are not used. The teacher's maps are pooled to the student's
    positions where it has more. The head is the teacher's from the start, and is not trained. The
    projector is a part of the student, which is `kd.models.reused.ReusedHead`.

    Args:
      context: the stage; needs a `ReusedHead`, an optimiser, labelled data (for the metric alone)
        and a teacher with a linear `head`.
      teacher: name of the teacher's maps, what its head has the mean (or all) of.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: another network; maps or heads that do not fit.
    """
    network = context.classifier
    if not isinstance(network.module, ReusedHead):
        raise UserError(
            f'{context.stage}.network is {type(network.module).__name__}, and simkd trains a '
            "'kd.models.reused.reused_head' around it."
        )
    _check_maps(context, teacher)

    def init(key: jax.Array, frozen: PyTree) -> PyTree:
        variables = network.init(key)
        own, head = variables['params'][HEAD], frozen['teacher']['params'].get(HEAD, {})
        shapes = [jax.tree.map(jnp.shape, dict(x)) for x in (own, head)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{context.stage}: the teacher's head has the shapes {shapes[1]}, the student's "
                f'{shapes[0]}; its `width` and `pool` must be those of the teacher.'
            )
        return {**variables, 'params': {**variables['params'], HEAD: head}}

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        labels = batch['label']
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        output = network.apply(
            state.variables(params=params), *network.of(batch),
            train=True, key=dropout_key, capture=(PROJECTED,),
        )  # fmt: skip
        said = context.teacher.apply(
            state.frozen['teacher'], *context.teacher.of(batch), capture=(teacher,)
        )
        ours = output.features[PROJECTED]
        target = feature_maps.pooled(said.features[teacher], ours.shape[1:-1])
        losses = feature_maps.hierarchical_context(ours, target, levels=())
        metrics = {'accuracy': mean(output.logits.argmax(-1) == labels)}
        return Objective(mean(losses), metrics, output.mutables)

    return minimize(
        loss, context.tx, init, micro_batches=micro_batches,
        trainable=lambda path: not path.startswith(f'{HEAD}/'),
    )  # fmt: skip


def _check_maps(context: Context, name: str) -> None:
    """Raises `UserError` for a teacher without these maps, or with fewer positions or channels."""
    names = feature_names(context.teacher)
    if name not in names:
        raise UserError(
            f"{context.stage}.method.teacher: there is no feature '{name}'; there are: "
            f'{", ".join(names)}.'
        )
    ours, theirs = (
        feature_shape(network, of).shape
        for network, of in ((context.network, PROJECTED), (context.teacher, name))
    )
    fewer = len(ours) != len(theirs) or any(
        a > b for a, b in zip(ours[1:-1], theirs[1:-1], strict=True)
    )
    if fewer or ours[-1] != theirs[-1]:
        raise UserError(
            f"{context.stage}: the student's projected maps are {ours[1:]}, the teacher's "
            f"'{name}' {theirs[1:]}; `width` is the teacher's channels, and the student may have "
            'no more positions.'
        )
