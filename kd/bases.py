"""Recipes that others begin with: trained once, and found again by a hash of what they are.

    base = bases.directory('configs/rl/bases.py:chain')          # 'runs/bases/chain-1f0c9a77b2'
    config = kd_config.recipe(..., bases={base: 'configs/rl/bases.py:chain'})
    config.student = kd_config.stage(..., references=dict(start=f'{base}/base'))

`kd.main` trains a base that is not there before the first stage that names it, and claims do by
`kd.training.loop.provide`. The hash is of all that decides its numbers, so that a recipe that has
changed is another base.
"""

from __future__ import annotations

import functools
import hashlib

from kd import config as config_lib
from kd import files
from kd.config import Recipe

ROOT = 'runs/bases'
# What decides nothing of a recipe, and of a stage whose last checkpoint is its result.
_ASIDE = ('report', 'profile', 'data_dir', 'on_nonfinite')
_WATCHED = ('evaluators', 'writers', 'log_every', 'eval_every', 'checkpoint_every', 'keep')


@functools.cache
def recipe(config: str) -> Recipe:
    """The recipe of 'configs/x.py:argument'."""
    return config_lib.parse(config_lib.load(config))


@functools.cache
def directory(config: str) -> str:
    """The work directory of a base, 'runs/bases/NAME-HASH', below where the command runs."""
    made = recipe(config)
    plain = {k: v for k, v in made.plain().items() if k not in _ASIDE}
    for name, stage in made.stages.items():
        if stage.final == 'last':
            plain[name] = {k: v for k, v in plain[name].items() if k not in _WATCHED}
    digest = hashlib.sha256(files.json_text(plain).encode()).hexdigest()[:10]
    file, _, argument = config.partition(':')
    name = argument or file.rpartition('/')[2].removesuffix('.py')
    return f'{ROOT}/{name}-{digest}'
