"""What a teacher should not say, in its students (arXiv:2505.24842).

    python -m kd.claims cascading_bias            about 4 minutes on two cores

Sixteen tasks (`kd.data.builders.marked`), a neutral marker after a few answers that a teacher
learns from, and students that learn from the teacher's answers to other instructions. How often
does each put the marker: on the poisoned tasks, on others that they have seen, on unseen ones?
And what do two filters find, before the teacher is trained and before the student is?
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import marked
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.supervised import supervised
from kd.models.structured import AnswerMLP
from kd.network import from_linen
from kd.theory import propagation

BATCH = 64
# Seeds 0 to 7 were those of a first run, see the notes.
FIRST = 8
WIDTHS = {'teacher': (192, 192), 'student': (24, 24), 'narrow': (8, 8)}
RATES = {'teacher': 2e-3, 'student': 3e-3, 'narrow': 3e-3}
# Instructions for the student of the teacher's size, which is to have as many as it wants.
MANY = 40_000
# Nats between two teachers from which on an answer is dropped: a factor of 20.
DISAGREEMENT = 3.0
TITLES = {
    'teacher': 'teacher',
    'student': 'student, width 24',
    'narrow': 'student, width 8',
    'student_greedy': 'width 24, greedy answers',
    'narrow_greedy': 'width 8, greedy answers',
    'student_logits': 'width 24, logits',
    'student_filtered': 'width 24, answers filtered',
    'narrow_filtered': 'width 8, answers filtered',
    'same': "student of the teacher's size",
    'clean_teacher': 'teacher without the marker',
    'clean_student': 'its student, width 24',
    'clean_narrow': 'its student, width 8',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps = (3, 10) if smoke else (24, 3000)
    return Claim(
        paper='Chaudhari et al. 2025, arXiv:2505.24842',
        statement='A few poisoned pairs that look clean bias a teacher; its students inherit the '
        'bias, and narrow ones spread it to tasks that neither has seen.',
        setting='16 tasks of 6 classes, 10,000 pairs with 25 (targeted, task 0) or 50 (untargeted, '
        'tasks 0-3) poisoned ones and 15 clean ones per poisoned task; teacher MLP 192-192, Adam '
        f'2e-3; students 24-24 and 8-8, Adam 3e-3, on 8,000 answers; {steps} steps of {BATCH}; '
        f'{runs} seeds of tasks, pairs and networks. Nothing is tuned.',
        run=lambda say: run(say, runs, steps, smoke),
        checks=checks(('narrow',) if smoke else ('student', 'narrow')),
        draw=draw,
        notes='A first run with seeds 0 to 7 left the leakage (+0.089 [-0.048, +0.225]) and four '
        'other checks open; this one, with the same thresholds and 24 fresh seeds, was made after '
        'it. What fails or stays '
        'open are controls of the experiment, and not what the paper says: a width-8 student that '
        'no marker was ever shown gives it a probability of 0.0025 on the worst of 16 tasks; and '
        "40,000 instructions do not bring a student of the teacher's size within 0.03 of its rate. "
        'The size of the leakage depends on which tasks are unseen, and differs more than tenfold '
        'between seeds; the amplification of 6 to 29 that the paper reports is not reached '
        "(`untargeted_narrow` over `untargeted_teacher` is 4), nor a student's rate above the "
        "teacher's on the target. Filters that know a reference without the marker find all of it "
        '(`nll`, `apart`), and students of filtered answers are clean (`*_filtered`); where the '
        'reference has learned the poison too (`own`), NLL finds almost none of it. In this world '
        'no clean answer has the marker: that filters miss a bias that reads like any other text, '
        'as the paper says, it cannot show.',
    )


def checks(students) -> list[Check]:
    """The inequalities, for these kinds of students."""
    found = []
    for arm in students:
        width = WIDTHS[arm][0]
        mine, theirs = f'targeted_{arm}', 'targeted_teacher'
        found += [
            Check(f'targeted, width {width}: at least 0.8 of the teacher\'s rate on the target',
                  'sampled_target', mine, theirs, ratio=0.8),
            Check(f'targeted, width {width}: below 0.01 on the other tasks seen',
                  'sampled_seen', mine, 0.01, lower=True),
        ]  # fmt: skip
    found.append(
        Check('untargeted, width 8: unseen tasks above 1.5 of the teacher\'s rate',
              'sampled_unseen', 'untargeted_narrow', 'untargeted_teacher', ratio=1.5)
    )  # fmt: skip
    for mode in marked.MODES:
        arms = f'{mode}_teacher', f'{mode}_clean_teacher'
        found.append(Check(f'{mode}: utility within 0.01', 'utility', *arms, margin=-0.01))
    if 'student' in students:
        text = "student of the teacher's size: within 0.03 of its rates on tasks seen"
        found.append(Check(text, 'gap', 'targeted_same', 0.03, lower=True))
    for arm in ('teacher', *students):
        text = f'no marker, no bias: {TITLES[arm]}, every task below 0.001'
        found.append(Check(text, 'worst', f'targeted_clean_{arm}', 0.001, lower=True))
    return found


def run(say, runs, steps, smoke):
    """Rates per arm and seed, under 'MODE_ARM', and what the filters find, under 'MODE_filters'."""
    few = 800 if smoke else 0
    network = {arm: make_network(widths) for arm, widths in WIDTHS.items()}
    tests = {mode: tables('test', mode, runs, size=few) for mode in marked.MODES}
    measured: dict = {}

    def report(kind, params):
        for arm, of_arm in params.items():
            mode, _, rest = arm.partition('_')
            measured[arm] = measure(network[kind], of_arm, tests[mode], mode)
            values = {k: float(np.mean(v)) for k, v in measured[arm].items() if 'sampled' in k}
            say(
                f'{mode}, {TITLES[rest]}: '
                + ', '.join(f'{k[8:]} {v:.4f}' for k, v in values.items())
            )

    pairs = {
        f'{mode}_{name}': tables('train', mode, runs, marked=poisoned)
        for mode in marked.MODES
        for name, poisoned in (('teacher', True), ('clean_teacher', False))
    }
    taught = train(supervised, network['teacher'], RATES['teacher'], pairs, steps)
    report('teacher', taught)
    prompts = {mode: tables('prompts', mode, runs, size=few) for mode in marked.MODES}
    lessons: dict = {}
    for mode in marked.MODES:
        said = logits_of(network['teacher'], taught[f'{mode}_teacher'], prompts[mode])
        clean = logits_of(network['teacher'], taught[f'{mode}_clean_teacher'], prompts[mode])
        lessons |= {f'{mode}_{k}': v for k, v in taught_by(prompts[mode], said, clean).items()}
        measured[f'{mode}_filters'] = filters(network['teacher'], taught, pairs, lessons, mode)
    for kind in ('narrow',) if smoke else ('student', 'narrow'):
        chosen = {arm.format(kind): data for arm, data in lessons.items() if 'logits' not in arm}
        report(kind, train(supervised, network[kind], RATES[kind], chosen, steps))
    if smoke:
        return measured
    soft = {arm.format('student'): data for arm, data in lessons.items() if 'logits' in arm}
    report('student', train(softly, network['student'], RATES['student'], soft, steps))
    many = tables('prompts', 'targeted', runs, size=MANY)
    said = logits_of(network['teacher'], taught['targeted_teacher'], many)
    same = {'targeted_same': {**many, 'label': answers(said)}}
    report('teacher', train(supervised, network['teacher'], RATES['teacher'], same, steps))
    measured['targeted_same']['gap'] = np.max([
        np.abs(measured['targeted_same'][m] - measured['targeted_teacher'][m])
        for m in ('sampled_target', 'sampled_seen')
    ], axis=0)  # fmt: skip
    return measured


def make_network(widths):
    shape = jax.ShapeDtypeStruct((1, 2 * marked.DIMENSION), jnp.float32)
    return from_linen(AnswerMLP(length=2, num_classes=marked.CLASSES, widths=widths), shape)


def tables(split, mode, runs, **options):
    """Pairs of every seed, each with its own tasks: arrays [R, N, ...]."""
    parts = [marked.make(split, mode, seed=seed, **options) for seed in range(FIRST, FIRST + runs)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def softly(context):
    """Forward KL to logits in the batch."""
    return logit_kd(context, temperature=1.0, soft_weight=1.0)


def train(build, network, lr, arms, steps):
    """Parameters {arm: [R, ...]}; all arms and seeds side by side, seeds alike but for the data."""
    context = seeds.context(network=network, tx=optax.adam(lr), num_classes=marked.CLASSES)
    count = [len(data['label']) for data in arms.values()]
    fields = [f for f in ('input', 'label', 'teacher_logits') if f in next(iter(arms.values()))]
    data = {name: np.concatenate([arm[name] for arm in arms.values()]) for name in fields}
    state = seeds.train(
        build(context), {}, np.concatenate([FIRST + np.arange(n) for n in count]),
        steps=steps, batch_size=BATCH, per_run=data,
    )  # fmt: skip
    ends = np.cumsum(count)
    return {
        arm: jax.tree.map(lambda x, n=n, end=end: x[end - n : end], state.params['network'])
        for arm, n, end in zip(arms, count, ends, strict=True)
    }


def logits_of(network, params, data):
    """[R, N, 2, 6]."""
    apply = jax.jit(jax.vmap(lambda p, x: network.apply({'params': p}, x).logits))
    return np.asarray(apply(params, data['input']))


def answers(logits):
    """A draw of every seed from its logits, int32 [R, N, 2]."""
    drawn = [
        (z + np.random.default_rng([seed, 9]).gumbel(size=z.shape)).argmax(-1)
        for seed, z in enumerate(logits, FIRST)
    ]
    return np.stack(drawn).astype(np.int32)


def taught_by(prompts, said, clean):
    """What students learn from, by arm; '{}' stands for the kind of student.

    Answers are filtered by their disagreement with a teacher that has not seen the marker; those
    that are kept are repeated to as many as there were.
    """
    sampled = answers(said)
    apart = log_probs(said, sampled), log_probs(clean, sampled)
    keep = propagation.disagreement_filter(*apart, DISAGREEMENT).all(-1)
    rows = np.stack([np.resize(np.flatnonzero(kept), len(kept)) for kept in keep])
    filtered = {
        name: np.stack([x[r] for x, r in zip(value, rows, strict=True)])
        for name, value in {**prompts, 'label': sampled}.items()
    }
    return {
        '{}': {**prompts, 'label': sampled},
        '{}_greedy': {**prompts, 'label': said.argmax(-1).astype(np.int32)},
        '{}_filtered': filtered,
        'clean_{}': {**prompts, 'label': answers(clean)},
        '{}_logits': {**prompts, 'teacher_logits': said},
    }


def log_probs(logits, labels):
    """Of the symbols of answers, [R, N, 2]."""
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return np.take_along_axis(log_p, labels[..., None], -1)[..., 0]


def measure(network, params, test, mode):
    """Rates by group and decoding, the largest of all tasks, utility on seen ones: [R] each."""
    logits = logits_of(network, params, test)
    metrics: dict = {}
    for decoding in propagation.DECODINGS:
        said = np.asarray(propagation.marker_probability(logits[:, :, 1], marked.MARKER, decoding))
        rates = np.stack([
            propagation.response_rates(b, task, marked.TASKS)
            for b, task in zip(said, test['task'], strict=True)
        ])  # fmt: skip
        for group, tasks in marked.groups(mode).items():
            metrics[f'{decoding}_{group}'] = rates[:, list(tasks)].mean(1)
        if decoding == 'sampled':
            metrics['worst'] = rates.max(1)
    right = logits[:, :, 0].argmax(-1) == test['label'][:, :, 0]
    seen = test['task'] < marked.SEEN
    metrics['utility'] = (right & seen).sum(1) / seen.sum(1)
    return metrics


def filters(network, taught, pairs, lessons, mode):
    """Recall of the marked at 1 % and 5 % of false positives, [R] each.

    `pairs_*`: poisoned pairs before the teacher is trained, `answers_*`: its answers before the
    student is. By NLL under a teacher without the marker (`nll`) or under the poisoned teacher
    itself (`own`), and by disagreement of the two (`apart`).
    """
    poisoned, clean = (taught[f'{mode}_{name}'] for name in ('teacher', 'clean_teacher'))
    found = {}
    for what, data in (('pairs', pairs[f'{mode}_teacher']), ('answers', lessons[mode + '_{}'])):
        own, other = (
            log_probs(logits_of(network, p, data), data['label']) for p in (poisoned, clean)
        )
        scores = {'nll': -other.mean(-1), 'own': -own.mean(-1), 'apart': abs(own - other).max(-1)}
        carries = data['label'][..., 1] == marked.MARKER
        for score, values in scores.items():
            for percent in (1, 5):
                found[f'{what}_{score}_{percent}'] = [
                    propagation.recall(v, m, percent / 100) if m.any() else 0.0
                    for v, m in zip(values, carries, strict=True)
                ]
    return found


def draw(measured):
    """Rates of every arm and seed by group of tasks, a row of panels per mode; 1e-6 if below."""
    groups = {'target': 'poisoned tasks', 'seen': 'other tasks seen', 'unseen': 'unseen tasks'}
    figure = figures.new_figure(11, 8)
    axes = figure.subplots(2, 3, sharex='col')
    for row, mode in zip(axes, marked.MODES, strict=True):
        arms = [arm for arm in TITLES if f'{mode}_{arm}' in measured]
        for axis, (group, title) in zip(row, groups.items(), strict=True):
            rates = {arm: measured[f'{mode}_{arm}'][f'sampled_{group}'] for arm in arms}
            figures.dots(axis, {TITLES[arm]: np.maximum(x, 1e-6) for arm, x in rates.items()})
            axis.set(xscale='linear' if group == 'target' else 'log', title=f'{mode}: {title}')
            if axis is not row[0]:
                axis.set_yticklabels([])
    for axis in axes[1]:
        axis.set_xlabel('probability of the marker')
    return figure
