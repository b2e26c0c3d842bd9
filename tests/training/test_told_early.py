"""What would fail at the end is told at the start."""

import json

import numpy as np
import pytest

from kd import config as kd_config
from kd.context import Evaluator
from kd.data import sources
from kd.errors import UserError
from kd.losses import OF_BATCH
from kd.method import Objective, minimize
from kd.metrics import mean
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

REPORT = dict(
    name='kd.reports.classification.classification', rows=(('A teacher', 'teacher'),), teacher=''
)
LOGIT_KD = dict(name='kd.methods.vision.logit_kd.logit_kd')


def recipe(stages=('teacher', 'student'), report=None, **student):
    data = dict(name='two_moons', train='train[:256]', validation='test[:64]', test='test[64:96]')
    config = kd_config.recipe(stages=stages, data=data, report=report, mesh=dict(data=1))
    run = dict(
        network=dict(name='kd.models.mlp.MLP', widths=(4,)),
        optimizer=dict(lr=0.1),
        steps=4,
        batch_size=32,
        log_every=2,
    )
    if 'teacher' in stages:
        method = dict(name='kd.methods.vision.supervised.supervised')
        config.teacher = kd_config.stage(method=method, **run)
    if 'student' in stages:
        fields = dict(method=LOGIT_KD, teacher='teacher')
        config.student = kd_config.stage(**{**run, **fields, **student})
    return config


def refused(config, workdir, message):
    """Refused before anything is trained."""
    with pytest.raises(UserError, match=message) as caught:
        loop.run(config, workdir)
    assert '\n' not in str(caught.value)
    assert not list(workdir.glob('*/checkpoints'))


# Reports.


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(name='kd.reports.classification.clasification'), "Did you mean 'classification'"),
        (
            dict(rows=(('A', 'teacher'), ('B', 'studnt'))),
            r"^report\.rows names the stage 'studnt', and the recipe has teacher, student\. Did "
            "you mean 'student'",
        ),
        (dict(rows=('teacher',)), r'^report\.rows must be a sequence, each a sequence'),
        (dict(rows=(('A', 'teacher', 'x'),)), r'^report\.rows must be a sequence, each a sequence'),
        (dict(teacher='teach'), r"^report\.teacher names the stage 'teach'"),
        (dict(split='tst'), r"^report\.split names the split 'tst', .* Did you mean 'test'"),
        (dict(batch_size=0), r'^report\.batch_size must be an integer from 1'),
        (dict(row=()), r"report has an unknown key 'row'\. Did you mean 'rows'"),
        (dict(rows=None), r'^report\.rows must be a sequence, got None'),
    ],
)
def test_a_report_that_cannot_be_made_is_told_before_training(tmp_path, change, message):
    report = {**REPORT, 'teacher': 'teacher', **change}
    refused(recipe(report=report), tmp_path / 'run', message)


def test_arguments_and_networks_of_a_report_are_told_before_training(tmp_path):
    refused(
        recipe(report=dict(name=REPORT['name'])), tmp_path / 'run', "^report: missing a .*'rows'"
    )
    report = {**OF_SETS, 'networks': {'wide': dict(name='kd.models.mlp.MLP', widths=(0,))}}
    message = r'^report\.networks\.wide\.widths must be a sequence, each an integer from 1'
    refused(recipe(report=report), tmp_path / 'run', message)


SETS = 'kd.reports.dataset'
OF_SETS = dict(
    name=f'{SETS}.dataset_distillation',
    rows=(('random', 'teacher', ''), ('distilled', 'student', '')),
    network=dict(name='kd.models.mlp.MLP', widths=(4,)),
)
OF_COMPENSATORS = dict(name=f'{SETS}.compensated_set', stage='student', network=OF_SETS['network'])


@pytest.mark.parametrize(
    ('report', 'change', 'message'),
    [
        (
            OF_SETS,
            dict(baseline='randm'),
            r"^report\.baseline names the row 'randm', and the recipe has random, distilled\. Did "
            "you mean 'random'",
        ),
        (
            OF_SETS,
            dict(protocol=dict(epoch=3)),
            r"^report\.protocol has an unknown key 'epoch'\. Did you mean 'epochs'\? Protocol "
            'takes: epochs, batch_size,',
        ),
        (OF_SETS, dict(protocol=dict(drop=-1)), r'^report\.protocol\.drop must be a number from 0'),
        (
            OF_SETS,
            dict(protocol=dict(network='x')),
            r"^report\.protocol has an unknown key 'network'",
        ),
        (OF_SETS, dict(protocol=3), r'^report\.protocol must be a block or None, got 3'),
        (
            OF_COMPENSATORS,
            dict(protocol=dict(temperature=0.0)),
            r'^report\.protocol\.temperature must be a number above 0',
        ),
        (
            OF_COMPENSATORS,
            dict(protocol=dict(networks={})),
            r"^report\.protocol has an unknown key 'networks'",
        ),
    ],
)
def test_rows_and_protocols_of_a_report_are_told_before_training(tmp_path, report, change, message):
    refused(recipe(report={**report, **change}), tmp_path / 'run', message)


# Teachers of other runs.


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('early') / 'first'
    loop.run(recipe(('teacher',)), workdir)
    return workdir


@pytest.mark.parametrize(
    ('file', 'change', 'message'),
    [
        ('done.json', None, r'^student\.teacher: .*/first/teacher is not a finished stage'),
        (
            'done.json',
            dict(step=3),
            r'^student\.teacher: .* done but checkpoint 3 is missing',
        ),
        (
            'config.json',
            (8,),
            r'^student\.teacher: the checkpoint does not fit the ',
        ),
    ],
    ids=['unfinished', 'without checkpoint', 'of another shape'],
)
def test_a_teacher_of_another_run_is_looked_at_before_training(
    finished, tmp_path, file, change, message
):
    teacher = finished / 'teacher'
    changed = finished / file if file == 'config.json' else teacher / file
    before = changed.read_text()
    if change is None:
        changed.unlink()
    elif file == 'done.json':
        changed.write_text(json.dumps({**json.loads(before), **change}))
    else:
        config = json.loads(before)
        config['teacher']['network']['widths'] = change
        changed.write_text(json.dumps(config))
    # The stage that comes before would be trained in vain.
    config = recipe(teacher=str(teacher))
    try:
        refused(config, tmp_path / 'run', message)
    finally:
        changed.write_text(before)


# A person's own code.

MINE = r'\S*test_told_early\.py, line \d+'


def method(context, *, wrong: str):
    def loss(params, state, batch, key):
        logits = context.network.apply({'params': params}, batch['input']).logits
        if wrong == 'key':
            batch['labl']
        if wrong == 'bool' and logits.sum() > 0:
            pass
        if wrong == 'array':
            return mean(logits).total
        values = mean(logits.sum(-1))
        return Objective(values, {'top': logits.max()} if wrong == 'metric' else {})

    return minimize(loss, context.tx, context.network.init)


def evaluator(context):
    def update(state, batch):
        return context.network.apply(state.variables(), batch['input']).logit

    return Evaluator(update, dict)


def scalar(student_logits, teacher, *, temperature):
    return ((student_logits - teacher) ** 2).mean()


def unreduced(student_logits, teacher, *, temperature):
    return (student_logits - teacher) ** 2


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(wrong='key'), rf"fails: {MINE}: KeyError: 'labl'"),
        (
            dict(wrong='bool'),
            rf'fails: {MINE}: Attempted boolean conversion of traced',
        ),
        (
            dict(wrong='array'),
            r'the loss method\.<locals>\.loss must return kd\.method\.Obj',
        ),
        (dict(wrong='metric'), "loss gives the metric 'top' as .*; metrics are kd.metrics.mean"),
    ],
)
def test_errors_of_ones_own_loss_name_its_line(tmp_path, changes, message):
    config = recipe(method=dict(name=f'{__name__}.method', **changes))
    refused(config, tmp_path / 'run', f'^student: the step of .*{message}')


def test_errors_of_ones_own_evaluator_name_its_line(tmp_path):
    evaluators = {'mine': dict(name=f'{__name__}.evaluator')}
    message = f'^student: the evaluator mine fails: {MINE}: AttributeError'
    refused(recipe(evaluators=evaluators), tmp_path / 'run', message)


@pytest.mark.parametrize('divergence', ['scalar', 'unreduced'])
def test_a_divergence_of_ones_own_gives_a_value_per_example(tmp_path, divergence):
    given = dict(LOGIT_KD, divergence=f'{__name__}.{divergence}')
    # As many examples as classes: the shapes alone would fit.
    config = recipe(method=given, batch_size=2)
    message = rf'{divergence} returned shape .* one value per position, \(2,\)'
    refused(config, tmp_path / 'run', message)


@pytest.mark.parametrize('loss', sorted(OF_BATCH, key=lambda loss: loss.__name__))
@pytest.mark.parametrize('name', [LOGIT_KD['name'], 'kd.methods.lm.paced.paced'])
def test_a_loss_of_a_whole_batch_refuses_its_parts(tmp_path, name, loss):
    path = f'{loss.__module__}.{loss.__name__}'
    config = recipe(method=dict(name=name, divergence=path, micro_batches=2))
    message = (
        f'^student.method: {loss.__name__} compares the examples of a batch with each other, '
        'which micro_batches=2 would tear apart; set micro_batches=1.$'
    )
    refused(config, tmp_path / 'run', message)


def unlabelled(context):
    arrays = {'input': np.zeros((64, 2), np.float32)}
    spec = sources.example_spec((2,), labelled=False)
    data = sources.DataSet('bare', {'train': 64}, lambda _: sources.in_memory(arrays), spec, None)
    return sources.Source(data, context.split)


def test_a_field_that_the_data_lack_is_named(tmp_path):
    config = recipe(('teacher',))
    config.data = dict(source=dict(name=f'{__name__}.unlabelled'), train='train')
    config.teacher.network.num_classes = 2
    message = "supervised asks for 'label', and the data have only input, index"
    refused(config, tmp_path / 'run', f'^teacher: the step of .*{message}')
