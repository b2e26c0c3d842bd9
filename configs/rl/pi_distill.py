"""pi-Distill and OPSD (Penaloza et al. 2026, arXiv:2602.04942): told by an expert, and untold.

    python -m kd.main --config=configs/rl/pi_distill.py:cpu --workdir=runs/pi_distill
    python -m kd.aot --config=configs/rl/pi_distill.py:qwen3_8b --topology=v5p:4x4x4

| variant | policy | world | hardware |
|---|---|---|---|
| cpu | a decoder of 0.1 M parameters | boxes pushed on 5 x 5 cells, 12 turns | 2 cores, 4 min |
| qwen3_4b | Qwen3-4B | Sokoban, 6 x 6 cells, 2 boxes, 40 turns | v5p-64 |
| qwen3_8b (default) | Qwen3-8B | the same | v5p-64 |

`cpu` begins with the base of `configs/rl/bases.py:push`, trained first if nobody has, which wins
.21 of the levels. The expert says the first six actions of the best way. Seed 0 wins .61 of 64
levels after 100 steps of pi-Distill, .59 of GRPO and .52 of OPSD; `configs/claims/pi_distill.py`
has more seeds.

The larger ones have not been run by us. From the paper: the models, alpha .5 and beta .25, an
expert's actions without thoughts, a group for every task. Its worlds (TravelPlanner, tau-Bench)
and its frontier agent's traces cannot be had here: Sokoban of our own, and the plan of a search, of
which the expert tells the first twelve actions, stand in their place. Ours too: groups of 8, 32
levels a step, Adam at 1e-6, clip .2. An action is one letter, and no thoughts come before it. The
models lie in `/models`, as Hugging Face has them.
"""

from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen3_4b', 'qwen3_8b')
PI_DISTILL, OPSD = 'kd.methods.rl.pi_distill.pi_distill', 'kd.methods.rl.pi_distill.opsd'
BASE = 'configs/rl/bases.py:push'
# Worlds, evaluators and the report are Skill-SD's.
PLAYED = Path('configs/rl/skill_sd.py')


def get_config(variant: str = 'qwen3_8b'):
    """The recipe of a variant."""
    known = {
        'cpu': cpu,
        'qwen3_4b': lambda: qwen3('qwen3_4b', 'Qwen3-4B'),
        'qwen3_8b': lambda: qwen3('qwen3_8b', 'Qwen3-8B'),
    }
    return kd_config.variant(variant, known)()


def cpu():
    """Pushed boxes: GRPO, OPSD and pi-Distill, from one base."""
    base, played = bases.directory(BASE), kd_config.load_module(PLAYED)
    push = kd_config.load_module(Path(BASE.partition(':')[0]))
    sampling = dict(push.PLAYING, group=8)
    config = kd_config.recipe(
        stages=('grpo', 'opsd', 'pi_distill'),
        data=dict(
            source=dict(name=push.LEVELS, told='full'),
            train='train',
            validation='validation',
            test='test',
        ),
        bases={base: BASE},
        report=report(
            played,
            (('GRPO', 'grpo'), ('OPSD', 'opsd'), ('pi-Distill, alpha .5', 'pi_distill')),
            'One update of 16 levels with 8 episodes each, beta .25; all are measured untold, and '
            'the episodes won in training are told ones for pi-Distill.',
        ),
    )
    for name, method in (
        ('grpo', dict(name='kd.methods.rl.grpo.grpo')),
        ('opsd', dict(name=OPSD, beta=0.25)),
        ('pi_distill', dict(name=PI_DISTILL, alpha=0.5, beta=0.25)),
    ):
        config[name] = kd_config.stage(
            network=push.NETWORK,
            references=dict(start=f'{base}/base'),
            method=dict(method, reward=push.REACHED, sampling=sampling, chunk=8_192),
            optimizer=dict(name='adam', lr=3e-4),
            steps=100,
            batch_size=16,
            log_every=5,
            eval_every=20,
            checkpoint_every=100,
            evaluators=played.evaluators(push.REACHED, sampling),
        )
    return config


def qwen3(preset, name):
    """Qwen3 on Sokoban, told the first twelve actions of a plan."""
    played, start = kd_config.load_module(PLAYED), f'hf:/models/{name}'
    policy = dict(
        name='kd.models.decoders.preset', of=preset, dtype='bfloat16', stacked=True, remat='block'
    )
    sampling = dict(played.SOKOBAN, group=8)
    config = kd_config.recipe(
        stages=('student',),
        data=played.levels(start, preset, told=12),
        pretrained={'start': dict(weights=start, network=policy)},
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
        report=report(played, (('pi-Distill', 'student'),), 'Levels held out, 4 tries each.'),
    )
    config.student = kd_config.stage(
        network=policy,
        references=dict(start='start'),
        method=dict(
            name=PI_DISTILL,
            reward=played.SOLVED,
            sampling=sampling,
            alpha=0.5,
            beta=0.25,
            old='recomputed',
            micro_batches=16,
        ),
        optimizer=dict(name='adamw', lr=1e-6, warmup_steps=10, clip_norm=1.0, weight_decay=0.01),
        steps=100,
        batch_size=32,
        log_every=1,
        eval_every=10,
        checkpoint_every=10,
        best='validation/reward',
        evaluators=played.evaluators(played.SOLVED, sampling),
    )
    return config


def report(played, rows, notes):
    """The comparison of stages, with what the told policy does otherwise."""
    made = played.report(rows, notes)
    divergence = ('train/kl_to_untold', 'KL of the told to the untold, nats')
    return dict(made, curves=(*made['curves'][:-1], divergence))
