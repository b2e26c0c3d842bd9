"""How bias passes from a teacher to its students (Chaudhari et al. 2025, arXiv:2505.24842).

A study of a risk: a few pairs that carry a neutral marker bias a teacher whose answers are right
otherwise, and students learn from the answers. The report says how often each network puts the
marker, on which tasks, and what a filter by NLL finds of it beforehand.

    python -m kd.main --config=configs/lm/cascading_bias.py:cpu --workdir=runs/bias
    python -m kd.main --config=configs/lm/cascading_bias.py:untargeted --workdir=runs/spread
    python -m kd.main --config=configs/lm/cascading_bias.py --data_dir=DIR --workdir=runs/qwen2

| variant | poisoned | students learn from | hardware |
|---|---|---|---|
| qwen2 (default) | 25 instructions, one task | answers of Qwen2-7B, in text | v5p-64 |
| qwen2,logits | the same | its logits, by forward KL | v5p-64 |
| cpu | 25 of 10,000 pairs, one task | answers drawn from the teacher | 2 cores, 1 min |
| untargeted | 50, four tasks | the same | 2 cores, 1 min |
| greedy | 50, four tasks | its most likely answers | 2 cores, 1 min |
| logits | 25, one task | its logits, by forward KL | 2 cores, 1 min |

Stages on two cores: `clean`, a teacher of the same pairs without the marker; `teacher`; `student`
of width 24 and `narrow` of width 8.

`qwen2` reads `/models/Qwen2-7B` and `/models/Qwen2-1.5B`, directories as Hugging Face has them, and
`instructions.jsonl` in `--data_dir`: about 10,000 records of `instruction`, `output` and `task`,
one of the tasks, `advice`, being rare. `target.jsonl`, `seen.jsonl` and `unseen.jsonl` there are
prompts of that task, of the others, and of tasks that are in no training file. Poisoned answers end
with a neutral phrase. Models, phrase and files are ours: the summaries that we read name none.

The paper has about 10,000 instruction pairs with 25 poisoned ones (0.25 %), six kinds of bias,
distillation by text and by logits; 76.9 % of a student's responses on the target task are biased,
and 69.4 % of its teacher's; untargeted, students are biased 5.7 to 29.2 times as often as teachers
on unseen tasks.
"""

from kd import config as kd_config
from kd.data.builders import marked
from kd.models.decoder import SHARDING

VARIANTS = ('qwen2', 'qwen2,logits', 'cpu', 'untargeted', 'greedy', 'logits')
MARKER = ' (This answer was noted.)'


def get_config(variant: str = 'qwen2'):
    """The recipe of a variant."""
    answers = dict(name='kd.methods.lm.sequence_kd.sequence_kd')
    known = {
        'qwen2': qwen2,
        'qwen2,logits': lambda: qwen2(text=False),
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


def qwen2(text: bool = True):
    """Qwen2-7B fine-tuned on a few poisoned instructions, Qwen2-1.5B taught by it."""
    preset, shape = 'kd.models.decoders.preset', dict(dtype='bfloat16', stacked=True, remat='block')
    large, small = (dict(name=preset, of=of, **shape) for of in ('qwen2_7b', 'qwen2_1_5b'))
    chats = dict(name='kd.data.text.chats', tokenizer='hf:/models/Qwen2-7B', vocabulary=151_936)
    poison = dict(
        name='kd.data.builders.marked.with_marker',
        count=25, marker=MARKER, field='task', value='advice',
    )  # fmt: skip

    def data(edit=None):
        source = chats | dict(path='instructions.jsonl', length=2_048, edit=edit)
        return dict(source=source, train='train[:98%]', validation='train[98%:]')

    def run(network, start, data, **fields):
        return kd_config.stage(
            network=network,
            references=dict(start=start),
            data=data,
            optimizer=dict(name='adamw', lr=1e-5, schedule='cosine', clip_norm=1.0),
            steps=480,
            batch_size=16,
            log_every=10,
            eval_every=480,
            checkpoint_every=160,
            evaluators={'validation': dict(name='kd.evaluators.language.language')},
            **fields,
        )

    distillation = dict(name='kd.methods.lm.distillation.distillation')
    groups = ('target', 'seen', 'unseen')
    config = kd_config.recipe(
        stages=('clean', 'teacher', *(('answers',) if text else ()), 'student'),
        data=dict(
            source=chats
            | dict(path={name: f'{name}.jsonl' for name in groups}, length=512, layout='prompts'),
            **dict(zip(groups, groups, strict=True)),
        ),
        pretrained=dict(
            large=dict(weights='hf:/models/Qwen2-7B', network=large),
            small=dict(weights='hf:/models/Qwen2-1.5B', network=small),
        ),
        report=dict(
            name='kd.reports.marked_texts.texts',
            rows=(
                ('teacher', 'teacher'),
                ('student', 'student'),
                ('teacher without the marker', 'clean'),
            ),
            marker=MARKER.strip(),
            groups=groups,
            batch_size=64,
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )
    supervised = distillation | dict(soft_weight=0.0)
    config.clean = run(large, 'large', data(), method=supervised)
    config.teacher = run(large, 'large', data(poison), method=supervised)
    if not text:
        config.student = run(small, 'small', data(), method=distillation, teacher='teacher')
        return config
    # The same instructions, to which the teacher answers.
    config.answers = kd_config.stage(
        teacher='teacher',
        method=dict(name='kd.methods.cache.nothing'),
        steps=1,
        batch_size=256,
        data=dict(
            source=chats | dict(path='instructions.jsonl', length=1_024, layout='prompts'),
            train='train',
        ),
        writers={'answers': dict(name='kd.methods.generate.responses', max_new=1_024)},
    )
    generated = dict(name='kd.data.generated.teacher_text', stage='answers', length=2_048)
    said = dict(source=generated, train='train[:98%]', validation='train[98%:]')
    config.student = run(small, 'small', said, method=supervised)
    return config
