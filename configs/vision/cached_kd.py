"""Distillation from teacher outputs that were written to disk once.

The recipe of Hinton et al. (2015, arXiv:1503.02531) on digits, with the teacher run once over the
training set instead of at every step. The cache keeps the k most probable classes of softened
outputs with the mass of the rest, which bounds the divergence from below; or `dense` logits.

    python -m kd.main --config=configs/vision/cached_kd.py:cpu --workdir=runs/cached

| variant | kept of 10 classes | hardware |
|---|---|---|
| cpu (default) | top 4 and the tail, float16 | 2 cores, under a minute |
| dense | the logits, float32: the same numbers as without a cache | 2 cores, under a minute |
"""

from typing import Any

from kd import config as kd_config

VARIANTS = ('cpu', 'dense')
TEMPERATURE = 4.0


def get_config(variant: str = 'cpu'):
    """The recipe of a variant."""
    top_4 = dict(form='top_k', size=4, temperature=TEMPERATURE)
    dense = dict(form='dense', dtype='float32')
    return recipe(kd_config.variant(variant, {'cpu': top_4, 'dense': dense}))


def recipe(form):
    """Teacher, its outputs on disk, student."""
    adam = dict(name='adamw', lr=3e-3, schedule='cosine', warmup_steps=20, weight_decay=1e-4)
    data: dict[str, Any] = dict(train='train[:80%]', validation='train[80%:]', test='test')
    run: dict[str, Any] = dict(
        batch_size=64,
        log_every=50,
        eval_every=100,
        checkpoint_every=200,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    config = kd_config.recipe(
        stages=('teacher', 'cache', 'student'),
        data=dict(name='digits', **data),
        report=dict(
            name='kd.reports.classification.classification',
            rows=(('student distilled', 'student'), ('teacher', 'teacher')),
        ),
    )
    config.teacher = kd_config.stage(
        network=dict(name='kd.models.convnet.ConvNet', depth=2, width=32),
        method=dict(name='kd.methods.vision.supervised.supervised', augmentation=(('crop', 1),)),
        optimizer=adam,
        steps=400,
        **run,
    )
    config.cache = kd_config.stage(
        teacher='teacher',
        method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': dict(name='kd.methods.cache.teacher_outputs', split='train', **form)},
        batch_size=256,
        steps=1,
    )
    config.student = kd_config.stage(
        network=dict(name='kd.models.mlp.MLP', widths=(16,)),
        data=dict(source=dict(name='kd.data.transforms.cached.cached', stage='cache'), **data),
        method=dict(
            name='kd.methods.vision.logit_kd.logit_kd', temperature=TEMPERATURE, soft_weight=0.9
        ),
        optimizer=adam,
        steps=600,
        **run,
    )
    return config
