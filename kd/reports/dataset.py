"""The report of a distilled data set: accuracies, architectures, scores, images, and the set itself
in files that others can load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from kd import files, loading
from kd.context import ReportContext
from kd.data import sources
from kd.data.distilled import coreset, export, synthetic
from kd.data.transforms import standardised
from kd.evaluators import compensated_set as compensator
from kd.evaluators import synthetic_set
from kd.evaluators.fresh_training import Protocol, page, pixels
from kd.methods.dataset.common import expert_logits
from kd.network import Network
from kd.networks import build_network
from kd.ranges import Count, Finite, Keywords, Positive, RowTitle, Size, SplitName, StageName
from kd.state import State
from kd.training.stage import Stage, prepare


def dataset_distillation(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, StageName, str]],
    network: Mapping[str, Any],
    networks: Mapping[str, Mapping[str, Any]] | None = None,
    step_sizes: Sequence[Positive] = (),
    protocol: Annotated[Mapping[str, Any] | None, Keywords(Protocol, ('network',))] = None,
    repeats: Count = 5,
    full_epochs: Size = 0,
    baseline: Literal[''] | RowTitle = '',
    split: SplitName = 'test',
) -> Path:
    """Trains fresh networks on every set, tests them once, and writes the sets.

    A set without a learning rate of its own takes the one of `step_sizes` that is best on the
    validation split, per architecture; architectures other than the first do so for every set.

    Args:
      context: the run.
      rows: (title, stage, average of its images or '') in the order of the table.
      network: block of the architecture of the first table.
      networks: further ones by title.
      step_sizes: learning rates to choose from.
      protocol: of `kd.evaluators.fresh_training.Protocol`.
      repeats: networks per row and architecture.
      full_epochs: passes over the real training split for its accuracy, at the learning rate of the
        baseline (of the first row without one); 0 leaves out the row, and with it the label-robust
        score. Against a set with soft labels, the baseline has those of the first expert.
      baseline: the row that scores are relative to; '' for no scores.
      split: of the recipe's data that nothing was chosen on.

    Returns:
      Path of `report.md`. Beside it, in `synthetic/`: TITLE.npz (`image` in pixels around [-1, 1],
      `input` as networks see it, `label`, `step_size`) and `tfds/NAME/1.0.0`.
    """
    settings = dict(protocol or {})
    made = {title: restore(context, stage, average) for title, stage, average in rows}
    load, workdir, seed = context.source, context.workdir, context.recipe.seed
    train = load('train')
    trial = Trial(
        jax.random.split(jax.random.key(1), repeats),
        standardised.everything(load('validation')),
        standardised.everything(load(split)),
    )
    built, first = _built(network, train), _name(network)
    judge = Protocol(built, **settings)
    results: dict[str, dict[str, Any]] = {title: {} for title in made}
    for title, one in made.items():
        own = np.isfinite(one.step_size)
        results[title][first] = trial.cell(judge, one, () if own else step_sizes)
    full = None
    if full_epochs:
        rate = results[baseline or rows[0][0]][first]['step_size']
        full = trial.of_everything(
            Protocol(built, **{**settings, 'epochs': full_epochs}), train, rate
        )
    plain = Protocol(built, **{**settings, 'augmentation': ''})
    soft = None
    if full is not None and baseline and any(_soft(one) for one in made.values()):
        soft = _labelled_by_expert(context, rows[0][1], built, made[baseline])
    scores = _scores(results, made, trial, plain, judge, baseline, full, soft)
    for label, block in (networks or {}).items():
        other = Protocol(_built(block, train), **settings)
        for title, one in made.items():
            results[title][label] = trial.cell(other, one, step_sizes)
    if full is not None:
        results['all real images'] = {first: _summary(full)}
    for title, one in made.items():
        _write(workdir / 'synthetic', workdir / 'figures', title, one, train)
    text = _markdown(results, scores, made, load(split), repeats, seed, baseline)
    return _report(workdir, text, accuracy=results, scores=scores)


class Trial(NamedTuple):
    """What a training set is judged by.

    Attributes:
      keys: of the networks.
      validation: examples on which learning rates are chosen.
      test: examples on which the result is measured.
    """

    keys: jax.Array
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]

    def cell(
        self, judge: Protocol, one: synthetic.SyntheticSet, step_sizes: Sequence[float]
    ) -> dict[str, float]:
        """Accuracy on the test split at the best of the step sizes, or at the set's own."""
        rate = float(one.step_size)
        if step_sizes:
            rate = judge.best(self.keys, one, self.validation, step_sizes)[1]
        accuracies = judge(self.keys, one.examples, self.test, rate)
        return {**_summary(accuracies), 'step_size': rate}

    def of_everything(self, judge: Protocol, train: sources.Source, rate: float) -> np.ndarray:
        """Accuracies on the test split of networks trained on all real images."""
        real = standardised.everything(train)
        examples = {name: x for name, x in real.items() if name != 'index'}
        return judge(self.keys, examples, self.test, rate)


def compensated_set(
    context: ReportContext,
    *,
    stage: StageName,
    network: Mapping[str, Any],
    networks: Mapping[str, Mapping[str, Any]] | None = None,
    protocol: Annotated[
        Mapping[str, Any] | None, Keywords(compensator.SoftTraining, ('network', 'networks'))
    ] = None,
    repeats: Count = 5,
    split: SplitName = 'test',
    low: Finite = -1.0,
    high: Finite = 1.0,
) -> Path:
    """The report of compensators: their set beside real images, all under the same soft labels.

    Rows: the compensated set; the real images in it alone; as many random real images as the
    budget of storage holds. Every network takes the same number of steps.

    Args:
      context: the run.
      stage: of `kd.methods.dataset.infer_ufc`.
      network: block of the network that is trained.
      networks: further ones by title.
      protocol: `lr`, `epochs`, and further arguments of `compensated_set.SoftTraining`.
      repeats: networks per row.
      split: of the recipe's data that nothing was chosen on.
      low, high: range of pixels.

    Returns:
      Path of `report.md`; the set lies in `synthetic/` as NPZ and in the format of tfds.
    """
    prepared = prepare(context.recipe, stage, context.mesh, context.workdir)
    train, judged, workdir = context.source('train'), context.source(split), context.workdir
    state = jax.device_get(restore_state(context, stage))
    sets = _beside_real_images(prepared, state, train, low, high)
    test, keys = standardised.everything(judged), jax.random.split(jax.random.key(1), repeats)
    results: dict[str, dict[str, Any]] = {title: {} for title in sets}
    most = len(sets['compensated']['input'])
    for label, block in {_name(network): network, **(networks or {})}.items():
        training = compensator.SoftTraining(
            _built(block, train), networks=prepared.context.references, **dict(protocol or {})
        )
        for title, examples in sets.items():
            found = training(keys, examples, test, variables=prepared.frozen, of=most)
            results[title][label] = _summary(found)
    labelled = sets['compensated']
    probabilities = np.asarray(jax.nn.softmax(labelled['label']))
    made = synthetic.SyntheticSet(labelled['input'], probabilities, np.float32(np.nan))
    _write(workdir / 'synthetic', workdir / 'figures', 'compensated', made, train)
    text = _markdown(results, {}, {'compensated': made}, judged, repeats, context.recipe.seed, '')
    return _report(workdir, text, accuracy=results)


def _beside_real_images(
    prepared: Stage,
    state: State,
    train: sources.Source,
    low: float,
    high: float,
) -> dict[str, dict[str, np.ndarray]]:
    """The rows of `compensated_set`, labelled by the networks of the stage."""

    def labelled(images):
        return compensator.soft_examples(prepared.context.references, prepared.frozen, images)

    whole = labelled(compensator.unfolded(state, low, high))
    real = int(np.prod(state.variables()['groups'].shape[:2]))
    rng = np.random.default_rng(prepared.seed)
    rows = coreset.random_subset(
        rng,
        synthetic.labels_of(train),
        prepared.config.method['images_per_class'],
        num_classes=train.num_classes,
    )
    return {
        'compensated': whole,
        'its real images alone': {name: value[:real] for name, value in whole.items()},
        'random real images': labelled(train.fetch(rows)['input']),
    }


def restore(context: ReportContext, name: str, average: str = '') -> synthetic.SyntheticSet:
    """The set that a finished stage has made, on the host.

    Raises:
      UserError: the stage is not finished, or its checkpoint cannot be read.
    """
    return jax.device_get(synthetic.of_state(restore_state(context, name), average))


def restore_state(context: ReportContext, name: str) -> State:
    """Variables of a finished stage's result; its optimiser's state stays abstract."""
    workdir = context.workdir
    stage = prepare(context.recipe, name, context.mesh, workdir)
    _, found = loading.result(stage, workdir / name)
    return stage.abstract_state().replace(**found, frozen=stage.frozen)


def _soft(one: synthetic.SyntheticSet) -> bool:
    return np.ndim(one.label) == 2


def _labelled_by_expert(
    context: ReportContext, stage: str, network: Network, one: synthetic.SyntheticSet
) -> np.ndarray | None:
    """Probabilities [N, classes] of a trained expert for the images of a set, if there is one."""
    if 'experts' not in context.recipe.stages:
        return None
    prepared = prepare(context.recipe, stage, context.mesh, context.workdir)
    logits = expert_logits(prepared.context, 'experts', network, np.asarray(one.input))
    return np.asarray(jax.nn.softmax(logits))


def _scores(results, made, trial, plain, judge, baseline, full, soft):
    """Label- and augmentation-robust scores of every row but the baseline.

    Sets with soft labels are compared with the baseline under the labels `soft`, where there are
    any.
    """
    if not baseline:
        return {}
    first = next(iter(results[baseline]))
    scores = {}

    def measure(protocol, title, labels=None):
        one, rate = made[title], results[title][first]['step_size']
        examples = one.examples if labels is None else {**one.examples, 'label': labels}
        return float(protocol(trial.keys, examples, trial.test, rate).mean())

    random, random_plain = results[baseline][first]['accuracy'], measure(plain, baseline)
    random_soft = random if soft is None else measure(judge, baseline, soft)
    for title in made:
        if title == baseline:
            continue
        accuracy = results[title][first]['accuracy']
        scores[title] = {
            'augmentation_robust': synthetic_set.augmentation_robust_score(
                accuracy, random, measure(plain, title), random_plain
            )
        }
        if full is not None:
            hard, alike = accuracy, random
            if _soft(made[title]):
                label = np.asarray(made[title].label).argmax(-1)
                hard, alike = measure(judge, title, label), random_soft
            scores[title]['label_robust'] = synthetic_set.label_robust_score(
                accuracy, alike, hard, float(full.mean())
            )
    return scores


def _write(
    folder: Path, figures: Path, title: str, made: synthetic.SyntheticSet, source: sources.Source
) -> None:
    folder.mkdir(exist_ok=True)
    figures.mkdir(exist_ok=True)
    name = slug(title)
    images = pixels(made, source)
    export.write_npz(folder / f'{name}.npz', made, images)
    export.write_tfds(folder / 'tfds', name, made, images, source.num_classes, source.class_names)
    page(made, source).savefig(figures / f'{name}.png')


def _built(block: Mapping[str, Any], train: sources.Source) -> Network:
    built = build_network(block, train, where='report.network')
    assert built is not None
    return built


def _summary(accuracies: np.ndarray) -> dict[str, float]:
    return {'accuracy': float(accuracies.mean()), 'std': float(accuracies.std())}


def _report(workdir: Path, text: str, **record: Any) -> Path:
    """Writes `report.json` and `report.md`; the path of the latter."""
    files.write_json(workdir / 'report.json', record)
    report = workdir / 'report.md'
    files.write_whole(report, text)
    return report


def slug(title: str) -> str:
    """A title as a name of a file and of a tfds data set: small letters, digits and '_'."""
    return '_'.join(''.join(c if c.isalnum() else ' ' for c in title.lower()).split())


def _name(block: Mapping[str, Any]) -> str:
    return str(block['name']).rpartition('.')[2]


def _markdown(results, scores, made, source, repeats, seed, baseline) -> str:
    architectures = list(dict.fromkeys(name for row in results.values() for name in row))
    some = next(iter(made.values()))
    lines = [
        f'# {source.name}: {len(some.label)} synthetic images',
        '',
        f'Accuracy on the {len(source)} examples of `{source.split}`: mean and deviation over '
        f'{repeats} networks trained from scratch, seed {seed}.'
        + (
            ' Learning rate of the first column in brackets, chosen on the validation split where '
            'the set has none of its own.'
            if any('step_size' in cell for row in results.values() for cell in row.values())
            else ''
        ),
        '',
        '| training set | ' + ' | '.join(architectures) + ' |',
        '|---|' + '---:|' * len(architectures),
    ]
    for title, row in results.items():
        cells = []
        for place, name in enumerate(architectures):
            if name not in row:
                cells.append('')
                continue
            rate = row[name].get('step_size')
            cells.append(
                f'{row[name]["accuracy"]:.4f} ± {row[name]["std"]:.4f}'
                + (f' ({rate:.3g})' if place == 0 and rate is not None else '')
            )
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    kinds = list(dict.fromkeys(kind for row in scores.values() for kind in row))
    if kinds:
        lines += ['', f'Scores relative to `{baseline}`, in the manner of DD-Ranking:', '']
        lines += ['| training set | ' + ' | '.join(kinds) + ' |', '|---|' + '---:|' * len(kinds)]
        for title, row in scores.items():
            cells = [f'{row[kind]:.4f}' if kind in row else '' for kind in kinds]
            lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    for title in made:
        lines += ['', f'## {title}', '', f'![{title}](figures/{slug(title)}.png)']
    return '\n'.join(lines) + '\n'
