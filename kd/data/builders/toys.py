"""Two-dimensional toy distributions with known densities: `draw(name, rng, n) -> (points, labels)`.

Every point carries the number of the component that it was drawn from (square, moon, Gaussian or
ring), so that each toy serves classification and class-conditional generation as well.
"""

from collections.abc import Callable

import numpy as np

SIZES = {'train': 100_000, 'test': 20_000}

# Lower-left corners of the squares (i, j), i + j even, of the 4x4 board on [-1, 1]^2.
CHECKERBOARD_CORNERS = np.array(
    [(-1 + i / 2, -1 + j / 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
)
CHECKERBOARD_SIDE = 0.5
MOONS_STD = 0.05
GAUSSIAN_MEANS = np.stack(
    [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1
)
GAUSSIAN_STD = 0.1
RING_RADII = np.array([0.25, 0.5, 0.75, 1.0])
RING_STD = 0.02


def checkerboard(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform on the eight squares i + j even of a 4x4 board on [-1, 1]^2; labels 0..7."""
    label = rng.integers(len(CHECKERBOARD_CORNERS), size=n)
    return CHECKERBOARD_CORNERS[label] + CHECKERBOARD_SIDE * rng.random((n, 2)), label


def two_moons(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved half circles of radius 1 plus N(0, 0.05^2 I), around the origin; labels 0, 1.

    The upper moon is (cos a - 1/2, sin a - 1/4), the lower one (1/2 - cos a, 1/4 - sin a), with the
    angle a uniform on [0, pi]: scikit-learn's `make_moons` moved by (-1/2, -1/4).
    """
    label = rng.integers(2, size=n)
    angle = np.pi * rng.random(n)
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    points = np.where(label[:, None] == 0, upper, -upper)
    return points + MOONS_STD * rng.standard_normal((n, 2)), label


def gaussian_mixture(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight equal Gaussians of deviation 0.1, means evenly on the unit circle; labels 0..7."""
    label = rng.integers(len(GAUSSIAN_MEANS), size=n)
    return GAUSSIAN_MEANS[label] + GAUSSIAN_STD * rng.standard_normal((n, 2)), label


def rings(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Four equally likely circles of radius 1/4, 1/2, 3/4, 1 plus N(0, 0.02^2 I); labels 0..3."""
    label = rng.integers(len(RING_RADII), size=n)
    angle = 2 * np.pi * rng.random(n)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = RING_RADII[label][:, None] * circle
    return points + RING_STD * rng.standard_normal((n, 2)), label


Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]

# name: (sampler, number of components)
TOYS: dict[str, tuple[Draw, int]] = {
    'checkerboard': (checkerboard, len(CHECKERBOARD_CORNERS)),
    'two_moons': (two_moons, 2),
    'gaussian_mixture': (gaussian_mixture, len(GAUSSIAN_MEANS)),
    'rings': (rings, len(RING_RADII)),
}


def make(name: str, split: str) -> dict[str, np.ndarray]:
    """Draws a whole split: {'input': f32[N, 2], 'label': i32[N]}, the same in every process.

    N is `SIZES[split]`. The generator is Philox, keyed by the toy and the split.
    """
    draw, _ = TOYS[name]
    seed = [list(TOYS).index(name), list(SIZES).index(split)]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    points, label = draw(rng, SIZES[split])
    return {'input': points.astype(np.float32), 'label': label.astype(np.int32)}
