"""Sokoban: levels and moves against a game of sets, boards and prompts as text, whole episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_tokenizers as toys

from kd.claims import seeds
from kd.config import Recipe
from kd.data import text
from kd.data.builders import sokoban as world
from kd.data.context import SourceContext
from kd.data.sources import DataError
from kd.errors import UserError
from kd.methods.rl import common
from kd.methods.rl.pi_distill import told
from kd.models.decoder import Decoder
from kd.network import from_linen
from kd.rewards import sokoban

pytestmark = pytest.mark.usefixtures('compiled_quickly')

MOVES = {'U': (-1, 0), 'R': (0, 1), 'D': (1, 0), 'L': (0, -1)}
# Two boxes below each other, to be pushed right: the lower one, then up and around.
LEVEL = """
######
#_@__#
#_$._#
#_$._#
#____#
######
"""


class Game:
    """The rules, by sets of (row, column)."""

    def __init__(self, drawn):
        cells = {
            (i, j): sign
            for i, row in enumerate(drawn.strip().split('\n'))
            for j, sign in enumerate(row)
        }
        of = lambda signs: {at for at, sign in cells.items() if sign in signs}  # noqa: E731
        self.walls, self.goals, self.boxes = of('#'), of('.*+'), of('$*')
        (self.agent,) = of('@+')

    def move(self, letter):
        step = MOVES[letter]
        to = tuple(np.add(self.agent, step))
        beyond = tuple(np.add(to, step))
        if to in self.walls or (to in self.boxes and beyond in self.walls | self.boxes):
            return
        if to in self.boxes:
            self.boxes = self.boxes - {to} | {beyond}
        self.agent = to

    def drawn(self):
        def sign(at):
            if at in self.walls:
                return '#'
            goal = at in self.goals
            if at == self.agent:
                return '+' if goal else '@'
            if at in self.boxes:
                return '*' if goal else '$'
            return '.' if goal else '_'

        return '\n'.join(''.join(sign((i, j)) for j in range(6)) for i in range(6))


def position(game):
    place = lambda cells: sorted(6 * i + j for i, j in cells)  # noqa: E731
    member = lambda cells: np.isin(np.arange(36), place(cells))[None]  # noqa: E731
    return world.Position(
        *(jnp.asarray(x) for x in (
            np.array(place({game.agent})), np.array([place(game.boxes)]),
            member(game.walls), member(game.goals),
        ))
    )  # fmt: skip


def test_moves_and_boards_are_those_of_the_game():
    rng, move = np.random.default_rng(0), jax.jit(world.moved)
    pushes = 0
    for _ in range(4):
        game = Game(LEVEL)
        at = position(game)
        for letter in rng.choice(list('URDL'), 30):
            boxes = game.boxes
            game.move(letter)
            pushes += game.boxes != boxes
            at = move(at, jnp.array(['URDL'.index(letter)]))
            signs = [world.SIGNS[i] for i in np.asarray(world.board(at))[0]]
            assert '\n'.join(''.join(signs[6 * i : 6 * i + 6]) for i in range(6)) == game.drawn()
            assert int(world.at_goals(at)[0]) == len(game.boxes & game.goals)
    assert pushes > 3
    at = position(Game(LEVEL))
    jax.tree.map(np.testing.assert_array_equal, move(at, jnp.array([-1])), at)


def test_levels_are_solved_by_their_plans_and_by_none_that_is_shorter():
    train = world.levels('train')
    lengths = (train.plan >= 0).sum(1)
    assert lengths.tolist() == sorted(lengths)
    assert 2 <= lengths.min() <= lengths.max() <= 20
    at = world.Position(
        *(jnp.asarray(x) for x in (train.agent, train.boxes, train.walls, train.goals))
    )
    move, lying = jax.jit(world.moved), []
    for action in train.plan.T:
        lying.append(np.asarray(world.at_goals(at)))
        at = move(at, jnp.asarray(action))
    lying.append(np.asarray(world.at_goals(at)))
    assert (lying[-1] == 2).all()
    # Not solved before the plan's end.
    for row, length in enumerate(lengths):
        assert all(lying[t][row] < 2 for t in range(length))
    # No way of fewer actions, by trying all of them on the shortest levels.
    for row in range(3):
        reached = {(int(train.agent[row]), frozenset(train.boxes[row].tolist()))}
        walls, goals = set(np.flatnonzero(train.walls[row])), set(np.flatnonzero(train.goals[row]))
        for _ in range(lengths[row] - 1):
            reached |= {new for state in reached for new in after(*state, walls)}
            assert all(lying != goals for _, lying in reached)
    codes = []
    for of in map(world.levels, world.SPLITS):
        whole = zip(of.walls, of.goals, of.boxes, of.agent, strict=True)
        codes.append({b''.join(x.tobytes() for x in level) for level in whole})
    assert [len(of) for of in codes] == [96, 64, 64]
    assert len(set().union(*codes)) == 224


def after(agent, boxes, walls):
    for move in world.MOVES:
        to, beyond = agent + move, agent + 2 * move
        if to in walls or (to in boxes and beyond in walls | boxes):
            continue
        yield to, (boxes - {to} | {beyond} if to in boxes else boxes)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return toys.write_gguf(tmp_path_factory.mktemp('toy') / 'toy.gguf', toys.fields())


@pytest.fixture(scope='module')
def source(tokenizer):
    """Levels in the words of a toy tokenizer."""
    context = SourceContext('train[:8]', Recipe(stages={}, data={}))
    return text.sokoban(context, tokenizer=tokenizer, length=600, told=3)


@pytest.fixture(scope='module')
def ids(source):
    return tuple(source.tokenizer.encode(letter)[0] for letter in 'URDL')


def context_of(source):
    size = source.tokenizer.size
    module = Decoder(
        num_classes=size, width=16, depth=1, heads=2, mlp_hidden=24, max_length=1_024, deviation=0.3
    )
    network = from_linen(module, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return seeds.context(network=network, spec=source.spec, source=lambda split: source)


def test_an_episode_is_a_chat(source, ids):
    """Token by token what a user would see, and rewards and summaries of what was done."""
    context, taken, horizon = context_of(source), source.tokenizer, 4
    world_of = dict(name='kd.rewards.sokoban.environment', actions=ids, horizon=horizon)
    sampling = common.Sampling(group=2, max_new=1, only=ids, environment=world_of)
    draw = common.drawing(context, sampling)
    batch = {name: np.asarray(x) for name, x in source.fetch(np.arange(8)).items()}
    variables = context.network.init(jax.random.key(0))
    said = jax.tree.map(np.asarray, jax.jit(draw.of)(variables, batch, jax.random.key(1)))
    levels, rewards = world.levels('train'), []
    done = sokoban.sokoban(context, actions=ids, horizon=horizon)
    told_of = sokoban.summary(context, actions=ids, horizon=horizon)
    found, score = told_of.of({**batch, 'tokens': said.tokens, 'mask': said.mask})
    for row in range(8):
        signs = [world.SIGNS[i] for i in np.asarray(world.board(sokoban.position(
            {name: batch[name][row : row + 1] for name in sokoban.FIELDS})))[0]]  # fmt: skip
        game = Game('\n'.join(''.join(signs[6 * i : 6 * i + 6]) for i in range(6)))
        assert game.goals == {divmod(int(c), 6) for c in np.flatnonzero(levels.goals[row])}
        wanted, most, runs = [], 0, ''
        letters = [taken.decode([t]) for t in said.tokens[row][said.mask[row]]]
        for letter in letters:
            wanted.append(f'<|im_end|>\n<|im_start|>user\n{game.drawn()}<|im_end|>\n')
            wanted[-1] += f'<|im_start|>assistant\n{letter}'
            boxes = game.boxes
            game.move(letter)
            runs += letter if game.boxes != boxes and not runs.endswith(letter) else ''
            most = max(most, len(game.boxes & game.goals))
        text_of = taken.decode(said.tokens[row][said.there[row]], special=True)
        assert text_of == ''.join(wanted)
        rewards.append(most == 2)
        assert said.truncated[row] == (most < 2)
        how = 'succeeded' if most == 2 else 'failed'
        summary = taken.decode(np.asarray(found[row])).lstrip('\n')
        assert summary == sokoban.SAYS.format(how).lstrip('\n') + runs.ljust(8, '_')
        assert float(score[row]) == pytest.approx(most - 1e-3 * len(letters), abs=1e-5)
    assert done(said.tokens, said.mask, batch).tolist() == rewards
    # Rewards of the plan itself, which is longer than these turns for most.
    assert np.asarray(told_of.length) == found.shape[1]


def test_prompts_are_rules_and_what_an_expert_says(source):
    batch, taken = source.fetch(np.arange(2)), source.tokenizer
    rules = batch['input'][0][batch['prompt_mask'][0]]
    assert taken.decode(rules, special=True).startswith('<|im_start|>system\nYou play Sokoban')
    np.testing.assert_array_equal(batch['level'], [0, 1])
    plan = ''.join('URDL'[a] for a in world.levels('train').plan[0, :3] if a >= 0)
    asked = told({name: jnp.asarray(x) for name, x in batch.items()})
    said = taken.decode(np.asarray(asked['input'][0])[np.asarray(asked['prompt_mask'][0])])
    assert said.endswith(f'in at most 40 turns.\nAn expert would begin with: {plan}')


def test_what_does_not_fit_is_told(source, ids, tokenizer):
    context = context_of(source)
    with pytest.raises(UserError, match=r'U, R, D, L are the tokens .* and actions are'):
        sokoban.environment(context)
    short = SourceContext('train', Recipe(stages={}, data={}))
    with pytest.raises(UserError, match=r'the rules are \d+ tokens, and length is 30'):
        text.sokoban(short, tokenizer=tokenizer, length=30)
    with pytest.raises(DataError, match='sokoban has the splits'):
        world.levels('other')
    spec = {name: x for name, x in source.spec.items() if name != 'walls'}
    other = seeds.context(network=context.network, spec=spec, source=lambda split: source)
    with pytest.raises(UserError, match="levels of sokoban have 'walls'"):
        sokoban.sokoban(other, actions=ids)
