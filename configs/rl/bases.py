"""What reinforcement learning on small worlds begins with: trained once, by whoever needs it first.

    python -m kd.main --config=configs/rl/bases.py:chain --workdir=runs/chain

A recipe that begins with one names it among its `bases` (see `kd.bases`) and finds it in
`runs/bases/NAME-HASH`; claims take it from `kd.training.loop.provide`.

| variant | learns from | right of what it learns from | right when sampled | 2 cores |
|---|---|---:|---:|---|
| chain | one who holds 30 % of the facts for others; blocks before prompts | .43 | .41 | 3 min |
| chain_reviser | `chain`, which goes on with answers that are revised | .43 | .44 | 2 min |
| chain_clean | a teacher: .98 of every fact | .95 | .92 | 2 min |
| chain_good | a teacher with 8 % of misconceptions of its own | .75 | | 2 min |
| chain_biased | a teacher who is wrong about one of three operators | .28 | | 2 min |
| chain_cliff | the first one, and a tenth of the facts that it never has right | | .35 | 1 min |
| chain_product | as `chain`, of four operations with a product; width 48 | .38 | .36 | 3 min |
| push | one who pushes boxes and is careless, above all up and left; blocks | .33 | .21 | 3 min |
| chain_exec | the first one; two of three `chain`, one `exec`, no blocks | .43, .35 | .40 | 3 min |
| chain_wordy | the first one, who says a result up to six times more | .43 | .36 | 3 min |

`chain`: chains of arithmetic of three operations (`kd.data.builders.chain`), whose answers a
demonstrator with misconceptions gives; a first stage has two operations. Of the rows 46 % are
plain, and 18 % each have a solution, a hint or a judged answer before the prompt, which the base
learns to read. A decoder of 0.1 M parameters, width 64, 2 layers. `chain_product` has a b mod 10 in
the place of one operator.

`chain_reviser` is told in half of its rows that an answer was wrong, or right, and sees wrong ones
revised by somebody who holds misconceptions half as firmly. It can do better than it does at first.

`push`: boxes pushed to their goals (`kd.data.builders.push`), turn by turn. Of the demonstrations
half are plain; 27 % have before them what they themselves teach (SKILL), 23 % what an expert says
of the level (HINT), and with these the demonstrator is more careful. The network is the same.

`chain_exec` knows two tasks of the same facts, one of which prints the result and the other every
value: see `configs/rl/acereason.py`. What `chain_wordy` says has 6, 9 or 12 tokens.
"""

from kd import bases
from kd import config as kd_config
from kd.data.builders.chain import BASE, REVISER
from kd.data.builders.push import ACTIONS
from kd.data.push import BASE as PUSHED

VARIANTS = (
    'chain', 'chain_reviser', 'chain_clean', 'chain_good', 'chain_biased', 'chain_cliff',
    'chain_exec', 'chain_wordy', 'chain_product', 'push',
)  # fmt: skip
# The network of all that is done on chains.
NETWORK = dict(name='kd.models.decoders.preset', of='toy')
# PAD and BOS are never said; EOS ends an answer.
SAMPLING = dict(group=1, max_new=6, stop=(2,), forbidden=(0, 1))
REWARD = dict(name='kd.rewards.printed.printed')
CHAINS = 'kd.data.chains.chains'
BOTH = {'chain': 2 / 3, 'exec': 1 / 3}
WORDY = {'plain': 1 / 3, 'long': 1 / 3, 'longer': 1 / 3}
# Of `chain_product`: what its data have beside a law, its network and its answers.
PRODUCT = dict(operations={'4': 1.0}, third='product')
NARROW = dict(NETWORK, width=48)
LONGER = dict(SAMPLING, max_new=7)
# Of levels: an action a turn.
LEVELS = 'kd.data.push.push'
PLAYING = dict(
    group=4, max_new=1, only=ACTIONS, environment=dict(name='kd.rewards.push.environment')
)
REACHED = dict(name='kd.rewards.push.push')
VERIFIED = 'kd.evaluators.verified.verified_of_recipe'
IMITATION = dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0, chunk=4_096)
ADAM = dict(name='adam', lr=3e-3, warmup_steps=30, clip_norm=1.0)
FALLING = dict(ADAM, schedule='cosine', schedule_args=dict(end=0.1))


def get_config(variant: str = 'chain'):
    """The recipe of a variant."""
    known = {
        'chain': lambda: chain('demonstrator', 'base', steps=1_050, kinds=BASE),
        'chain_reviser': reviser,
        'chain_clean': lambda: chain('clean', 'teacher', steps=800),
        'chain_good': lambda: chain('good', 'teacher', steps=800),
        'chain_biased': lambda: chain('biased', 'teacher', steps=800),
        'chain_cliff': cliff,
        'chain_exec': lambda: chain('demonstrator', 'base', steps=900, batch_size=144, tasks=BOTH),
        'chain_wordy': lambda: chain(
            'demonstrator', 'base', steps=900, batch_size=144, kinds=WORDY, max_new=12
        ),
        'chain_product': product,
        'push': push,
    }
    return kd_config.variant(variant, known)()


def chain(law: str, last: str, *, steps: int, kinds=None, tasks=None, **fields):
    """Stages `short`, of two operations, and `last`, of three."""
    both = dict(tasks=tasks) if tasks else {}
    config = recipe(law, ('short', last))
    config.short = imitating(
        law, dict(operations={'2': 1.0}, **both), optimizer=ADAM, steps=250, batch_size=256,
        checkpoint_every=250,
        evaluators={'validation': dict(name='kd.evaluators.language.language')},
    )  # fmt: skip
    config[last] = of_three(law, kinds, FALLING, steps, 'short', both=both, **fields)
    return config


def product():
    """`chain`, but its problems and its network."""
    config = chain('demonstrator', 'base', steps=1_050, kinds=BASE)
    for stage in (config.short, config.base):
        stage.network = NARROW
        stage.data.source.update(third=PRODUCT['third'])
    config.base.data.source.operations = PRODUCT['operations']
    config.data.source.update(PRODUCT)
    for name in ('sampled', 'greedy'):
        config.base.evaluators[name].sampling.update(max_new=LONGER['max_new'])
    return config


def reviser(steps: int = 600):
    """One stage, `base`, that goes on from the other of this name."""
    base = bases.directory('configs/rl/bases.py:chain')
    config = recipe('demonstrator', ('base',), bases={base: 'configs/rl/bases.py:chain'})
    config.base = of_three('demonstrator', REVISER, dict(FALLING, lr=2e-3), steps, f'{base}/base')
    return config


def cliff(steps: int = 300):
    """One stage, `base`, that goes on too, and after which hardly any sample has some facts right;
    of the rows 30 % have a solution."""
    base = bases.directory('configs/rl/bases.py:chain')
    config = recipe('cliff', ('base',), bases={base: 'configs/rl/bases.py:chain'})
    kinds = {'plain': 0.7, 'solution': 0.3}
    config.base = of_three('cliff', kinds, dict(ADAM, lr=2e-3), steps, f'{base}/base')
    return config


def recipe(law: str, stages, **fields):
    """Stages, and chains to be answered."""
    return kd_config.recipe(
        stages=stages,
        data=dict(
            source=dict(name=CHAINS, law=law), train='train', validation='validation', test='test'
        ),
        **fields,
    )


def of_three(
    law: str, kinds, optimizer, steps: int, start: str, *, both=None, batch_size=128, max_new=6
):
    """A stage of chains of three operations; `both` are further arguments of its source."""
    sampling = dict(SAMPLING, max_new=max_new)
    verified = dict(name=VERIFIED, reward=REWARD, sampling=sampling)
    return imitating(
        law, dict(operations={'3': 1.0}, kinds=kinds, **(both or {})), references=dict(start=start),
        optimizer=optimizer, steps=steps, batch_size=batch_size, checkpoint_every=steps,
        evaluators={
            'language': dict(name='kd.evaluators.language.language'),
            'sampled': verified,
            'greedy': dict(verified, sampling=dict(sampling, top_k=1)),
        },
    )  # fmt: skip


def imitating(law: str, source, **fields):
    """A stage that learns from rows of a law."""
    return kd_config.stage(
        network=NETWORK,
        method=IMITATION,
        data=dict(
            source=dict(name=CHAINS, law=law, layout='rows', **source),
            train='train',
            validation='validation',
        ),
        log_every=50,
        **fields,
    )


def push(steps: int = 1_000):
    """One stage, `base`, of demonstrations."""
    config = kd_config.recipe(
        stages=('base',),
        data=dict(source=dict(name=LEVELS), train='train', validation='validation', test='test'),
    )
    config.base = kd_config.stage(
        network=NETWORK,
        method=IMITATION,
        data=dict(
            source=dict(name=LEVELS, layout='rows', kinds=PUSHED),
            train='train',
            validation='validation',
        ),
        optimizer=FALLING,
        steps=steps,
        batch_size=64,
        log_every=50,
        checkpoint_every=steps,
        evaluators={
            'language': dict(name='kd.evaluators.language.language'),
            'sampled': dict(name=VERIFIED, reward=REACHED, sampling=PLAYING),
            'completion': dict(
                name=VERIFIED, reward=dict(REACHED, of='completion'), sampling=PLAYING
            ),
        },
    )
    return config
