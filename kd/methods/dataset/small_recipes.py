"""Recipes of dataset distillation on digits and MNIST."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kd.config import ConfigDict
from kd.methods.dataset import recipes

STEP_SIZES = (0.003, 0.01, 0.03, 0.1)
PROTOCOL = dict(epochs=300, batch_size=1000)
WIDE = dict(wide=dict(name='kd.models.mlp.MLP', widths=(256,)))


class Setting(NamedTuple):
    """What is done with a data set of `recipes.DATA`.

    Attributes:
      standardise: kind of standardisation.
      together: experts at once.
      expert_lr: of plain SGD.
      segment: bound of the start epochs, and epochs that are matched.
      steps: outer steps of trajectory matching.
      networks: further ones that the set is tested on.
      full_epochs: on all real images, in the large batches of the evaluation.
    """

    standardise: str
    together: int
    expert_lr: float
    segment: tuple[int, int]
    steps: int
    networks: Mapping[str, Any]
    full_epochs: int


# Perceptrons for CPUs; ConvNets on MNIST for a GPU.
SETTINGS = {
    'cpu': Setting('mean', 20, 0.05, (10, 2), 800, WIDE, 200),
    'cpu_mnist': Setting('mean', 10, 0.01, (5, 1), 500, WIDE, 10),
    'mnist': Setting('channels', 10, 0.01, (10, 2), 2000, recipes.cross_architecture(), 10),
}


def matching(
    name: str,
    ipc: int,
    shards: int,
    *,
    experts: Mapping[str, Any],
    method: Mapping[str, Any],
    average: str = '',
) -> ConfigDict:
    """Matching of trajectories: Adam on the pixels and on the logarithm of the step size.

    `experts` and `method` are what a paper adds to the stage of its experts and to its method.
    """
    setting = SETTINGS[name]
    data, together = recipes.shared_out(recipes.DATA[name], setting.together, shards)
    plain_descent = dict(name='sgd', lr=setting.expert_lr)
    return recipes.assembled(
        data,
        standardise=setting.standardise,
        ipc=ipc,
        shards=shards,
        experts=recipes.expert_stage(
            data, **{'together': together, 'optimizer': plain_descent, **experts}
        ),
        distilled=recipes.matching_stage(
            data,
            method=dict(student_steps=20, log_step_size=True, **method),
            ipc=ipc,
            segment=setting.segment,
            steps=setting.steps,
            optimizer=dict(name='adam', lr=0.02),
            protocol=PROTOCOL,
            eval_every=setting.steps // 4,
            average=average,
        ),
        protocol=PROTOCOL,
        step_sizes=STEP_SIZES,
        average=average,
        networks=setting.networks,
        full_epochs=setting.full_epochs,
    )


def condensation(name: str, ipc: int, shards: int, method: Mapping[str, Any]) -> ConfigDict:
    """Condensation with perceptrons, class by class and without augmentation."""
    setting = SETTINGS[name]
    return recipes.condensation(
        recipes.DATA[name],
        ipc,
        shards,
        standardise=setting.standardise,
        method=method,
        optimizer=dict(name='adam', lr=0.02),
        steps=1000,
        batch_size=100,
        protocol=PROTOCOL,
        step_sizes=STEP_SIZES,
        eval_every=250,
        networks=setting.networks,
        full_epochs=setting.full_epochs,
    )
