"""Subsets of real examples against enumeration, and compensated groups."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data.distilled import compensator, coreset

RNG = np.random.default_rng(0)
LABELS = np.asarray([2, 0, 1] * 8 + [0, 0, 2])
FEATURES = RNG.normal(size=(27, 3)) + LABELS[:, None]
SELECTORS = {
    'random': lambda count: coreset.random_subset(np.random.default_rng(1), LABELS, count),
    'herding': lambda count: coreset.herding(FEATURES, LABELS, count),
    'kmeans': lambda count: coreset.kmeans(FEATURES, LABELS, count, clusters=3),
}


@pytest.mark.parametrize('selector', SELECTORS)
@pytest.mark.parametrize('count', [1, 4, 8])
def test_subsets_are_distinct_examples_in_order_of_class(selector, count):
    indices = SELECTORS[selector](count)
    assert indices.shape == (3 * count,)
    assert len(set(indices.tolist())) == 3 * count
    np.testing.assert_array_equal(LABELS[indices], np.repeat([0, 1, 2], count))


@pytest.mark.parametrize('selector', ['herding', 'kmeans'])
def test_a_single_representative_is_nearest_to_the_class_mean(selector):
    indices = SELECTORS[selector](1)
    for label, chosen in enumerate(indices):
        members = np.flatnonzero(label == LABELS)
        distances = np.linalg.norm(FEATURES[members] - FEATURES[members].mean(0), axis=1)
        assert chosen == members[np.argmin(distances)]


def test_herding_is_greedily_optimal_at_every_step():
    indices = coreset.herding(FEATURES, LABELS, 4)[:4]
    members = np.flatnonzero(LABELS == 0)
    mean = FEATURES[members].mean(0)
    for count in range(1, 5):
        errors = {
            i: np.linalg.norm(mean - FEATURES[[*indices[: count - 1], i]].mean(0))
            for i in members
            if i not in indices[: count - 1]
        }
        assert indices[count - 1] == min(errors, key=errors.get)


def test_kmeans_takes_an_equal_share_from_every_well_separated_cluster():
    centres = np.asarray([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    cluster = np.repeat([0, 1, 2], [10, 6, 4])
    points = centres[cluster] + RNG.normal(size=(20, 2))
    indices = coreset.kmeans(points, np.zeros(20, int), 7, clusters=3)
    # Seven over three centres: the largest cluster gives one more.
    np.testing.assert_array_equal(np.bincount(cluster[indices]), [3, 2, 2])
    for number, share in enumerate([3, 2, 2]):
        members = np.flatnonzero(cluster == number)
        distances = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        nearest = set(members[np.argsort(distances)[:share]].tolist())
        assert nearest == set(indices[cluster[indices] == number].tolist())


@pytest.mark.parametrize('selector', SELECTORS)
def test_more_images_than_a_class_has_are_refused(selector):
    with pytest.raises(ValueError, match='images_per_class is 9, but class 1 has only 8 examples'):
        SELECTORS[selector](9)
    with pytest.raises(ValueError, match='at least 1, got 0'):
        SELECTORS[selector](0)


@pytest.mark.parametrize('selector', ['random', 'herding', 'kmeans'])
def test_a_class_without_examples_is_named(selector):
    holes = np.where(LABELS == 1, 3, LABELS)

    def select(labels, **classes):
        if selector == 'random':
            return coreset.random_subset(np.random.default_rng(1), labels, 2, **classes)
        function = {'herding': coreset.herding, 'kmeans': coreset.kmeans}[selector]
        return function(FEATURES, labels, 2, **classes)

    with pytest.raises(ValueError, match='images_per_class is 2, but class 1 has no example;'):
        select(holes)
    with pytest.raises(ValueError, match='but class 3 has no example'):
        select(LABELS, num_classes=4)
    for labels in (LABELS - 1, LABELS + 1):
        with pytest.raises(ValueError, match=r'Labels lie in .*; the classes are 0..2'):
            select(labels, num_classes=3)
    with pytest.raises(ValueError, match='There are no examples'):
        select(LABELS[:0], num_classes=3)


def test_groups_need_every_class_of_the_data():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match='class 3 has no example'):
        compensator.group_indices(rng, LABELS, 4, 4)


@pytest.mark.parametrize(
    ('images', 'networks', 'classes', 'groups', 'per_class'),
    [(10, 4, 100, 9, 45), (50, 4, 100, 48, 240), (10, 3, 1000, 9, 36), (10, 4, 10, 7, 35)],
)
def test_groups_fit_the_published_budgets(images, networks, classes, groups, per_class):
    count = compensator.group_count(images, networks, classes)
    assert count == groups
    assert count * (networks + 1) == per_class
    assert count * (classes + networks) <= images * classes < (count + 1) * (classes + networks)


def test_groups_hold_one_example_of_each_class_and_none_twice():
    indices = compensator.group_indices(np.random.default_rng(0), LABELS, 4)
    np.testing.assert_array_equal(LABELS[indices], np.tile([0, 1, 2], (4, 1)))
    assert len(np.unique(indices)) == 12


def test_shift_is_one_cyclic_permutation_for_all_images(key):
    images = jnp.asarray(RNG.normal(size=(3, 4, 5, 2)), jnp.float32)
    shifts = [np.roll(images, at, (1, 2)) for at in itertools.product(range(3), range(3))]
    seen = set()
    for seed in range(20):
        moved = compensator.cyclic_shift(jax.random.key(seed), images, 2)
        matches = [i for i, shifted in enumerate(shifts) if np.array_equal(moved, shifted)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 4


def test_a_circular_network_with_global_pooling_does_not_see_the_shift(key):
    images = jnp.asarray(RNG.normal(size=(3, 4, 5, 2)), jnp.float32)

    def pooled(x):
        neighbours = x + 0.5 * jnp.roll(x, 1, 1) - 0.8 * jnp.roll(x, 2, 2)
        return jax.nn.relu(neighbours).mean((1, 2))

    moved = compensator.cyclic_shift(key, images, 3)
    np.testing.assert_allclose(pooled(moved), pooled(images), rtol=1e-5)


def test_unfolding_adds_each_compensator_to_every_class_and_clips_the_sum():
    groups = RNG.uniform(-1, 1, (2, 3, 2, 2, 1)).astype(np.float32)
    compensators = RNG.normal(size=(2, 2, 1, 2, 2, 1)).astype(np.float32)
    images = np.asarray(compensator.unfold(jnp.asarray(groups), jnp.asarray(compensators)))
    assert images.shape == (18, 2, 2, 1)
    blocks = images.reshape(3, 2, 3, 2, 2, 1)
    np.testing.assert_array_equal(blocks[0], groups)
    for network, group, label in itertools.product(range(2), range(2), range(3)):
        expected = np.clip(groups[group, label] + compensators[network, group, 0], -1, 1)
        np.testing.assert_allclose(blocks[network + 1, group, label], expected, atol=1e-6)
    unmoved = compensator.unfold(jnp.asarray(groups), jnp.zeros_like(compensators))
    np.testing.assert_array_equal(unmoved.reshape(3, 2, 3, 2, 2, 1), np.stack([groups] * 3))


def test_the_gradient_of_a_compensator_is_the_sum_over_the_classes():
    groups = jnp.asarray(RNG.uniform(-0.5, 0.5, (1, 3, 2, 2, 1)), jnp.float32)
    weights = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)

    def loss(images):
        return jnp.sum(jnp.tanh(images.reshape(-1, 4) @ weights) ** 2)

    shared = jax.grad(lambda u: loss(compensator.unfold(groups, u)[3:]))(
        jnp.zeros((1, 1, 1, 2, 2, 1))
    )
    per_image = jax.grad(loss)(groups[0])
    np.testing.assert_allclose(shared[0, 0, 0], per_image.sum(0), rtol=1e-5)


def test_bad_groups_are_named():
    with pytest.raises(ValueError, match='1 images per class of 2 classes do not hold'):
        compensator.group_count(1, 3, 2)
    with pytest.raises(ValueError, match=r'shape \[M, 2, 1, 2, 2, 1\], got \[1, 3'):
        compensator.unfold(jnp.zeros((2, 3, 2, 2, 1)), jnp.zeros((1, 3, 2, 2, 1)))


@pytest.mark.parametrize('selector', [coreset.herding, coreset.kmeans])
def test_features_that_are_not_finite_are_refused(selector):
    features = np.eye(6)
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match='1 of 6 examples have features that are not finite'):
        selector(features, np.array([0, 0, 0, 1, 1, 1]), 1)
