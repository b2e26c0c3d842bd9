"""Soft labels, static and dynamic, of mixed images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data.transforms import mixing
from kd.evaluators import compensated_set
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, SHAPE = 4, (4, 4, 1)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(12, *SHAPE)).astype(np.float32)
TEST = {
    'input': RNG.normal(size=(400, *SHAPE)).astype(np.float32),
    'label': RNG.integers(0, CLASSES, 400).astype(np.int32),
}
KEYS = jax.random.split(jax.random.key(0), 2)


def network(module):
    return from_linen(module, jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))


@pytest.fixture(scope='module')
def ensembles():
    """Two networks each, {kind: (networks, variables, labelled images)}."""
    modules = {
        'linear': MLP((), CLASSES),
        'nonlinear': ConvNet(1, 6, CLASSES, norm='batch'),
    }
    made = {}
    for kind, module in modules.items():
        nets = dict.fromkeys(('a', 'b'), network(module))
        variables = {name: jax.jit(net.init)(jax.random.key(i)) for i, (name, net) in
                     enumerate(nets.items())}  # fmt: skip
        for one in variables.values():  # Networks that are sure of what they say.
            one['params']['head'] = jax.tree.map(lambda x: 20 * x, one['params']['head'])
        labelled = compensated_set.soft_examples(nets, variables, IMAGES)
        made[kind] = nets, variables, labelled
    return made


def mixed(labelled, alpha):
    """Images mixed, and the mixture of their static labels."""
    mix = jax.jit(functools.partial(mixing.mixup, alpha=alpha))
    batch = mix(jax.random.key(1), {name: jnp.asarray(x) for name, x in labelled.items()})
    return batch['input'], batch['label']


def test_the_logits_of_several_networks_are_averaged(ensembles):
    nets, variables, labelled = ensembles['nonlinear']
    each = [nets[name].apply(variables[name], IMAGES).logits for name in nets]
    assert float(jnp.abs(each[0] - each[1]).max()) > 0.1
    np.testing.assert_allclose(labelled['label'], np.mean(each, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['linear', 'nonlinear'])
def test_dynamic_labels_are_the_static_ones_where_nothing_is_mixed(ensembles, kind):
    nets, variables, labelled = ensembles[kind]
    # Beta(1e-4, 1e-4) lies at 0 or 1: each image is one of its pair.
    inputs, static = mixed(labelled, 1e-4)
    dynamic = compensated_set.mean_logits(nets, variables, inputs)
    certain = [(np.abs(image - IMAGES).max((1, 2, 3)) == 0).any() for image in inputs]
    assert np.mean(certain) > 0.9
    np.testing.assert_allclose(dynamic[np.asarray(certain)], static[np.asarray(certain)], atol=1e-5)
    assert (np.abs(inputs - IMAGES).max((1, 2, 3)) > 0).any()


def test_logits_of_mixed_images_are_mixed_logits_for_linear_networks_only(ensembles):
    gaps = {}
    for kind, (nets, variables, labelled) in ensembles.items():
        inputs, static = mixed(labelled, 0.8)
        dynamic = compensated_set.mean_logits(nets, variables, inputs)
        gaps[kind] = float(jnp.abs(dynamic - static).max() / jnp.abs(static).max())
    assert gaps['linear'] < 1e-5
    assert gaps['nonlinear'] > 0.02


@pytest.fixture(scope='module')
def training():
    """Trains a linear network; what is compiled is kept for the module."""
    student = network(MLP((), CLASSES))

    @functools.cache
    def build(labels, mixup, nets=(), augmentation=()):
        # Dynamic labels take a third of the epochs, two networks labelling.
        epochs = 30 if labels == 'dynamic' else 10
        return compensated_set.SoftTraining(
            student, lr=0.05, epochs=epochs, batch_size=5, mixup=mixup, temperature=2.0,
            labels=labels, networks=dict(nets), augmentation=augmentation,
        )  # fmt: skip

    def accuracies(labels, ensemble, *, mixup=0.0, examples=None, augmentation=()):
        nets, variables, labelled = ensemble
        train = build(labels, mixup, tuple(nets.items()), augmentation)
        return train(KEYS, examples or labelled, TEST, variables=variables)

    return accuracies


@pytest.mark.parametrize('kind', ['linear', 'nonlinear'])
def test_training_without_mixture_or_augmentation_is_the_same_under_both(training, ensembles, kind):
    static, dynamic = (training(labels, ensembles[kind]) for labels in compensated_set.LABELS)
    np.testing.assert_array_equal(static, dynamic)


def test_training_on_mixtures_is_the_same_for_linear_networks_only(training, ensembles):
    static, dynamic = (
        training(labels, ensembles['linear'], mixup=0.8) for labels in compensated_set.LABELS
    )
    np.testing.assert_allclose(static, dynamic, atol=1 / 400)
    static, dynamic = (
        training(labels, ensembles['nonlinear'], mixup=0.8) for labels in compensated_set.LABELS
    )
    assert np.abs(static - dynamic).max() > 0.01


def test_dynamic_labels_see_the_augmentation_and_not_the_labels_of_the_set(training, ensembles):
    ensemble = ensembles['nonlinear']
    wrong = {'input': IMAGES, 'label': -ensemble[2]['label']}
    flip = {'augmentation': (('flip', 1.0),)}
    dynamic = training('dynamic', ensemble, **flip)
    np.testing.assert_array_equal(dynamic, training('dynamic', ensemble, examples=wrong, **flip))
    # As flipped images with labels of their own.
    flipped = compensated_set.soft_examples(*ensemble[:2], IMAGES[:, :, ::-1])
    np.testing.assert_array_equal(dynamic, training('static', ensemble, examples=flipped))
    assert np.abs(dynamic - training('static', ensemble, **flip)).max() > 0.01


def test_dynamic_labels_take_one_share_of_the_epochs(ensembles):
    nets = ensembles['linear'][0]
    student = network(MLP((), CLASSES))
    four = {f'{name}{i}': net for name, net in nets.items() for i in range(2)}
    static = compensated_set.SoftTraining(student, epochs=400)
    dynamic = compensated_set.SoftTraining(student, epochs=400, labels='dynamic', networks=four)
    assert (static.passes(100), dynamic.passes(100)) == (400, 80)
    # At equal steps for half a set; hard labels are never dynamic.
    assert (static.passes(50, 100), dynamic.passes(50, 100)) == (800, 160)
    assert dynamic.passes(100, soft=False) == 400


def test_a_state_unfolds_to_its_groups_and_each_with_each_compensator():
    groups = RNG.uniform(-1, 1, (3, CLASSES, *SHAPE)).astype(np.float32)
    made = {name: RNG.normal(size=(3, 1, *SHAPE)).astype(np.float32) for name in ('a', 'b')}
    state = State.create(jax.random.key(0), {'params': made, 'groups': jnp.asarray(groups)})
    images = compensated_set.unfolded(state, -1.0, 0.5)
    wanted = [groups, *(np.clip(groups + u, -1.0, 0.5) for u in made.values())]
    np.testing.assert_array_equal(images, np.concatenate(wanted).reshape(-1, *SHAPE))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'labels': 'fixed'}, "labels='fixed' must be one of 'static', 'dynamic'"),
        ({'labels': 'dynamic'}, 'needs the networks that label'),
    ],
)
def test_labels_that_cannot_be_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        compensated_set.SoftTraining(network(MLP((), CLASSES)), **options)
