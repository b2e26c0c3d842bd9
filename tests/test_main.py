"""`python -m kd.main` as a person starts it, and what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kd.data import catalogue
from kd.io import safetensors
from kd.main import EXIT_USER, main

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = Path(__file__).parent.parent
MOONS = f'--config={ROOT}/tests/recipes/moons.py'


@pytest.fixture(autouse=True)
def recipes_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'recipes'))


def test_the_quickstart_recipe_starts_and_writes_what_the_readme_lists(tmp_path):
    command = [
        *(sys.executable, '-m', 'kd.main'),
        '--config=configs/vision/logit_kd.py:cpu',
        f'--workdir={tmp_path}/run',
        f'--data_dir={tmp_path}/data',
        *(f'--config.{stage}.steps=40' for stage in ('teacher', 'baseline', 'student')),
        *(f'--config.{stage}.log_every=20' for stage in ('teacher', 'baseline', 'student')),
        '--config.report.seeds=2',
    ]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / 'run'
    assert f'Report: {run}/report.md' in done.stdout
    assert 'compiling the training step' in done.stderr
    assert re.search(r'40/40 .* steps/s', done.stderr)
    # Whatever else the libraries like to print does not reach the terminal.
    assert all(line.startswith('[') for line in done.stderr.splitlines() if line.strip())

    manifest = json.loads((run / 'manifest.json').read_text())
    assert manifest['command'].split()[1:3] == ['-m', 'kd.main']
    assert manifest['config'] == json.loads((run / 'config.json').read_text())
    results = json.loads((run / 'report.json').read_text())
    assert list(results) == ['student alone', 'student distilled', 'teacher']
    assert results['teacher']['agreement'] == 1.0
    assert results['teacher']['kl'] == pytest.approx(0.0, abs=1e-6)
    assert results['student alone']['parameters'] == 64 * 64 + 64 + 64 * 10 + 10
    report = (run / 'report.md').read_text()
    assert 'means over seeds 0 to 1' in report
    assert 'student distilled against student alone: accuracy ' in report
    for figure in re.findall(r'\((figures/.*?\.png)\)', report):
        assert (run / figure).stat().st_size > 5_000
    for stage in ('teacher', 'baseline', 'student'):
        lines = [json.loads(x) for x in (run / stage / 'metrics.jsonl').read_text().splitlines()]
        assert [line['step'] for line in lines] == [20, 40]
        assert lines[-1]['train/loss'] < lines[0]['train/loss']
        assert any((run / stage / 'tensorboard').iterdir())
        # A student's checkpoint holds no teacher.
        saved = sum(f.stat().st_size for f in (run / stage / 'checkpoints').rglob('*'))
        assert saved < 1_500_000
    _loads_as_the_quickstart_says(run / 'student', lines[-1]['validation/accuracy'])


def _loads_as_the_quickstart_says(stage, accuracy):
    """The page's Python gives the network of the stage, and so does the file it exports."""
    page = (ROOT / 'docs' / 'quickstart.md').read_text()
    code = re.search(r'```python\n(import kd\n.*?)```', page, re.S)[1]
    assert 'runs/quickstart/student' in code
    data = catalogue.load('digits', 'train[80%:]')
    rows = data.fetch(np.arange(len(data)))
    names = {'images': rows['input']}
    exec(code.replace('runs/quickstart/student', str(stage)), names)
    right = np.asarray(names['logits']).argmax(-1) == rows['label']
    assert right.mean() == pytest.approx(accuracy, abs=1e-6)

    exported = stage.parent / 'student.safetensors'
    command = [sys.executable, '-m', 'kd.io.safetensors', str(stage), str(exported)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    variables = names['model'].variables
    loaded = safetensors.restore(exported, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


# (what is wrong, arguments, words of the one line that says so)
WRONG = [
    ('unknown field', ["--config.student.stepz=1"], "'student.stepz'. Did you mean 'steps'"),
    ('unknown block', ['--config.studnt.steps=1'], "Did you mean 'student'"),
    ('wrong type', ['--config.student.steps=many'], 'takes a value of type int, such as 240'),
    ('unknown flag', ['--wrkdir=x'], "Did you mean '--workdir'"),
    ('slip', ['--config.student.optimizer.warmup_step=9'], "Did you mean 'warmup_steps'"),
    ('passed on', ['--config.student.optimizer.momentun=0.9'], 'unknown key'),
    ('unknown optimiser', ['--config.student.optimizer.name=adm'], "Did you mean 'adam'"),
    ('unknown data set', ['--config.data.name=two_moon'], "did you mean 'two_moons'"),
    ('unknown split', ['--config.data.test=tst'], "no split 'tst'"),
    ('unknown network', ['--config.student.network.name=kd.models.mlp.MPL'], "Did you mean 'MLP'"),
    ('unknown module', ['--config.student.method.name=moonz.traced'], 'no module moonz'),
    ('unknown teacher', ['--config.student.teacher=teach'], "Did you mean 'teacher'"),
    ('unknown average', ['--config.student.teacher_weights=fast'], "['final', 'slow']"),
    ('class counts', ['--config.student.network.num_classes=3'], 'is 3, and the data has 2'),
    ('negative seed', ['--config.seed=-1'], 'seed must be an integer from 0 to 4294967295, got -1'),
    ('late seed', ['--config.seed=4294967296'], 'seed must be an integer from 0 to 4294967295'),
    ('endless', ['--config.student.steps=1e30'], 'student.steps must be an integer from 1 to'),
    ('climbing', ['--config.student.optimizer.lr=-1e-3'], 'lr must be a number from 0, got -0.001'),
    ('no units', ['--config.student.network.widths=(0,)'], 'student.network.widths must be'),
    ('batch over devices', ['--config.student.batch_size=63'], 'does not divide over 8 devices'),
    ('too many devices', ['--config.mesh.data=16'], 'needs 16 devices, there are 8'),
    ('guard', ['--config.on_nonfinite=ignore'], "must be 'stop' or 'skip'"),
    ('best', ['--config.student.final=best'], 'must name a metric'),
    ('best of training', ['--config.teacher.best=train/orders'], "Did you mean 'order'"),
    ('best of evaluator', ['--config.teacher.best=-validation/nil'], "Did you mean 'nll'"),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'words'), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_said_in_one_line_before_any_training(tmp_path, capsys, arguments, words):
    status = main([MOONS, f'--workdir={tmp_path}/run', *arguments])
    said = capsys.readouterr().err.strip()
    assert status == EXIT_USER
    assert words in said
    assert said.startswith('kd: ')
    assert '\n' not in said
    # Nothing was claimed or trained: the corrected command can use the same directory.
    assert not (tmp_path / 'run' / 'config.json').exists()
    assert not list(tmp_path.glob('run/*/checkpoints'))


def test_an_unusable_workdir_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert main([MOONS, f'--workdir={tmp_path}/file/run']) == EXIT_USER
    assert 'Cannot write to workdir' in capsys.readouterr().err


def test_a_missing_config_file_is_said_in_one_line(tmp_path, capsys):
    assert main(['--config=configs/vision/logit_kdd.py', f'--workdir={tmp_path}']) == EXIT_USER
    assert "Did you mean 'configs/vision/logit_kd.py'" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused_with_the_first_difference(tmp_path, capsys):
    from kd.config import load, parse
    from kd.io.workdir import Workdir

    recipe = parse(load(f'{ROOT}/tests/recipes/moons.py'))
    directory = Workdir(tmp_path / 'run', recipe)
    directory.record()
    (directory.stage('student') / 'metrics.jsonl').write_text('')
    directory.close()
    assert main([MOONS, f'--workdir={tmp_path}/run', '--config.student.steps=5']) == EXIT_USER
    assert 'student.steps was 240 and is 5' in capsys.readouterr().err
