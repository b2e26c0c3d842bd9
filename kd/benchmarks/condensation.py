"""Steps of dataset condensation, against their published formulations written plainly in torch.

    KD_PEERS=peers/bin/python python -m kd.benchmarks condensation

Value and gradient, with respect to synthetic images (and the step size of trajectory matching), of

| work | |
|---|---|
| DC | distances of the gradients of 10 classes, 1 synthetic and 64 real images each |
| DM | distances of their mean embeddings |
| MTT | normalised distance of parameters after steps of descent on 10 or 100 images |

on the same networks, weights and images; see `kd.benchmarks.plain.condensation` for the peer.
Memory of ours is what XLA says of the program, temporaries and results; of torch, what the process
holds at most during a step beyond what it held before. The gradients of both sides are compared
before anything is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from kd.benchmarks import turns
from kd.benchmarks.plain import condensation as plain
from kd.errors import UserError
from kd.losses import gradient_matching, mean_embedding, trajectory
from kd.models import convnet, mlp
from kd.network import from_linen

CLASSES, REAL = 10, 64


class Case(NamedTuple):
    """What is measured.

    Attributes:
      method: 'DC', 'DM' or 'MTT'.
      depth, width: of the network; a depth of 0 is a perceptron with two hidden layers.
      pixels: of a side of its grey images.
      images_per_class: synthetic ones.
      steps: of descent, for MTT.
      time, memory: targets, at most; memory of NaN is not told, where both hold next to none.
      reason: why it misses, if it does.
    """

    method: str
    depth: int
    width: int
    pixels: int
    images_per_class: int
    steps: int
    time: float
    memory: float = float('nan')
    reason: str = ''

    def name(self) -> str:
        network = f'ConvNet-{self.depth}' if self.depth else 'perceptron'
        steps = f', {self.steps} steps' if self.steps else ''
        return (
            f'{self.method}, {network} of width {self.width}, {self.pixels} pixels, '
            f'{self.images_per_class} per class{steps}'
        )


CASES = (
    Case('DC', 3, 64, 8, 1, 0, 0.3, 1.7),
    Case('DM', 3, 64, 8, 1, 0, 0.3, 1.0),
    Case('MTT', 0, 64, 8, 1, 20, 0.3),
    Case('MTT', 0, 64, 8, 10, 20, 0.3),
    Case('MTT', 3, 32, 28, 1, 5, 0.6, 1.0),
)


def module(case: Case) -> nn.Module:
    """The network, its convolutions as the methods choose them here."""
    if not case.depth:
        return mlp.MLP(widths=(case.width, case.width), num_classes=CLASSES)
    net = convnet.ConvNet(depth=case.depth, width=case.width, num_classes=CLASSES)
    return net if case.method == 'DM' else convnet.in_loops(net, jax.default_backend())


def write(case: Case, file: Path) -> None:
    """Random images and weights, for both sides."""
    net, shape = module(case), (case.pixels, case.pixels, 1)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in (('synthetic', case.images_per_class), ('real', REAL)):
        arrays[name] = rng.normal(size=(CLASSES, count, *shape)).astype('f4')
    for seed, name in enumerate(('start', 'target')):
        params = net.init(jax.random.key(seed), jnp.zeros((1, *shape)))['params']
        flat = traverse_util.flatten_dict(params, sep='/')
        arrays |= {f'{name}/{path}': np.asarray(x) for path, x in flat.items()}
    np.savez(file, **arrays)


def loss(case: Case, shape: tuple[int, ...]) -> Any:
    """`loss((images, step size), real, start, target)`."""
    net = from_linen(module(case), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    labels = jnp.repeat(jnp.arange(CLASSES), case.images_per_class)

    def cross_entropy(params, x, y):
        logits = net.apply({'params': params}, x, train=True).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def dc(trained, real, start, target):
        def of_class(params, examples):
            x, y = examples
            return cross_entropy(params, x, jnp.full(len(x), y))

        classes = jnp.arange(CLASSES)
        sides = (trained[0], classes), (real, classes)
        return gradient_matching.gradient_matching(of_class, start, *sides).sum()

    def dm(trained, real, start, target):
        def embed(x):
            flat = x.reshape(-1, *shape)
            found = net.apply({'params': start}, flat, capture=('features',)).features['features']
            return found.reshape(*x.shape[:2], -1)

        theirs = jax.lax.stop_gradient(embed(real))
        return mean_embedding.mean_embedding_distance(embed(trained[0]), theirs).sum()

    def mtt(trained, real, start, target):
        images, step_size = trained

        def inner(params, images, step):
            return cross_entropy(params, images.reshape(-1, *shape), labels)

        return trajectory.mtt_loss(
            inner, images, step_size, start, target, jnp.zeros((case.steps, 1))
        )

    return {'DC': dc, 'DM': dm, 'MTT': mtt}[case.method]


_HELD: dict[str, Any] = {}


def prepare(file: str, case: list[Any]) -> None:
    """Reads the arrays and compiles the step."""
    told, arrays = Case(*case), np.load(file)
    trees: dict[str, Any] = {}
    for name in ('start', 'target'):
        flat = {k.removeprefix(f'{name}/'): jnp.asarray(arrays[k]) for k in arrays if name in k}
        trees[name] = traverse_util.unflatten_dict(flat, sep='/')
    trained = jnp.asarray(arrays['synthetic']), jnp.float32(plain.STEP_SIZE)
    given = trained, jnp.asarray(arrays['real']), trees['start'], trees['target']
    step = jax.jit(jax.value_and_grad(loss(told, arrays['real'].shape[2:])))
    _HELD.update(step=step.lower(*given).compile(), given=given)


def step() -> dict[str, float]:
    """{'cpu_s', 'mib'} of a step."""
    work = partial(_HELD['step'], *_HELD['given'])
    took, _ = turns.cpu_seconds(lambda: jax.block_until_ready(work()))
    of = _HELD['step'].memory_analysis()
    return {'cpu_s': took, 'mib': (of.temp_size_in_bytes + of.output_size_in_bytes) / 2**20}


def gradient() -> list[float]:
    """Of the images, that both sides may be compared."""
    value, (images, _) = _HELD['step'](*_HELD['given'])
    return [float(value), *np.asarray(images, np.float64).reshape(-1)[:200].tolist()]


FUNCTIONS = {'prepare': prepare, 'step': step, 'gradient': gradient}


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios: see `kd.benchmarks`."""
    if not options.peers:
        return []
    return [row for case in CASES for row in compared(case, options)]


def compared(case: Case, options: argparse.Namespace) -> list[turns.Row]:
    """Time and memory of a case.

    Raises:
      UserError: the gradients differ.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        turns.sides('kd.benchmarks.condensation', plain.__name__, options) as (workers, peer),
    ):
        file = Path(folder) / 'arrays.npz'
        write(case, file)
        for worker in workers.values():
            worker.ask('prepare', file=str(file), case=list(case))
        ours, theirs = (np.array(workers[name].ask('gradient')) for name in ('kd', 'peer'))
        apart = np.abs(ours - theirs).max() / np.abs(theirs).max()
        if apart > 1e-3:
            raise UserError(f'{case.name()}: gradients differ by {apart:.1e} of the largest.')
        askers = {name: partial(worker.ask, 'step') for name, worker in workers.items()}
        answers = turns.take_turns(askers, options.rounds)
    found = []
    for of, key, target in (('CPU time', 'cpu_s', case.time), ('memory', 'mib', case.memory)):
        if target != target:
            continue
        both = ([each[key] for each in answers[name][1:]] for name in ('kd', 'peer'))
        found.append(
            turns.Row(case.name(), peer, turns.over(*both), target, of, reason=case.reason)
        )
    return found
