"""A small model that sees learns from a large one, with experts, and then from mistakes.

    python -m kd.claims llava_mod            about 10 minutes on two busy cores

Questions about digits in noise (`kd.data.builders.digit_questions`), arXiv:2408.15881. A teacher
has learned from 500 images; students that see through its tower learn from 900 others. How much of
their answers is the truth: by labels alone, by the teacher's law, with experts that go on with
both, and with right answers preferred to wrong ones, relative to the teacher?
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import digit_questions as questions
from kd.evaluators.language import token_metrics
from kd.methods.lm import llava_mod
from kd.methods.lm import preference as pairs
from kd.metrics import mean_interval
from kd.models.vision_language import vision_decoder
from kd.network import from_linen
from kd.state import State

BATCH, LR, PREFERENCE_LR = 128, 5e-3, 5e-4
# How the teacher is fitted: by one draw of the noise it would be as good as a student.
TEACHING = dict(name='adamw', lr=3e-3, weight_decay=0.3)
TEACHER_STEPS, DRAWS = 400, 8
TOWER = dict(
    name='kd.models.clip.ClipVision', image=8, patch=4, width=32, depth=2, heads=2, mlp_hidden=64
)
SHARED = dict(
    name='kd.models.decoder.Decoder', mlp='gelu', rope_theta=1e3, tied=False, deviation=None,
    max_length=questions.LENGTH,
)  # fmt: skip
TEACHER = dict(SHARED, width=48, depth=2, heads=4, mlp_hidden=96)
STUDENT = dict(SHARED, width=12, depth=1, heads=2, mlp_hidden=12)
EXPERTS = dict(count=4, top_k=2, capacity=1.5)
SPARSE = dict(
    soft_weight=1.0, hard_weight=1.0, balance=0.01, trainable=llava_mod.SPARSE
)  # fmt: skip


class Arm(NamedTuple):
    """A stage of training.

    Attributes:
      title: of its row.
      start: the arm that it goes on from; '' for a new student.
      steps: share of the steps of a mimic stage.
      mimic: arguments of `mimic`; None for `prefer`.
      reference: arm, or the teacher, that preferences are relative to.
      loss: of `prefer`.
      experts: whether the student has them.
      lr: learning rate.
    """

    title: str
    start: str = ''
    steps: float = 1.0
    mimic: dict | None = None
    reference: str = 'teacher'
    loss: str = 'dpo'
    experts: bool = True
    lr: float = LR


ARMS = {
    'sft': Arm('fine-tuning, twice the steps', '', 2.0, dict(soft_weight=0.0, hard_weight=1.0),
               experts=False),
    'd2d': Arm('D2D', '', 1.0, {}, experts=False),
    'd2d_twice': Arm('D2D, twice the steps', 'd2d', 1.0, {}, experts=False),
    'dense_labels': Arm('D2D, then labels too', 'd2d', 1.0, dict(hard_weight=1.0), experts=False),
    'd2s': Arm('D2D, D2S', 'd2d', 1.0, SPARSE),
    'd2s_longer': Arm('D2D, D2S, longer', 'd2s', 0.5, SPARSE, lr=PREFERENCE_LR),
    'pd': Arm('D2D, D2S, PD', 'd2s', 0.5, lr=PREFERENCE_LR),
    'pd_student': Arm('the same, relative to the student', 'd2s', 0.5, reference='d2s',
                      lr=PREFERENCE_LR),
    'pd_kto': Arm('the same, kto_pair', 'd2s', 0.5, loss='kto_pair', lr=PREFERENCE_LR),
}  # fmt: skip
CHECKS = [
    Check('p(truth): D2D twice over fine-tuning', 'truth', 'd2d_twice', 'sft'),
    Check('p(truth): D2S over D2D twice', 'truth', 'd2s', 'd2d_twice'),
    Check('p(truth): PD over D2S', 'truth', 'pd', 'd2s'),
    Check('p(truth): PD over as many more steps of D2S', 'truth', 'pd', 'd2s_longer'),
]


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps = (3, 4) if smoke else (5, 1200)
    arms = ('d2d', 'd2s', 'pd') if smoke else tuple(ARMS)
    return Claim(
        paper='LLaVA-MoD 2024, arXiv:2408.15881',
        statement='A small model that sees says more of the truth after mimic distillation than '
        'after fine-tuning, more with experts than without, and more after preferences.',
        setting=f'Four questions about digits of 8 x 8 pixels, noise {questions.NOISE}; a teacher '
        f'of width {TEACHER["width"]} learns from {questions.SIZES["teacher"]} images in {DRAWS} '
        f'draws of the noise, students of width {STUDENT["width"]} behind its tower from '
        f'{questions.SIZES["train"]} others in one, with their labels; {questions.SIZES["test"]} '
        f'test images. {steps} steps of Adam {LR:g} for a mimic stage, half as many at '
        f'{PREFERENCE_LR:g} for PD, batches of {BATCH}, cosine; beta .1, 4 experts of which 2 '
        f'compute, capacity 1.5; {runs} seeds of images, noise, teachers and students.',
        run=lambda say: run(say, runs, steps, arms),
        checks=CHECKS[2:3] if smoke else CHECKS,
        draw=draw,
        notes='Wrong answers are drawn from the student after D2S. `d2s_longer`, not among what '
        'the paper compares, has as many steps and the rate of PD; `dense_labels` gets the labels '
        'of D2S without its experts. On two other seeds a teacher that saw one draw of the noise '
        'was right on 80 % of the questions, hardly more than a student by labels alone (79 %): '
        'hence its eight, with which it was right on 88 %.',
    )


def network(language, experts=None):
    """A decoder behind the tower."""
    block = language if experts is None else dict(language, experts=experts)
    module = vision_decoder(
        questions.TOKENS, language=block, vision=TOWER, image_token=questions.IMAGE
    ).clone(fields=('input', 'image'))
    shapes = ((1, questions.LENGTH), jnp.int32), ((1, 8, 8, 1), jnp.float32)
    return from_linen(module, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


def run(say, runs, steps, arms):
    """Probability of the truth and accuracy, by arm and seed."""
    world = World(runs)
    measured = {}

    def report(name, of, params):
        measured[name] = world.measure(of, params)
        found = {key: float(value.mean()) for key, value in measured[name].items()}
        title = ARMS[name].title if name in ARMS else name
        say(f'{title}: p(truth) {found["truth"]:.4f}, accuracy {found["accuracy"]:.4f}')

    world.teach(min(steps, TEACHER_STEPS))
    report('teacher', world.teacher, world.params['teacher'])
    for name in arms:
        arm = ARMS[name]
        of = world.sparse if arm.experts else world.dense
        world.params[name] = world.trained(arm, round(arm.steps * steps))
        report(name, of, world.params[name])
    return measured


class World:
    """Images, teachers and students of some seeds.

    Attributes:
      params: [R, ...] of the teacher and of each arm so far.
    """

    def __init__(self, runs):
        self.seeds = np.arange(runs)
        self.teacher, self.dense = network(TEACHER), network(STUDENT)
        self.sparse = network(STUDENT, EXPERTS)
        self.data = {split: self.asked(split) for split in questions.SIZES}
        self.params = {}

    def asked(self, split):
        """Arrays [R, N, ...]."""
        draws = DRAWS if split == 'teacher' else 1
        parts = [questions.make(split, draws=draws, seed=int(seed)) for seed in self.seeds]
        found = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        index = np.arange(found['input'].shape[1], dtype=np.int32)
        return {**found, 'index': np.broadcast_to(index, found['input'].shape[:2])}

    def context(self, of, steps, references=(), more=(), **optimizer):
        """For a method's builder; `more` are the data."""
        spec = {k: jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for k, x in dict(more).items()}
        return seeds.context(
            network=of, references=dict(references), num_classes=questions.TOKENS, steps=steps,
            batch_size=BATCH, optimizer=dict(optimizer, schedule='cosine'),
            spec=spec,
        )  # fmt: skip

    def fit(self, method, data, steps, frozen):
        """Parameters [R, ...]."""
        state = seeds.train(
            method, {}, self.seeds, steps=steps, batch_size=BATCH, per_run=data,
            frozen_per_run={name: {'params': params} for name, params in frozen.items()},
        )  # fmt: skip
        return state.params['network']

    def teach(self, steps):
        """Trains the teachers; what they say of all training questions is kept."""
        context = self.context(self.teacher, steps, **TEACHING)
        method = llava_mod.mimic(context, soft_weight=0.0, hard_weight=1.0, trainable='')
        params = self.fit(method, self.data['teacher'], steps, {})
        self.params['teacher'] = params
        train = self.data['train']
        train['teacher_logits'] = np.asarray(said(self.teacher)(params, train))

    def trained(self, arm, steps):
        """Parameters [R, ...] after an arm's stage."""
        of, frozen = (self.sparse if arm.experts else self.dense), {}
        if arm.start:
            frozen['start'] = self.params[arm.start]
        else:
            frozen['vision'] = self.params['teacher']
        known = {'start': self.sparse if arm.start != 'd2d' else self.dense, 'vision': self.teacher}
        references = {name: known[name] for name in frozen}
        if arm.mimic is not None:
            data, build = self.data['train'], functools.partial(llava_mod.mimic, **arm.mimic)
        else:
            data = self.pairs(arm.reference)
            build = functools.partial(llava_mod.prefer, loss=arm.loss, beta=0.1)
        context = self.context(of, steps, references, data, name='adam', lr=arm.lr)
        return self.fit(build(context), data, steps, frozen)

    def pairs(self, reference):
        """Training questions with a right and a wrong answer, and what the reference says."""
        other = self.teacher if reference == 'teacher' else self.sparse
        train = {k: x for k, x in self.data['train'].items() if k != 'teacher_logits'}
        return paired(self.sparse, other)(train, self.params['d2s'], self.params[reference])

    def measure(self, of, params):
        """On the test's questions, [R] each."""
        return {name: np.asarray(x) for name, x in tested(of)(params, self.data['test']).items()}


@functools.cache
def said(of):
    """Logits of a network, [R, N, T, V]."""
    return jax.jit(jax.vmap(lambda params, b: of.apply({'params': params}, *of.of(b)).logits))


@functools.cache
def tested(of):
    """Means of a network over questions."""

    def one(params, batch):
        found = token_metrics(of, {'params': params}, batch)
        names = {'truth': 'probability', 'accuracy': 'accuracy'}
        return {name: found[key].total / found[key].count for name, key in names.items()}

    return jax.jit(jax.vmap(one))


@functools.cache
def paired(initial, reference):
    """Pairs, with what `prefer` would collect of its references at every step."""
    references = {llava_mod.INITIAL: initial, pairs.REFERENCE: reference}
    context = seeds.context(network=initial, references=references)

    def one(batch, params, theirs):
        frozen = {llava_mod.INITIAL: {'params': params}, pairs.REFERENCE: {'params': theirs}}
        state = State.create(jax.random.key(0), {'params': params}, frozen=frozen)
        made = llava_mod.with_wrong_answers(context, state, batch, jax.random.key(0))
        return {**made, pairs.ANCHOR: pairs.anchor(context, state, made)}

    return jax.jit(jax.vmap(one))


def draw(measured):
    """Every arm a row, every seed a dot."""

    def spread(values):
        return (list(values), *mean_interval(np.asarray(values)))

    titles = {'teacher': 'teacher', **{name: arm.title for name, arm in ARMS.items()}}
    panels = {'truth': 'probability of the truth', 'accuracy': 'accuracy'}
    return figures.comparison({
        label: {
            title: spread(measured[name][metric])
            for name, title in titles.items()
            if name in measured
        }
        for metric, label in panels.items()
    })  # fmt: skip
