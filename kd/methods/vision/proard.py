"""ProARD: all parts of an elastic network are taught to be robust (2025, arXiv:2506.07666)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax

from kd.context import Context
from kd.data.transforms import augment
from kd.losses import classification, divergence, robust
from kd.method import Method, Objective, minimize
from kd.methods import start
from kd.methods.vision.trades import attack_of, both, trades_values
from kd.metrics import Metrics, mean
from kd.models import elastic
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive, Size
from kd.state import PyTree, State

Criterion = Literal['rslad', 'ard', 'adaad']
# Apart from the keys of steps.
_ARCHITECTURES = 2**31 - 1


def proard(
    context: Context,
    *,
    epsilon: NonNegative,
    step: Positive,
    attack_steps: Size = 10,
    space: Mapping[str, tuple[NonNegative, ...]] | None = None,
    hold: Count = 1,
    sort: tuple[Positive, ...] | None = None,
    criterion: Criterion = 'rslad',
    clean_weight: Fraction = 1 / 6,
    class_mean: bool = False,
    joint: NonNegative = 0.0,
    beta: NonNegative = 6.0,
    low: Finite = -1.0,
    high: Finite = 1.0,
    jitter: NonNegative = 0.002,
    unroll: bool = False,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """A phase: robust distillation into parts of an elastic network that are drawn at random.

        loss = (1 - w) KL(q || s_a(x')) + w KL(q || s_a(x)),
        q = teacher(x),   x' = argmax KL(q || s_a(.)) near x,   a drawn from the space

    One architecture a is drawn for every `hold` steps, each of its coordinates evenly from what is
    allowed; the paper opens the space in phases (widths, then depths, then inner widths), each a
    stage that starts from the one before (`references.start`). The student attacked is in
    evaluation mode, the one that learns in training mode; running statistics take in clean and
    attacked inputs. Neither labels nor a temperature.

    Args:
      context: the stage; an elastic network, an optimiser, data, and a teacher.
      epsilon, step, attack_steps, low, high, jitter, unroll: of the attack, in the units of the
        inputs; see `kd.losses.robust.pgd`.
      space: options that are allowed now, by the name of the choice; all of the others.
      hold: steps with one architecture; as released those of a pass over the data.
      sort: for a phase that opens inner widths: inner channels are put in order of importance at
        the start, within the tiers that these options cut off; () for all at once, None for not.
      criterion: 'rslad'; 'ard', which attacks by labels and asks at the attacked input what the
        teacher says of the clean one; or 'adaad', which asks the teacher there too.
      clean_weight: w; of 'ard' none is.
      class_mean: over classes too, 1 / K of this, as released.
      joint: the teacher is the largest network itself, whose loss of TRADES is added with this
        weight, as the paper tells it; the released code has a frozen copy, which is 0.
      beta: of that loss.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.

    Source: ProARD 2025, arXiv:2506.07666; its losses, Zi et al. 2021, arXiv:2108.07969.
    """
    network = context.classifier
    module = elastic.elastic(network, f'{context.stage}.network')
    allowed = module.space().restrict(space or {}, where=f'{context.stage}.method.space')
    attack = attack_of(epsilon, step, attack_steps, low, high, jitter, unroll)
    teacher = None if joint else context.teacher

    def loss(params, state, batch, key) -> Objective:
        augment_key, attack_key, clean_key, adversarial_key, own_key = jax.random.split(key, 5)
        labels = batch['label']
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables, (x,) = state.variables(params=params), network.of(batch)
        arch = allowed.sample(architecture_key(state, hold))
        still = jax.lax.stop_gradient(variables)
        total: Any = 0.0
        metrics: Metrics = {}
        if teacher is None:
            own = trades_values(network, variables, x, batch['label'], own_key, attack, beta)
            law = jax.lax.stop_gradient(own.clean.logits)
            ask = lambda x: network.apply(still, x).logits  # noqa: E731
            total, metrics = joint * own.values, {'largest_loss': mean(own.values)}
            variables = {**variables, **own.adversarial.mutables}
        else:
            ask = lambda x: teacher.apply(state.frozen['teacher'], x).logits  # noqa: E731
            law = ask(x)

        def raised(x):
            logits = network.apply(still, x, arch=arch).logits
            if criterion == 'ard':
                return classification.cross_entropy(logits, batch['label'])
            return divergence.forward_kl(logits, ask(x) if criterion == 'adaad' else law)

        attacked = attack(attack_key, raised, x)
        clean, adversarial = both(
            network, variables, x, attacked, clean_key, adversarial_key, arch=arch
        )
        values = _values(
            criterion, clean.logits, adversarial.logits, law, lambda: ask(attacked),
            batch['label'], clean_weight,
        )  # fmt: skip
        total = total + (values / law.shape[-1] if class_mean else values)
        metrics |= {
            'student_loss': mean(values),
            'accuracy': mean(clean.logits.argmax(-1) == labels),
            'robust_accuracy': mean(adversarial.logits.argmax(-1) == labels),
        }
        return Objective(mean(total), metrics, adversarial.mutables)

    init = start.from_reference(network.init, context, transform=_sorted(context, sort))
    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def architecture_key(state: State, hold: int = 1) -> jax.Array:
    """The key of the architecture of this step, the same for `hold` steps."""
    return jax.random.fold_in(jax.random.fold_in(state.key, _ARCHITECTURES), state.step // hold)


def _values(criterion, clean, adversarial, law, law_attacked, labels, clean_weight):
    if criterion == 'ard':
        return robust.ard(clean, adversarial, law, labels)
    if criterion == 'adaad':
        return robust.adaad(clean, adversarial, law, law_attacked(), clean_weight=clean_weight)
    return robust.rslad(clean, adversarial, law, clean_weight=clean_weight)


def _sorted(context: Context, tiers: Any) -> start.Transform | None:
    if tiers is None:
        return None

    def transform(reference: PyTree, own: PyTree) -> PyTree:
        del own
        return elastic.sort_channels(context.network, reference, tiers)

    return transform
