"""Samples of generators that are told fields of the data, such as embedded texts."""

import jax
import numpy as np

from kd.evaluators import samples


def test_sample_i_is_told_the_fields_of_example_i():
    told = {'text': np.arange(6.0).reshape(3, 2), 'size': np.array([[7.0], [8.0], [9.0]])}
    asked = []

    def draw(variables, noise, fields, key):
        del variables, key
        asked.append(fields)
        return noise * 0 + fields['text'] + fields['size']

    made = samples._generate(draw, None, told, 5, 2, (2,), 1.0, 0)
    # Samples begin anew with the first example where there are more of them.
    rows = np.array([0, 1, 2, 0, 1])
    np.testing.assert_allclose(made, told['text'][rows] + told['size'][rows])
    assert [part['size'].ravel().tolist() for part in asked] == [[7, 8], [9, 7], [8, 9]]


def test_fields_of_the_first_examples_are_kept():
    batches = [
        {
            'input': np.full((2, 2), float(i)),
            'text': np.full((2, 3), 10.0 + i),
            'mask': np.array([True, i > 0]),
        }
        for i in range(3)
    ]
    inputs, fields = samples._examples(batches, 2, None, {}, {}, ('text',))
    assert inputs[:, 0].tolist() == [0, 1]
    assert fields['text'][:, 0].tolist() == [10, 11]
    assert jax.tree.map(np.shape, fields) == {'text': (2, 3)}
