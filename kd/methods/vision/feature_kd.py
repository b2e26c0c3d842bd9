"""Distillation by any mixture of losses on features and logits, each with a name of its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd import callables
from kd import config as config_lib
from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError, did_you_mean
from kd.losses import check_micro_batches, classification, divergence, feature_maps
from kd.method import Method, Objective, minimize
from kd.metrics import mean
from kd.network import Network, Output, feature_names, feature_shape, from_linen, output_shape
from kd.ranges import Count, Fraction, NonNegative, Positive, Size, check_value
from kd.state import NETWORK, PyTree

PROJECTORS = 'projectors'
LOGITS = 'logits'
# Of a term, beside keywords of its loss.
KEYS = ('loss', 'student', 'teacher', 'weight', 'projector', 'resize')
# Examples of a trial; what is lost of its value by rounding.
TRIAL, ROUNDING = 4, 1e-5


class Term(NamedTuple):
    """A loss between features of both sides.

    Attributes:
      loss: `loss(student, teacher) -> [B]`, or with keyword `labels`, its other keywords given.
      student, teacher: names of features; of one or several.
      weight: above 0.
      projector: of the student's features, None for none.
      resize: whose positions are pooled to those of the other side: 'student', 'teacher' or ''.
      labelled: whether the loss takes `labels`.
    """

    loss: Callable[..., jax.Array]
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    weight: float
    projector: Network | None
    resize: str
    labelled: bool


def feature_kd(
    context: Context,
    *,
    terms: Mapping[str, Any],
    hard_weight: NonNegative = 1.0,
    soft_weight: NonNegative = 0.0,
    temperature: Positive = 4.0,
    label_smoothing: Fraction = 0.0,
    ramp_steps: Size = 0,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Labels, softened outputs, and terms on features.

        loss = w CE(y, f(x)) + r (a T^2 KL_T(g || f) + sum_i w_i D_i(P_i(f_i), g_i)),
        r = min(step / ramp_steps, 1)

    A term is a block in `terms`, under the name that its value is logged by:

        rkd=dict(loss='kd.losses.relation.rkd_distance', student='features', weight=25.0)
        hint=dict(loss='kd.losses.feature.hint', student='stage2', teacher='stage2', weight=0.01,
                  projector=dict(name='kd.models.projectors.ConvNorm'))

    `loss` is an import path of a function of (student, teacher), or one of (student, teacher,
    labels); further keys are its keywords. `student` and `teacher` name captured features (see
    `kd.network.feature_names`) or 'logits'; several at once in a tuple, which the loss then gets;
    `teacher`, left out, is as `student`. `projector` is the block of a module of the student's
    features (of several, as arguments), whose `width` (`widths`, of several) is filled in from
    the teacher's; where it returns a tuple, so is the loss called. `resize` pools the positions of
    'student' or 'teacher' to the other's, or those of the 'larger'. A term of weight 0 is left out
    with its projector, and without terms and soft weight the run is that of `supervised`, bit for
    bit.

    Projectors are the part `projectors` of the state, the stage's result is `network` alone.

    Every term is tried on random features when the method is built. One whose gradient with respect
    to the student's features is 0 there is refused by name, as are shapes that do not fit.

    Args:
      context: the stage; needs a network, an optimiser and labelled data, and a teacher unless all
        weights are 0.
      terms: by name, see above.
      hard_weight: w.
      soft_weight: a.
      temperature: T of the softened outputs; not of terms.
      label_smoothing: of the hard term.
      ramp_steps: steps over which all but the hard term are faded in; 0 for none.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated; refused for terms that compare the
        examples of a batch.
    """
    network = context.classifier
    used = _terms(context, terms, micro_batches)
    projectors = {label: term.projector for label, term in used.items() if term.projector}
    taught = bool(used) or soft_weight > 0
    ours, theirs = (
        tuple(sorted({name for term in used.values() for name in getattr(term, side)} - {LOGITS}))
        for side in ('student', 'teacher')
    )

    def init(key: jax.Array) -> PyTree:
        if not projectors:
            return network.init(key)
        made = {
            label: projector.init(jax.random.fold_in(key, i))
            for i, (label, projector) in enumerate(projectors.items())
        }
        return {NETWORK: network.init(key), PROJECTORS: _by_collection(made)}

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        labels = batch['label']
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        own, beside = (params[NETWORK], params[PROJECTORS]) if projectors else (params, {})
        output = network.apply(
            state.variables(part=NETWORK, params=own), *network.of(batch),
            train=True, key=dropout_key, capture=ours,
        )  # fmt: skip
        hard = classification.cross_entropy(
            output.logits, batch['label'], label_smoothing=label_smoothing
        )
        total, metrics, mutables = hard_weight * hard, {'hard_loss': mean(hard)}, {}
        if taught:
            teacher = context.teacher.apply(
                state.frozen['teacher'], *context.teacher.of(batch), capture=theirs
            )
            ramp = jnp.minimum(state.step / ramp_steps, 1.0) if ramp_steps else 1.0
            if soft_weight:
                soft = temperature**2 * divergence.forward_kl(
                    output.logits, teacher.logits, temperature=temperature
                )
                total, metrics['soft_loss'] = total + ramp * soft_weight * soft, mean(soft)
            rest = state.mutables.get(PROJECTORS, {})
            for i, (label, term) in enumerate(used.items()):
                variables = _of_label(label, {'params': beside, **rest})
                value, mutables[label] = _value(
                    term, variables, output, teacher, batch['label'],
                    train=True, key=jax.random.fold_in(dropout_key, i),
                )  # fmt: skip
                total, metrics[label] = total + ramp * term.weight * value, mean(value)
        metrics['accuracy'] = mean(output.logits.argmax(-1) == labels)
        by_part = {NETWORK: output.mutables, PROJECTORS: _mutables(mutables)}
        return Objective(mean(total), metrics, by_part if projectors else output.mutables)

    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def _value(term, variables, output, teacher, labels, **apply):
    """(values [B], mutables of the projector) of a term."""
    student, target = (
        tuple(side.logits if name == LOGITS else side.features[name] for name in names)
        for side, names in ((output, term.student), (teacher, term.teacher))
    )
    target = jax.lax.stop_gradient(target)
    mutables: PyTree = {}
    if term.resize == 'student':
        student = tuple(feature_maps.pooled(x, target[0].shape[1:-1]) for x in student)
    if term.projector:
        projected = term.projector.apply(variables, *student, **apply)
        outputs, mutables = projected.logits, projected.mutables
        student = outputs if isinstance(outputs, tuple) else (outputs,)
    elif len(student) > 1:
        student = (student,)
    if term.resize == 'teacher':
        target = tuple(feature_maps.pooled(x, student[0].shape[1:-1]) for x in target)
    given = {'labels': labels} if term.labelled else {}
    value = term.loss(*student, target if len(target) > 1 else target[0], **given)
    return _per_example(value, len(labels)), mutables


def _per_example(value, size):
    """[B] of a loss by class or of the whole batch, whose mean is to count."""
    return value if value.shape == (size,) else jnp.broadcast_to(jnp.mean(value), (size,))


def _terms(context: Context, terms: Mapping[str, Any], micro_batches: int) -> dict[str, Term]:
    """The terms with a weight, each tried."""
    used = {}
    for label, block in terms.items():
        where = f'{context.stage}.method.terms.{label}'
        term = _term(context, block, where, micro_batches)
        if term is not None:
            _try(context, term, where)
            used[label] = term
    return used


def _term(context: Context, block: Any, where: str, micro_batches: int) -> Term | None:
    if not isinstance(block, Mapping) or not {'loss', 'student'} <= set(block):
        raise UserError(f"{where} must be a block with 'loss' and 'student', got {block!r}.")
    arguments = {name: value for name, value in block.items() if name not in KEYS}
    weight = block.get('weight', 1.0)
    check_value(NonNegative, weight, where=f'{where}.weight')
    resize = block.get('resize', '')
    if resize not in ('', 'student', 'teacher', 'larger'):
        raise UserError(
            f"{where}.resize must be '', 'student', 'teacher' or 'larger', got {resize!r}."
        )
    loss = callables.resolve(block['loss'])
    callables.check_arguments(loss, arguments, where=where)
    check_micro_batches(loss, micro_batches)
    if not weight:
        return None
    student = _names(context.network, block['student'], f'{where}.student')
    teacher = _names(context.teacher, block.get('teacher', block['student']), f'{where}.teacher')
    if resize == 'larger':
        resize = _larger(*(_shape(*side).shape for side in (
            (context.network, student[0]), (context.teacher, teacher[0]),
        )))  # fmt: skip
    projector = None
    if block.get('projector'):
        projector = _projector(context, block['projector'], student, teacher, resize, where)
    labelled = 'labels' in inspect.signature(loss).parameters
    bound = _bound(loss, arguments)
    return Term(bound, student, teacher, float(weight), projector, resize, labelled)


def _larger(student: tuple[int, ...], teacher: tuple[int, ...]) -> str:
    """The side with more positions, '' for as many."""
    if student[1:-1] == teacher[1:-1]:
        return ''
    return 'student' if math.prod(student[1:-1]) > math.prod(teacher[1:-1]) else 'teacher'


def _bound(loss, arguments):
    return lambda *features, **labels: loss(*features, **labels, **arguments)


def _names(network: Network, given: Any, where: str) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    known = (LOGITS, *feature_names(network))
    for name in names:
        if name not in known:
            raise UserError(
                f"{where}: there is no feature '{name}'.{did_you_mean(name, known)} "
                f'There are: {", ".join(known)}.'
            )
    return names


def _shape(network: Network, name: str) -> jax.ShapeDtypeStruct:
    if name != LOGITS:
        return feature_shape(network, name)
    return jax.ShapeDtypeStruct(output_shape(network), jnp.float32)


def _projector(context, block, student, teacher, resize, where) -> Network:
    """The module of a block for the shapes of these features."""
    where = f'{where}.projector'
    block = dict(block)
    factory = callables.resolve(block.get('name', ''))
    target = _shape(context.teacher, teacher[0])
    if 'width' in inspect.signature(factory).parameters:
        block.setdefault('width', target.shape[-1])
    if 'widths' in inspect.signature(factory).parameters:
        block.setdefault('widths', tuple(_shape(context.teacher, x).shape[-1] for x in teacher))
    shapes = [_shape(context.network, name) for name in student]
    if resize == 'student':
        shapes = [
            jax.ShapeDtypeStruct((1, *target.shape[1:-1], x.shape[-1]), x.dtype) for x in shapes
        ]
    return from_linen(config_lib.build(block, where=where), *shapes)


def _try(context: Context, term: Term, where: str) -> None:
    """Raises `UserError` for shapes that do not fit, and for a gradient that is 0."""
    sides = []
    for seed, network, names in (
        (1, context.network, term.student), (2, context.teacher, term.teacher),
    ):  # fmt: skip
        key, features = jax.random.key(seed), {}
        for i, name in enumerate(names):
            shape = (TRIAL, *_shape(network, name).shape[1:])
            features[name] = jax.random.normal(jax.random.fold_in(key, i), shape)
        sides.append(features)
    labels = jnp.zeros(TRIAL, jnp.int32)

    @jax.jit
    def gradient(student, teacher):
        variables = term.projector.init(jax.random.key(0)) if term.projector else {}

        def total(student):
            output, target = (Output(x.get(LOGITS), {}, x) for x in (student, teacher))
            value, _ = _value(
                term, variables, output, target, labels, train=True, key=jax.random.key(3)
            )
            return jnp.sum(value)

        value, slope = jax.value_and_grad(total)(student)
        return jnp.abs(value), optax.tree.norm(slope) * optax.tree.norm(student)

    try:
        value, slope = jax.device_get(gradient(*sides))
    except (ValueError, TypeError) as error:
        shapes = [
            ', '.join(f"'{name}' {x.shape[1:]}" for name, x in features.items())
            for features in sides
        ]
        raise UserError(
            f"{where}: {str(error).splitlines()[0]} Its student's features are {shapes[0]}, its "
            f"teacher's {shapes[1]}: a `projector` changes channels, `resize` positions."
        ) from error
    if slope <= ROUNDING * value:
        raise UserError(
            f"{where}: its gradient with respect to the student's {', '.join(term.student)} is 0 "
            'on random features, so it would teach nothing; choose other features or another loss.'
        )


def _by_collection(made: Mapping[str, PyTree]) -> PyTree:
    """{label: {collection: tree}} as {collection: {label: tree}}."""
    names = {name: 0 for variables in made.values() for name in variables}
    return {name: {label: v[name] for label, v in made.items() if name in v} for name in names}


def _mutables(by_label: Mapping[str, PyTree]) -> PyTree:
    return _by_collection({label: tree for label, tree in by_label.items() if tree})


def _of_label(label: str, collections: PyTree) -> PyTree:
    return {name: tree[label] for name, tree in collections.items() if label in tree}
