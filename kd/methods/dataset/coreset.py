"""Subsets of the real data, as baselines that are evaluated like synthetic sets."""

from __future__ import annotations

from kd.context import Context
from kd.method import Batch, Method
from kd.methods.dataset import common
from kd.metrics import Metrics, scalar
from kd.ranges import Count
from kd.state import State


def coreset(
    context: Context, *, images_per_class: Count, kind: str = 'random', experts: str = ''
) -> Method:
    """Chooses real images once; a step leaves them as they are.

    Args:
      context: the stage, of one step.
      images_per_class: of every class.
      kind: 'random', 'kmeans' (Liu et al. 2023, arXiv 2302.14416) or 'herding' (Rebuffi et al.
        2016, arXiv 1611.07725).
      experts: stage of experts in whose logits 'kmeans' and 'herding' work; '' for pixels.

    Raises:
      UserError: an unknown kind, or a class smaller than `images_per_class`.
    """
    network = common.student(context) if experts else None
    images, labels = common.real_start(
        context, images_per_class, kind, experts=experts, network=network
    )

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        del batch
        return state.replace(step=state.step + 1), {'examples': scalar(len(labels))}

    return Method(common.fixed_set(context, images, labels), step)
