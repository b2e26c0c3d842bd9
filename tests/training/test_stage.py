"""What a stage shares with the networks that it takes from others."""

import pytest

from kd import config as kd_config
from kd.errors import UserError
from kd.parallel.mesh import make_mesh
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SUPERVISED = 'kd.methods.vision.supervised.supervised'


def standardised(kind, **more):
    source = dict(name='kd.data.transforms.standardised.standardised', of='digits', kind=kind)
    return dict(source={**source, **more}, train='train[:64]')


def prepared(data, teacher_data, **student):
    """The stage `student`, whose teacher or reference `base` saw `teacher_data`."""
    stage = dict(
        network=dict(name='kd.models.mlp.MLP', widths=(4,)),
        optimizer=dict(lr=0.1),
        steps=1,
        batch_size=8,
    )
    config = kd_config.recipe(stages=('base', 'student'), data=dict(name='digits', train='train'))
    config.base = kd_config.stage(method=dict(name=SUPERVISED), data=teacher_data, **stage)
    method = 'kd.methods.vision.logit_kd.logit_kd' if 'teacher' in student else SUPERVISED
    config.student = kd_config.stage(method=dict(name=method), data=data, **stage, **student)
    return prepare(kd_config.parse(config), 'student', make_mesh({'data': 1}))


PLAIN = dict(name='digits', train='train[64:128]')


@pytest.mark.parametrize(
    ('data', 'teacher_data', 'words'),
    [
        (PLAIN, {}, None),
        (standardised('none'), PLAIN, "digits, and the stage takes digits with kind='none'; give"),
        (
            standardised('zca', eps=0.1),
            standardised('zca'),
            "digits with kind='zca', fit_on='train', eps=0.4, and the stage takes digits with "
            "kind='zca', fit_on='train', eps=0.1; give both the same data.",
        ),
        (
            standardised('mean'),
            standardised('mean', fit_on='train[:50%]'),
            "digits with kind='mean', fit_on='train[:50%]', and the stage takes digits with "
            "kind='mean', fit_on='train'; give",
        ),
        # Its split is a stage's own affair, and so is what is left at its default.
        (standardised('mean'), {**standardised('mean', eps=0.4), 'train': 'test'}, None),
        (dict(train='train[:9]'), PLAIN, None),
        (
            standardised('mean'),
            dict(source=dict(name='mine.data'), train='train'),
            "the data it was trained on cannot be opened: 'mine.data': there is no module mine",
        ),
    ],
)
@pytest.mark.parametrize('role', ['teacher', 'references.first', 'references.start'])
def test_a_network_is_used_on_the_data_that_it_knows(data, teacher_data, words, role):
    field, _, label = role.partition('.')
    given = {'teacher': 'base'} if field == 'teacher' else {'references': {label: 'base'}}
    if words is None or label == 'start':  # Starting on other data is what starting is for.
        prepared(data, teacher_data, **given)
        return
    with pytest.raises(UserError) as caught:
        prepared(data, teacher_data, **given)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f'student.{role}')
