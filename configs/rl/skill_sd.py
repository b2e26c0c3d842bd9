"""Skill-SD (2026, arXiv:2604.10674): GRPO, and a pull to oneself told of earlier tries.

    python -m kd.main --config=configs/rl/skill_sd.py:cpu --workdir=runs/skill_sd
    python -m kd.aot --config=configs/rl/skill_sd.py --topology=v5p:4x4x4

| variant | policy | world | hardware |
|---|---|---|---|
| cpu | a decoder of 0.1 M parameters | boxes pushed on 5 x 5 cells, 12 turns | 2 cores, 4 min |
| qwen3_4b (default) | Qwen3-4B-Instruct-2507 | Sokoban, 6 x 6 cells, 2 boxes, 40 turns | v5p-64 |

`cpu` begins with the base of `configs/rl/bases.py:push`, trained first if nobody has, which wins
.21 of the levels. Seed 0 wins .59 of 64 levels after GRPO and .63 with skills, which is no
difference: at this scale a tie, see `configs/claims/skill_sd.py`.

`qwen3_4b` has not been run by us. From the paper: the model, lambda .001, the teacher that is the
policy of every step, 96 generated levels of two boxes, 64 held out, at most 40 turns. Ours: the
environment itself (`kd.rewards.sokoban`), in which an action is one letter and no thoughts come
before it; skills that are computed and not written by a language model; groups of 8, 32 levels a
step, Adam at 1e-6, clip .2, the constant 1 of the bound by which skills are selected, levels of
2 to 20 actions without a curriculum. The model lies in `/models`, as Hugging Face has it.
"""

from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen3_4b')
METHOD = 'kd.methods.rl.skill_sd.skill_sd'
VERIFIED = 'kd.evaluators.verified.verified'
BASE = 'configs/rl/bases.py:push'
# U, R, D, L of Qwen3's vocabulary; 40 turns of one token.
LETTERS = (52, 49, 35, 43)
SOKOBAN = dict(
    max_new=1, only=LETTERS, environment=dict(name='kd.rewards.sokoban.environment', horizon=40)
)
SOLVED = dict(name='kd.rewards.sokoban.sokoban')


def get_config(variant: str = 'qwen3_4b'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'qwen3_4b': qwen3_4b})()


def cpu():
    """Pushed boxes: GRPO beside Skill-SD, from one base."""
    base = bases.directory(BASE)
    push = kd_config.load_module(Path(BASE.partition(':')[0]))
    sampling = dict(push.PLAYING, group=8)
    shared = dict(reward=push.REACHED, sampling=sampling, chunk=8_192)
    told = dict(summary=dict(name='kd.rewards.push.summary'), tasks=96)
    config = kd_config.recipe(
        stages=('grpo', 'skill_sd'),
        data=dict(
            source=dict(name=push.LEVELS), train='train', validation='validation', test='test'
        ),
        bases={base: BASE},
        report=report(
            (('GRPO', 'grpo'), ('Skill-SD, lambda .01', 'skill_sd')),
            'One update of 16 levels with 8 episodes each. The base wins one level in five.',
        ),
    )
    for name, method in (
        ('grpo', dict(name='kd.methods.rl.grpo.grpo')),
        ('skill_sd', dict(name=METHOD, weight=0.01, **told)),
    ):
        config[name] = kd_config.stage(
            network=push.NETWORK,
            references=dict(start=f'{base}/base'),
            method=dict(method, **shared),
            optimizer=dict(name='adam', lr=3e-4),
            steps=100,
            batch_size=16,
            log_every=5,
            eval_every=20,
            checkpoint_every=100,
            evaluators=evaluators(push.REACHED, sampling),
        )
    return config


def qwen3_4b():
    """Qwen3-4B-Instruct-2507 on Sokoban."""
    policy = dict(
        name='kd.models.decoders.preset', of='qwen3_4b', dtype='bfloat16', stacked=True,
        remat='block',
    )  # fmt: skip
    start = 'hf:/models/Qwen3-4B-Instruct-2507'
    sampling = dict(SOKOBAN, group=8)
    config = kd_config.recipe(
        stages=('student',),
        data=levels(start, 'qwen3_4b'),
        pretrained={'start': dict(weights=start, network=policy)},
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
        report=report((('Skill-SD', 'student'),), 'Levels held out, 4 tries each.'),
    )
    config.student = kd_config.stage(
        network=policy,
        references=dict(start='start'),
        method=dict(
            name=METHOD,
            reward=SOLVED,
            sampling=sampling,
            summary=dict(name='kd.rewards.sokoban.summary'),
            tasks=96,
            weight=0.001,
            micro_batches=8,
        ),
        optimizer=dict(name='adamw', lr=1e-6, warmup_steps=10, clip_norm=1.0, weight_decay=0.01),
        steps=100,
        batch_size=32,
        log_every=1,
        eval_every=10,
        checkpoint_every=10,
        best='validation/reward',
        evaluators=evaluators(SOLVED, sampling),
    )
    return config


def levels(tokenizer, preset, **source):
    """Levels of Sokoban for a model of Qwen3; `source` as of `kd.data.text.sokoban`."""
    return dict(
        source=dict(
            name='kd.data.text.sokoban',
            tokenizer=tokenizer,
            vocabulary=decoders.PRESETS[preset]['num_classes'],
            length=192,
            **source,
        ),
        train='train',
        validation='validation',
        test='test',
    )


def evaluators(reward, sampling):
    """Levels won, and how far the others came, of four tries each."""
    four = dict(sampling, group=4)
    return {
        'validation': dict(name=VERIFIED, reward=reward, sampling=four, k=(4,)),
        'completion': dict(name=VERIFIED, reward=dict(reward, of='completion'), sampling=four),
    }


def report(rows, notes):
    """The comparison of stages."""
    return dict(
        name='kd.reports.comparison.comparison',
        rows=rows,
        metrics=(
            ('validation/reward', 'levels won'),
            ('validation/pass_at_4', 'won in one of four tries'),
            ('completion/reward', 'how far'),
        ),
        curves=(
            ('train/reward', 'episodes won'),
            ('validation/reward', 'held-out levels won'),
            ('train/dead_groups', 'groups of equal rewards'),
            ('train/kl_to_teacher', 'KL to the teacher, nats'),
        ),
        notes=notes,
    )
