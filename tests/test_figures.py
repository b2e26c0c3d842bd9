"""What the figures of reports show, read off their axes."""

import numpy as np

from kd import figures


def lines(**metrics):
    return [{'step': step, **metrics} for step in (10, 20)]


def test_losses_of_different_methods_have_axes_of_their_own():
    runs = {
        'alone': lines(**{'train/loss': 0.5, 'validation/accuracy': 0.8}),
        'distilled': lines(**{'train/loss': 7.0, 'validation/accuracy': 0.9}),
        'teacher': lines(**{'train/loss': 0.1, 'validation/accuracy': 0.95}),
    }
    losses = {'alone': 'supervised', 'distilled': 'logit_kd', 'teacher': 'supervised'}
    figure = figures.learning_curves(runs, losses)
    shown = {axis.get_title(): [line.get_ydata()[0] for line in axis.lines] for axis in figure.axes}
    assert shown == {
        'training loss: supervised': [0.5, 0.1],
        'training loss: logit_kd': [7.0],
        'validation accuracy': [0.8, 0.9, 0.95],
    }
    assert [axis.get_yscale() for axis in figure.axes] == ['log', 'log', 'linear']
    # One colour per run on all axes.
    colours = [[line.get_color() for line in axis.lines] for axis in figure.axes]
    assert colours[2] == [colours[0][0], colours[1][0], colours[0][1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)


def test_negative_losses_are_shown_and_long_titles_stand_below_each_other():
    points = [{'step': step, 'train/loss': -float(step)} for step in (1, 2)]
    titles = [f'a title of some length, number {i}' for i in range(3)]
    figure = figures.learning_curves(dict.fromkeys(titles, points), dict.fromkeys(titles, 'redi'))
    assert figure.axes[0].get_yscale() == 'linear'
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure.axes[0].get_window_extent().y0


def test_a_comparison_has_a_dot_per_seed_and_a_bar_over_the_interval():
    spread = [0.7, 0.8], 0.75, 0.1
    figure = figures.comparison({'accuracy': {'a': spread, 'b': ([0.5], 0.5, 0.0)}})
    (axis,) = figure.axes
    dots, bar, mean = axis.lines[:3]
    np.testing.assert_allclose(dots.get_xdata(), [0.7, 0.8])
    np.testing.assert_allclose(bar.get_xdata(), [0.65, 0.85])
    np.testing.assert_allclose(mean.get_xdata(), [0.75])
    assert [label.get_text() for label in axis.get_yticklabels()] == ['a', 'b']
