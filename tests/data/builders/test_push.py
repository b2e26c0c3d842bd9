"""Pushed boxes: moves and optima against a search of their own, demonstrators, texts and splits."""

from collections import deque

import numpy as np
import pytest

from kd.config import Recipe
from kd.data import push as source
from kd.data.builders import push, symbols
from kd.data.context import SourceContext
from kd.data.sources import DataError
from kd.text.packing import shifted

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


def words(tokens):
    return ' '.join(symbols.SYMBOLS[token] for token in tokens)


def after(agent, box, action):
    """A move by coordinates, (row, column) each."""
    to = tuple(np.add(agent, MOVES[action]))
    beyond = tuple(np.add(to, MOVES[action]))

    def inside(cell):
        return all(0 <= x < 5 for x in cell)

    if not inside(to):
        return agent, box
    if to != box:
        return to, box
    return (to, beyond) if inside(beyond) else (agent, box)


def searched(agent, box, goal):
    """Actions of the shortest way by breadth-first search; None where there is none."""
    found, queue = {(agent, box): 0}, deque([(agent, box)])
    while queue:
        state = queue.popleft()
        if state[1] == goal:
            return found[state]
        for action in range(4):
            new = after(*state, action)
            if new not in found:
                found[new] = found[state] + 1
                queue.append(new)
    return None


def place(cell):
    return divmod(int(cell), 5)


def test_moves_are_those_of_coordinates():
    table = push.table()
    for agent, box in np.ndindex(25, 25):
        if agent == box:
            assert (table[agent, box] == agent).all()
            continue
        for action in range(4):
            wanted = after(place(agent), place(box), action)
            assert tuple(place(x) for x in table[agent, box, action]) == wanted


def test_optima_are_those_of_a_breadth_first_search_and_are_reached_by_replay():
    ways, rng = push.ways(), np.random.default_rng(0)
    states = rng.integers(25, size=(150, 3))
    for goal, agent, box in states[states[:, 1] != states[:, 2]]:
        wanted = searched(place(agent), place(box), place(goal))
        found = int(ways.optimum[goal, agent, box])
        assert found == (push.FAR if wanted is None else wanted)
        if wanted is None:
            assert ways.push[goal, agent, box] == -1
            continue
        pushes = []
        for _ in range(found):
            action = ways.action[goal, agent, box]
            first = ways.push[goal, agent, box]
            moved = push.table()[agent, box, action]
            if moved[1] != box:
                pushes.append(action)
                assert first == action
            agent, box = moved
        assert box == goal
    # A box in a corner that is no goal is lost, one that starts on the goal is not.
    dead = ways.dead
    for corner in (0, 4, 20, 24):
        assert dead[:, corner].sum() == 24
        assert (push.table()[:, corner, :, 1] == corner).all()
    assert not dead[np.arange(25), np.arange(25)].any()
    assert dead[12, :5].all()
    assert not dead[2, 1:4].any()


def test_levels_are_within_bounds_and_in_one_split_alone():
    codes = {}
    for split, (size, _) in push.SPLITS.items():
        levels = push.levels(split)
        optimum = push.ways().optimum[levels.goal, levels.agent, levels.box]
        assert optimum.min() >= 2
        assert optimum.max() <= 10
        assert not np.isin(levels.box, (0, 4, 20, 24)).any()
        assert (levels.agent != levels.box).all()
        assert (levels.agent != levels.goal).all()
        assert (levels.box != levels.goal).all()
        codes[split] = set(push.code(levels).tolist())
        assert len(codes[split]) == len(levels.goal) == size
    assert len(set().union(*codes.values())) == 96 + 64 + 64
    # Demonstrations of other levels than those that are held out.
    rows = source.rows('train', {'plain': 1.0}, 3_000)
    told = rows['input'][:, [2, 4, 5]] - symbols.CELL
    seen = set(push.code(push.Levels(told[:, 1], told[:, 2], told[:, 0])).tolist())
    assert not seen & (codes['test'] | codes['validation'])
    assert len(seen) > 1_500


def test_demonstrators_win_as_often_as_they_are_careful():
    rng = np.random.default_rng(0)
    levels = push.drawn(rng, 4_000, set())

    def outcome(kind):
        episode = push.demonstrated(rng, levels, kind)
        won = (episode.box == levels.goal[:, None]).any(1)
        lost = push.ways().dead[levels.goal, episode.box[:, -1]]
        done = np.asarray(push.completion(levels.goal, episode.box))
        apart = [
            abs(x // 5 - levels.goal // 5) + abs(x % 5 - levels.goal % 5) for x in episode.box.T
        ]
        np.testing.assert_allclose(done, 1 - np.minimum(np.min(apart, 0) / apart[0], 1), atol=1e-6)
        return won.mean(), done.mean(), lost.mean()

    won, done, lost = outcome('plain')
    assert won == pytest.approx(0.36, abs=0.04)
    assert done == pytest.approx(0.48, abs=0.03)
    assert lost == pytest.approx(0.06, abs=0.03)
    assert outcome('expert') == (1, 1, 0)
    by_care = [outcome(kind)[0] for kind in ('plain', 'hint', 'moves', 'full', 'skill')]
    assert by_care == sorted(by_care)


@pytest.fixture
def level():
    """Agent at (2, 0), box at (2, 1), goal at (0, 3): two pushes right, then two up."""
    return push.Levels(*(np.array([cell]) for cell in (10, 11, 3)))


def test_texts_are_as_written(level):
    best = push.demonstrated(np.random.default_rng(0), level, 'expert')
    # R R pushes right twice, then below the box and up.
    assert best.action[0, :6].tolist() == [1, 1, 2, 1, 0, 0]
    assert (best.action[0, 6:] == -1).all()
    made = push.part(np.random.default_rng(0), level, 'expert')
    text = 'BOS PUSH c03 OBS c20 c21 R OBS c21 c22 R OBS c22 c23 D OBS c32 c23 R OBS c33 c23 U'
    assert words(made['input'][0, :27]) == f'{text} OBS c23 c13 U'
    assert words(made['input'][0, 27:]) == ' '.join(['PAD'] * 31)
    # Only actions are learnt.
    targets, where = shifted(made)
    assert words(targets[0][where[0]]) == 'R R D R U U'
    assert made['segments'][0].sum() == 27
    told = {kind: words(push.told(level, kind)[0]) for kind in ('full', 'moves', 'hint')}
    assert told == {
        'full': 'HINT R R D R U U',
        'moves': 'HINT pR pU NONE NONE NONE NONE',
        'hint': 'HINT pR NONE NONE NONE NONE NONE',
    }
    made = push.rows(level, best, push.told(level, 'full'))
    assert words(made['input'][0, :14]) == 'BOS PUSH c03 HINT R R D R U U OBS c20 c21 R'
    assert words(made['input'][0][made['response_mask'][0]]) == 'R R D R U U'


def test_a_skill_says_how_an_episode_went(level):
    def of(*actions):
        action = np.array([[*actions, *[-1] * (12 - len(actions))]])
        agent, box = push.replay(*level, action)
        state = (int(level.agent[0]), int(level.box[0]))
        for t, each in enumerate(actions):
            if state[1] != int(level.goal[0]):
                state = tuple(int(x) for x in push.table()[*state, each])
            assert (int(agent[0, t + 1]), int(box[0, t + 1])) == state
        return words(np.asarray(push.skill(level.goal, box, action))[0])

    assert of(1, 1, 2, 1, 0, 0) == 'SKILL OK pR pU NONE NONE NONE'
    # After the goal nothing moves.
    assert of(1, 1, 2, 1, 0, 0, 0, 1) == 'SKILL OK pR pU NONE NONE NONE'
    assert of(1, 2, 1, 0, 3, 0, 1) == 'SKILL FAIL pR pU pR NONE NONE'
    # Too far: at the right edge the box stays there.
    assert of(1, 2, 1, 0, 3, 0, 1, 1) == 'SKILL FAIL pR pU pR NONE c14'
    # Down to the lower edge, from which there is no way up.
    assert of(0, 1, 2, 2) == 'SKILL FAIL pD NONE NONE NONE c41'
    assert of() == 'SKILL FAIL NONE NONE NONE NONE NONE'
    tokens = np.array([[symbols.OBS, 40, 41, 29, symbols.OBS, 40, 41, 30, 0, 0, 0, 0]])
    mask = np.array([[False, False, False, True] * 2 + [False] * 4])
    assert push.actions_of(tokens, mask).tolist() == [[1, 2, -1]]


def test_the_source_brings_levels_or_demonstrations():
    context = SourceContext('validation[:10]', Recipe(stages={}, data={}))
    found = source.push(context, told='moves')
    assert len(found) == 10
    batch = found.fetch(np.arange(3))
    levels = push.levels('validation')
    np.testing.assert_array_equal(batch['box'], levels.box[:3])
    np.testing.assert_array_equal(batch['told'], push.told(levels, 'moves')[:3])
    np.testing.assert_array_equal(batch['level'], [0, 1, 2])
    assert words(batch['input'][0]) == f'BOS PUSH {symbols.SYMBOLS[40 + levels.goal[0]]}'
    # An expert on the levels that are played.
    pool = source.rows('train', {'expert': 1.0}, 96, pool=True)
    levels = push.levels('train')
    best = push.ways().optimum[levels.goal, levels.agent, levels.box]
    assert sorted(pool['response_mask'].sum(1)) == sorted(best)
    with pytest.raises(DataError, match=r"push has the splits .* not 'other'"):
        source.push(SourceContext('other'))
    with pytest.raises(DataError, match='rows of push are'):
        source.push(SourceContext('train'), layout='rows', kinds={'odd': 1.0})
