"""Stages that are done are used again while what they were made from is the same."""

import json
import re

import pytest

from kd import config as kd_config
from kd.errors import UserError
from kd.training import loop, reuse
from kd.training.reuse import Choice

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def a_recipe(**changes):
    """teacher -> cache -> student, and a baseline that needs none of them."""
    config = kd_config.recipe(
        stages=('teacher', 'cache', 'baseline', 'student'), data=dict(name='two_moons', train='x')
    )
    block = dict(method=dict(name='m'), steps=10, batch_size=4)
    config.teacher = kd_config.stage(**block, ema={'slow': 0.9})
    config.cache = kd_config.stage(**block, teacher='teacher')
    config.baseline = kd_config.stage(**block)
    config.student = kd_config.stage(
        **block, data=dict(source=dict(name='s', stage='cache'), train='x')
    )
    for path, value in changes.items():
        *parents, field = path.split('__')
        place = config
        for parent in parents:
            place = place[parent]
        place[field] = value
    return kd_config.parse(config)


def plain(**changes):
    return json.loads(json.dumps(a_recipe(**changes).plain()))


ALL = ('teacher', 'cache', 'baseline', 'student')


def test_a_stage_is_made_from_all_that_it_names_directly_or_not():
    recipe = a_recipe().plain()
    made_from = {name: reuse.named(recipe, name) for name in ALL}
    assert made_from == {
        'teacher': [], 'cache': ['teacher'], 'baseline': [], 'student': ['teacher', 'cache'],
    }  # fmt: skip
    started = a_recipe(baseline__references={'start': 'teacher@slow'}).plain()
    assert reuse.named(started, 'baseline') == ['teacher']


def test_a_stage_is_named_by_default_too():
    source = dict(name='kd.data.transforms.cached.cached')
    recipe = a_recipe(student__data=dict(source=source, train='x')).plain()
    assert reuse.named(recipe, 'student') == ['teacher', 'cache']


def test_other_stages_may_change_and_the_own_may_not():
    old, new = plain(), plain(student__batch_size=8)
    reuse.check(old, new, ('teacher', 'cache', 'baseline'), Choice())
    with pytest.raises(UserError, match=r'student\.batch_size was 4 and is 8.*--again=student'):
        reuse.check(old, new, ALL, Choice())
    reuse.check(old, new, ALL, Choice(again=('student',)))


@pytest.mark.parametrize(
    ('change', 'kept', 'lost'),
    [
        (dict(teacher__steps=20), ('baseline',), ('teacher', 'cache', 'student')),
        (dict(cache__steps=2), ('teacher', 'baseline'), ('cache', 'student')),
        (dict(seed=1), (), ALL),
        (dict(data__train='y'), (), ALL),
        (dict(on_nonfinite='skip'), ALL, ()),
    ],
)
def test_a_change_reaches_the_stages_made_from_it_and_no_others(change, kept, lost):
    old, new = plain(), plain(**change)
    reuse.check(old, new, kept, Choice())
    for name in lost:
        with pytest.raises(UserError, match='made with another config'):
            reuse.check(old, new, (name,), Choice())


def test_what_decides_the_result_may_change_until_there_is_one():
    old, new = plain(), plain(student__best='train/x', student__final='best')
    reuse.check(old, new, ALL, Choice(), done=('teacher', 'cache'))
    with pytest.raises(UserError, match=r"student\.best was '' and is 'train/x'"):
        reuse.check(old, new, ALL, Choice(), done=ALL)


def test_a_stage_at_another_place_has_another_key():
    old = plain()
    new = plain()
    new['stages'] = ['teacher', 'cache', 'student', 'baseline']
    reuse.check(old, new, ('teacher', 'cache'), Choice())
    with pytest.raises(UserError, match="'student' was stage 4 and is stage 3"):
        reuse.check(old, new, ('student',), Choice())


def test_longer_training_is_asked_for():
    old, new = plain(), plain(student__steps=20)
    with pytest.raises(UserError, match=r'steps was 10 and is 20.*--longer=student, or .*--again'):
        reuse.check(old, new, ALL, Choice())
    reuse.check(old, new, ALL, Choice(longer=('student',)))
    with pytest.raises(UserError, match='steps was 20 and is 10'):
        reuse.check(new, old, ALL, Choice(longer=('student',)))


def test_what_was_made_from_a_stage_that_begins_anew_begins_anew_too():
    with pytest.raises(UserError, match='--again=cache,student'):
        reuse.check(plain(), plain(), ALL, Choice(again=('cache',)))
    reuse.check(plain(), plain(), ALL, Choice(again=('cache', 'student')))


def test_chosen_stages_need_what_they_are_made_from(tmp_path):
    recipe = a_recipe()
    assert Choice(only=('student', 'teacher')).stages(recipe) == ('teacher', 'student')
    with pytest.raises(UserError, match=r"no stage 'studnet'\. Did you mean 'student'"):
        Choice(only=('studnet',)).stages(recipe)
    reuse.check_made(recipe, ('student',), ('teacher', 'cache'), tmp_path)
    with pytest.raises(UserError, match=r"'student' is made from 'cache', which is not done"):
        reuse.check_made(recipe, ('student',), ('teacher',), tmp_path)


def test_files_set_aside_are_numbered(tmp_path):
    for content in ('first', 'second'):
        (tmp_path / 'student').mkdir()
        (tmp_path / 'student' / 'x').write_text(content)
        reuse.set_aside(tmp_path, 'student')
    assert (tmp_path / 'old' / 'student-1' / 'x').read_text() == 'first'
    assert (tmp_path / 'old' / 'student-2' / 'x').read_text() == 'second'


# In a work directory.


def moons(**student):
    config = kd_config.recipe(
        stages=('teacher', 'student'),
        data=dict(name='two_moons', train='train[:128]', validation='test[:64]'),
        report=dict(
            name='kd.reports.classification.classification',
            **dict(rows=(('teacher', 'teacher'), ('student', 'student')), split='validation'),
        ),
    )
    block = dict(
        method=dict(name='kd.methods.vision.supervised.supervised'),
        network=dict(name='kd.models.mlp.MLP', widths=(4,)),
        optimizer=dict(name='sgd', lr=0.1),
        **dict(steps=6, batch_size=32, log_every=2),
    )
    config.teacher = kd_config.stage(**block)
    config.student = kd_config.stage(**{**block, **student})
    return config


def steps(workdir):
    lines = (workdir / 'student' / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['step'] for line in lines]


def test_a_work_directory_keeps_what_is_still_of_the_config(tmp_path, capfd):
    workdir = tmp_path / 'run'
    # One stage alone, then the other, which begins the report.
    assert loop.run(moons(), workdir, Choice(only=('teacher',))) is None
    assert 'left out: not done in' in capfd.readouterr().err
    trained = (workdir / 'teacher' / 'done.json').stat().st_mtime_ns
    assert loop.run(moons(), workdir).name == 'report.md'
    # Another student beside the same teacher.
    other = moons(batch_size=16)
    with pytest.raises(UserError, match=r'student\.batch_size was 32 and is 16'):
        loop.run(other, workdir)
    loop.run(other, workdir, Choice(again=('student',)))
    assert (workdir / 'old' / 'student-1' / 'done.json').exists()
    assert (workdir / 'teacher' / 'done.json').stat().st_mtime_ns == trained
    assert steps(workdir) == [2, 4, 6]
    # The same for longer, from where it ended.
    longer = moons(batch_size=16, steps=10)
    loop.run(longer, workdir, Choice(longer=('student',)))
    assert steps(workdir) == [2, 4, 6, 8, 10]
    assert 'resuming from step 6' in capfd.readouterr().err
    # It now is what it is asked to be.
    loop.run(longer, workdir)
    assert (workdir / 'teacher' / 'done.json').stat().st_mtime_ns == trained


def test_without_a_report_the_last_numbers_are_told(tmp_path, capfd):
    config = moons()
    config.report = {}
    with config.unlocked():
        config.stages = ('teacher',)
        del config['student']
    config.teacher.evaluators = {
        'validation': dict(name='kd.evaluators.classification.classification')
    }
    assert loop.run(config, tmp_path / 'run') is None
    told = capfd.readouterr().err
    assert re.search(r'\[teacher\] validation/accuracy \d\.\d+, validation/nll', told), told
