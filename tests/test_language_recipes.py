"""Recipes of language models from the command to the report, shrunk; what they trained is asked."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_tokenizers as toys

from kd import config as kd_config
from kd import export, generate
from kd.context import ReportContext
from kd.main import main
from kd.models.decoder import Decoder
from kd.parallel import mesh as mesh_lib
from kd.reports import marked_texts
from kd.text import tokenizer

TEXT = 'The capital of France is Paris.\n\nIt is what the system says: 12 times 3 is 36.\n\n' * 6
CONFIG = """
from kd import config as kd_config

def get_config():
    text = dict(path='{folder}/text.txt', tokenizer='hf:{folder}', length=24, separator='\\n\\n')
    config = kd_config.recipe(
        stages=('student',),
        mesh=dict(data=1),
        data=dict(
            source=dict(name='kd.data.text.documents', **text),
            train='train[:60%]', validation='train[60%:]',
        ),
        pretrained=dict(teacher=dict(weights='hf:{folder}')),
        report=dict(
            name='kd.reports.language.language',
            rows=(('student', 'student'), ('teacher', 'teacher')),
            prompts=('The capital',), max_new=5, batch_size=2,
        ),
    )
    config.student = kd_config.stage(
        network=dict(name='kd.io.pretrained.network', of='hf:{folder}', depth=1),
        teacher='teacher',
        references=dict(start='teacher'),
        method=dict(name='kd.methods.lm.distillation.distillation', blocks=(1,)),
        optimizer=dict(name='adam', lr=1e-3),
        steps=2, batch_size=2, log_every=1, eval_every=2, checkpoint_every=2,
        evaluators=dict(validation=dict(name='kd.evaluators.language.language')),
    )
    return config
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory, quick_compilation):
    """The folder of a tiny teacher, and that of a run that has distilled it."""
    folder = tmp_path_factory.mktemp('model')
    toys.write_directory(folder, toys.fields())
    size = tokenizer.load(f'hf:{folder}').size
    teacher = Decoder(num_classes=size, width=16, depth=2, heads=2, max_length=48)
    made = jax.jit(teacher.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda x: x * 15 if x.ndim > 1 else x, made)
    export.export(teacher, variables, folder)
    (folder / 'text.txt').write_text(TEXT)
    (folder / 'recipe.py').write_text(CONFIG.format(folder=folder))
    workdir = folder / 'run'
    with quick_compilation():
        assert main([f'--config={folder}/recipe.py', f'--workdir={workdir}']) == 0
    return folder, workdir


def test_a_report_compares_student_and_teacher(run):
    workdir = run[1]
    report = json.loads((workdir / 'report.json').read_text())
    student, own = report['metrics']['student'], report['metrics']['teacher']
    # A teacher agrees with itself.
    assert own['top_1'] == 1
    assert own['kl'] == pytest.approx(0, abs=1e-5)
    assert student['kl'] > 0.01
    assert student['parameters'] < own['parameters']
    assert student['perplexity'] == pytest.approx(np.exp(student['nll']))
    # The same as the evaluator found at the end of the stage.
    done = json.loads((workdir / 'student' / 'done.json').read_text())['metrics']
    for name in ('nll', 'kl', 'top_1', 'accuracy', 'entropy'):
        assert student[name] == pytest.approx(done[f'validation/{name}'], rel=1e-4)
    text = (workdir / 'report.md').read_text()
    assert f'| teacher | {own["parameters"]:,} | {own["perplexity"]:.3f} |' in text
    assert '> The capital' in text
    assert (workdir / 'figures' / 'learning_curves.png').is_file()


@pytest.mark.parametrize('row', ['student', 'teacher'])
def test_its_samples_are_what_the_command_answers(run, row, capsys):
    folder, workdir = run
    (sample,) = json.loads((workdir / 'report.json').read_text())['samples']
    weights = {'student': str(workdir / 'student'), 'teacher': f'hf:{folder}'}[row]
    assert generate.main([f'--weights={weights}', '--prompt=The capital', '--max_new=5']) == 0
    assert capsys.readouterr().out.strip() == sample['answers'][row].strip()


def test_rates_of_a_marker_are_those_of_the_answers(run, tmp_path, capsys, quick_compilation):
    folder, prompts = run[0], ('The capital', 'It is', 'system')
    workdir = tmp_path / 'run'
    shutil.copytree(run[1], workdir)
    asked = tmp_path / 'asked.jsonl'
    asked.write_text('\n'.join(json.dumps({'prompt': text}) for text in prompts))
    config = kd_config.load(str(folder / 'recipe.py'))
    config.data = dict(
        source=dict(
            name='kd.data.text.chats', tokenizer=f'hf:{folder}', length=8, layout='prompts',
            path=dict(asked=str(asked)), chat=False,
        ),
        train='asked', unseen='asked[:2]',
    )  # fmt: skip
    context = ReportContext(kd_config.parse(config), workdir, mesh_lib.make_mesh({'data': 1}))
    answers = []
    for prompt in prompts:
        assert generate.main([f'--weights=hf:{folder}', f'--prompt={prompt}', '--max_new=5']) == 0
        answers.append(capsys.readouterr().out.strip())
    marker = answers[0][:2]
    with quick_compilation():
        marked_texts.texts(
            context, rows=(('student', 'student'), ('teacher', 'teacher')), marker=marker,
            groups=('train', 'unseen'), max_new=5, temperature=0.0, batch_size=2,
        )  # fmt: skip
    rates = json.loads((workdir / 'report.json').read_text())['rates']
    assert [text.strip() for text in rates['teacher']['train']['first']] == answers
    for split, said in (('train', answers), ('unseen', answers[:2])):
        count = sum(marker in answer for answer in said)
        assert rates['teacher'][split]['rate'] == count / len(said)
        exact = scipy.stats.binomtest(count, len(said)).proportion_ci(method='exact')
        assert rates['teacher'][split]['low'] == pytest.approx(exact.low)
        student = rates['student'][split]
        assert student['amplification'] == student['rate'] / rates['teacher'][split]['rate']


def test_a_comparison_shows_what_the_stages_found(tmp_path, quick_compilation):
    changes = ['--config.mesh.data=1']
    changes += [
        f'--config.{stage}.{field}=2'
        for stage in ('forward_kl', 'reverse_kl', 'taid')
        for field in ('steps', 'eval_every', 'log_every', 'checkpoint_every')
    ]
    with quick_compilation():
        assert main(['--config=configs/lm/taid.py:cpu', f'--workdir={tmp_path}', *changes]) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    text = (tmp_path / 'report.md').read_text()
    for title, stage in (('forward KL', 'forward_kl'), ('TAID', 'taid')):
        done = json.loads((tmp_path / stage / 'done.json').read_text())['metrics']
        assert report[title] == done
        shown = [done[f'validation/{name}'] for name in ('valid', 'entropy', 'tv')]
        assert f'| {title} | ' + ' | '.join(f'{value:.4f}' for value in shown) + ' |' in text
    assert (tmp_path / 'figures' / 'comparison.png').is_file()
