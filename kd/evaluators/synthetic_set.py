"""How good a training set is: networks trained on it from scratch, tested on real data.

    evaluate = fresh_networks(network, sgd_phases(1000))
    accuracies = evaluate(jax.random.split(key, 5), synthetic, test, learning_rate)

Any training set will do: synthetic images, real subsets, with hard or soft labels. A set is
`{'input': [n, ...], 'label': int [n] or float [n, classes]}`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.losses.segments import inner_batches
from kd.network import Network, output_shape

Examples = dict[str, jax.Array]
Transform = Callable[[jax.Array, Examples], Examples]


class Phase(NamedTuple):
    """Part of a training schedule; the optimiser starts afresh at its beginning.

    Attributes:
      epochs: passes through the set.
      tx: the optimiser, given the learning rate (an array: it may itself have been trained).
    """

    epochs: int
    tx: Callable[[jax.Array], optax.GradientTransformation]


def sgd_phases(
    epochs: int,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    drop: float = 0.1,
    late_momentum: float | None = None,
) -> tuple[Phase, Phase]:
    """The schedule of the trajectory-matching papers: SGD, dropping the learning rate halfway.

    The velocity is reset at the drop. Weight decay is added to the gradient of every parameter.

    Args:
      epochs: of both halves together.
      momentum: of the first half.
      weight_decay: of both.
      drop: factor on the learning rate in the second half.
      late_momentum: of the second half; None for the same.

    Source: Cazenavette et al. 2022, arXiv 2203.11932, as released. Shen et al. 2023, arXiv
    2310.10541, have weight_decay 1e-3, drop 0.5 and late_momentum 0.8.
    """

    def sgd(learning_rate: jax.Array, momentum: float) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(weight_decay)
        return optax.chain(decay, optax.sgd(learning_rate, momentum=momentum))

    late = momentum if late_momentum is None else late_momentum
    return (
        Phase(epochs - epochs // 2, lambda rate: sgd(rate, momentum)),
        Phase(epochs // 2, lambda rate: sgd(rate * drop, late)),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-sum_c label_c log softmax(logits)_c in nats, [B], for int [B] or float [B, C] labels."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def fresh_networks(
    network: Network,
    phases: Sequence[Phase],
    *,
    batch_size: int = 256,
    transform: Transform | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    relabel: Callable[[Any, jax.Array], jax.Array] | None = None,
    test_batch_size: int = 1000,
) -> Callable[..., jax.Array]:
    """Builds `evaluate(keys [K], examples, test, learning_rate, teacher=None) -> [K]` accuracies.

    Each key initialises and trains one network; the K of them are vmapped. A step is one compiled
    call, kept for the next evaluation of a set of the same size. There is no loop inside it, in
    which XLA for CPU would run convolutions many times slower. The networks are tested once, at the
    end. `evaluate` raises ValueError for sets that do not fit together.

    NumPy arrays stay on the host, which gathers every batch of them; arrays of JAX are gathered on
    the device. Convert sets that fit there.

    Args:
      network: the architecture. On CPU, where convolutions vmapped over weights are slow, choose
        `ConvNet(conv='matmul')`.
      phases: of training; see `sgd_phases`.
      batch_size: at most the whole set is used; the last batch of an epoch may be smaller.
      transform: augmentation of the training batches, `transform(key, batch) -> batch`.
      loss: `loss(logits, labels) -> [B]`.
      relabel: `relabel(teacher, inputs) -> labels`, which replace those of every batch after the
        transform.
      test_batch_size: images tested at a time.

    Source: the protocol of Cazenavette et al. 2022, arXiv 2203.11932.
    """
    step = _step(network, phases, batch_size, transform, loss, relabel)
    outputs = output_shape(network)[-1]
    rows = jax.jit(
        jax.vmap(
            lambda key, number, size: _draw(key, number, size, batch_size)[0], (0, None, None)
        ),
        static_argnums=2,
    )
    initialise, tested = jax.jit(jax.vmap(network.init)), _test(network, test_batch_size)

    @functools.partial(jax.jit, static_argnums=0)
    def start(phase, variables, learning_rate):
        tx = phases[phase].tx(learning_rate)
        return jax.vmap(lambda v: tx.init(v['params']))(variables)

    def evaluate(keys, examples, test, learning_rate, teacher=None):
        _check(examples, test, outputs)
        size, hosted = len(examples['label']), isinstance(examples['input'], np.ndarray)
        learning_rate = jnp.asarray(learning_rate, jnp.float32)
        variables, number, given = initialise(keys), 0, examples
        for phase, (epochs, _) in enumerate(phases):
            opt_state = start(phase, variables, learning_rate)
            for _ in range(epochs * math.ceil(size / batch_size)):
                if hosted:
                    chosen = np.asarray(rows(keys, number, size))
                    given = {name: np.asarray(x)[chosen] for name, x in examples.items()}
                variables, opt_state = step(
                    (phase, size, hosted), variables, opt_state, keys, number, given,
                    learning_rate, teacher,
                )  # fmt: skip
                number += 1
        return tested(variables, test)

    return evaluate


def label_robust_score(
    synthetic: float, random: float, synthetic_hard: float, full_hard: float, weight: float = 0.5
) -> float:
    """Label-robust score: what a set is worth beyond the labels it comes with, in [0, 1].

        alpha = weight (synthetic - random) - (1 - weight) (full_hard - synthetic_hard)
        score = (e^alpha - e^-1) / (e - e^-1)

    Args:
      synthetic: accuracy in [0, 1] on the synthetic set with the method's own labels.
      random: accuracy on random real images under the same labelling and augmentation.
      synthetic_hard: accuracy on the synthetic set with hard labels.
      full_hard: accuracy on the whole real data with hard labels.
      weight: of the improvement over random images.

    Source: in the manner of DD-Ranking, Li et al. 2025, arXiv 2505.13300.
    """
    return _score(weight * (synthetic - random) - (1 - weight) * (full_hard - synthetic_hard))


def augmentation_robust_score(
    synthetic: float,
    random: float,
    synthetic_plain: float,
    random_plain: float,
    weight: float = 0.5,
) -> float:
    """Augmentation-robust score: what a set is worth with and without augmentation, in [0, 1].

        beta = weight (synthetic - random) + (1 - weight) (synthetic_plain - random_plain)
        score = (e^beta - e^-1) / (e - e^-1)

    Args:
      synthetic, random: accuracies in [0, 1] on synthetic and random real images, augmented.
      synthetic_plain, random_plain: the same without augmentation.
      weight: of the augmented pair.

    Source: in the manner of DD-Ranking, Li et al. 2025, arXiv 2505.13300.
    """
    return _score(weight * (synthetic - random) + (1 - weight) * (synthetic_plain - random_plain))


def _score(gain: float) -> float:
    return (math.exp(gain) - math.exp(-1.0)) / (math.exp(1.0) - math.exp(-1.0))


def _step(network, phases, batch_size, transform, loss, relabel):
    """One step of all networks; the first argument is (phase, size of the set, given a batch)."""

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def step(static, variables, opt_state, keys, number, given, learning_rate, teacher):
        phase, size, gathered = static
        tx = phases[phase].tx(learning_rate)

        def one(variables, opt_state, key, given):
            indices, mask, transform_key, key = _draw(key, number, size, batch_size)
            batch = given if gathered else jax.tree.map(lambda x: x[indices], given)
            if transform is not None:
                batch = transform(transform_key, batch)
            if relabel is not None:
                batch = {**batch, 'label': relabel(teacher, batch['input'])}
            return _update(network, tx, loss, variables, opt_state, batch, mask, key)

        in_axes = (0, 0, 0, 0 if gathered else None)
        return jax.vmap(one, in_axes)(variables, opt_state, keys, given)

    return step


def _test(network, batch_size):
    """`tested(variables of K networks, test) -> [K]` accuracies."""

    @jax.jit
    def correct(variables, inputs, labels):
        logits = jax.vmap(lambda v: network.apply(v, inputs).logits)(variables)
        return (logits.argmax(-1) == labels).sum(-1)

    def tested(variables, test):
        hits, total = jnp.float32(0), len(test['label'])
        for i in range(0, total, batch_size):
            part = slice(i, i + batch_size)
            hits += correct(variables, test['input'][part], test['label'][part])
        return hits / total

    return tested


def _draw(key, number, size, batch_size):
    """Rows of step `number`, the mask of the real ones, keys for transform and network."""
    count = math.ceil(size / batch_size)
    order_key, key = jax.random.split(key)
    orders = inner_batches(jax.random.fold_in(order_key, number // count), size, batch_size, count)
    indices, mask = (rows[number % count] for rows in orders)
    transform_key, key = jax.random.split(jax.random.fold_in(key, number))
    return indices, mask, transform_key, key


def _update(network, tx, loss, variables, opt_state, batch, mask, key):
    mutables = {name: tree for name, tree in variables.items() if name != 'params'}

    def mean_loss(params):
        output = network.apply({'params': params, **mutables}, batch['input'], train=True, key=key)
        losses = jnp.where(mask, loss(output.logits, batch['label']), 0.0)
        return losses.sum() / mask.sum(), output.mutables

    grads, updated = jax.grad(mean_loss, has_aux=True)(variables['params'])
    updates, opt_state = tx.update(grads, opt_state, variables['params'])
    params = optax.apply_updates(variables['params'], updates)
    return {'params': params, **mutables, **updated}, opt_state


def _check(examples: Examples, test: Examples, outputs: int) -> None:
    for name, part in (('training', examples), ('test', test)):
        sizes = part['input'].shape[0], part['label'].shape[0]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError(f'The {name} set has {sizes[0]} inputs and {sizes[1]} labels.')
        label = np.asarray(part['label'])
        if label.ndim == 1 and (label.min() < 0 or label.max() >= outputs):
            raise ValueError(
                f'Labels of the {name} set lie in {label.min()}..{label.max()}, and the network '
                f'has outputs 0..{outputs - 1}.'
            )
    if examples['input'].shape[1:] != test['input'].shape[1:]:
        shapes = list(examples['input'].shape[1:]), list(test['input'].shape[1:])
        raise ValueError(f'Training examples are {shapes[0]}, test examples {shapes[1]}.')
