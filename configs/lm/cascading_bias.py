"""How bias passes from a teacher to its students (Chaudhari et al. 2025, arXiv:2505.24842).

A study of a risk: a few pairs that carry a neutral marker bias a teacher whose answers are right
otherwise, and students learn from the answers. The report says how often each network puts the
marker, on which tasks, and what a filter by NLL finds of it beforehand.

    python -m kd.main --config=configs/lm/cascading_bias.py:cpu --workdir=runs/bias
    python -m kd.main --config=configs/lm/cascading_bias.py:untargeted --workdir=runs/spread

| variant | poisoned | students learn from | hardware |
|---|---|---|---|
| cpu (default) | 25 of 10,000 pairs, one task | answers drawn from the teacher | 2 cores, 1 min |
| untargeted | 50, four tasks | the same | 2 cores, 1 min |
| greedy | 50, four tasks | its most likely answers | 2 cores, 1 min |
| logits | 25, one task | its logits, by forward KL | 2 cores, 1 min |

Stages: `clean`, a teacher of the same pairs without the marker; `teacher`; `student` of width 24
and `narrow` of width 8.

The paper has about 10,000 instruction pairs with 25 poisoned ones (0.25 %), six kinds of bias,
distillation by text and by logits; 76.9 % of a student's responses on the target task are biased,
and 69.4 % of its teacher's; untargeted, students are biased 5.7 to 29.2 times as often as teachers
on unseen tasks.
"""

from kd import config as kd_config
from kd.data.builders import marked

VARIANTS = ('cpu', 'untargeted', 'greedy', 'logits')


def get_config(variant: str = 'cpu'):
    """The recipe of a variant."""
    answers = dict(name='kd.methods.lm.sequence_kd.sequence_kd')
    known = {
        'cpu': lambda: recipe('targeted', answers),
        'untargeted': lambda: recipe('untargeted', answers),
        'greedy': lambda: recipe('untargeted', answers | dict(decoding='greedy')),
        'logits': lambda: recipe(
            'targeted',
            dict(name='kd.methods.vision.logit_kd.logit_kd', temperature=1.0, soft_weight=1.0),
        ),
    }
    return kd_config.variant(variant, known)()


def recipe(mode, method):
    """Both teachers learn from pairs, both students from the teacher, on other instructions."""
    groups = marked.groups(mode)

    def data(train, poisoned=True):
        source = dict(name='kd.data.builders.marked.tasks', mode=mode, marked=poisoned)
        return dict(source=source, train=train, validation='validation', test='test')

    def run(widths, lr):
        return dict(
            network=dict(name='kd.models.structured.AnswerMLP', length=2, widths=widths),
            optimizer=dict(name='adam', lr=lr),
            steps=3000,
            batch_size=64,
            log_every=100,
            eval_every=1000,
            checkpoint_every=1000,
            evaluators={'validation': dict(name='kd.evaluators.marker.marker', groups=groups)},
        )

    supervised = dict(name='kd.methods.vision.supervised.supervised')
    rows = (
        ('teacher', 'teacher'),
        ('student, width 24', 'student'),
        ('student, width 8', 'narrow'),
        ('teacher without the marker', 'clean'),
    )
    config = kd_config.recipe(
        stages=('clean', 'teacher', 'student', 'narrow'),
        data=data('train'),
        report=dict(name='kd.reports.marker.marker', rows=rows, groups=groups),
    )
    config.clean = kd_config.stage(
        method=supervised, data=data('train', poisoned=False), **run((192, 192), 2e-3)
    )
    config.teacher = kd_config.stage(method=supervised, **run((192, 192), 2e-3))
    for name, width in (('student', 24), ('narrow', 8)):
        config[name] = kd_config.stage(
            method=method, teacher='teacher', data=data('prompts'), **run((width, width), 3e-3)
        )
    return config
