"""Evaluates a finished stage again.

    python -m kd.evaluate --run=runs/mine/student
    python -m kd.evaluate --run=runs/mine/student --split=test --json=test.json --out=figures

The evaluators are those of the stage's config, on its own checkpoint: the last, or the best one if
the stage ended with that. `--split` has them look at another split of the recipe's data. Numbers
are printed; figures and texts of evaluators are written where `--out` says. The run is not changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd import files, loading, process
from kd.errors import UserError, did_you_mean
from kd.parallel import mesh as mesh_lib
from kd.training.evaluation import Evaluation
from kd.training.stage import prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each metric; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.evaluate', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    path = process.path_argument
    parser.add_argument('--run', required=True, type=path, help='a stage: runs/mine/student')
    parser.add_argument('--split', default='', help="of the recipe's data; each evaluator's own")
    parser.add_argument('--evaluators', default='', help='names, with commas; all of the stage')
    parser.add_argument('--data_dir', type=path, help='where tfds data lies; as in the config')
    parser.add_argument('--json', type=process.file_argument, help='write the numbers there too')
    parser.add_argument('--out', type=path, help='a directory for figures and texts')
    arguments = parser.parse_args(argv)
    chosen = tuple(filter(None, arguments.evaluators.split(',')))
    data_dir = str(arguments.data_dir or '')
    with tempfile.TemporaryDirectory() as nowhere:
        found = evaluate(
            arguments.run, split=arguments.split, evaluators=chosen, data_dir=data_dir,
            out=arguments.out or Path(nowhere),
        )  # fmt: skip
    width = max(map(len, found))
    for name, value in found.items():
        print(f'{name:{width}s}  {value:.6g}')
    if arguments.json:
        files.write_json(arguments.json, dict(found))
    return 0


def evaluate(
    directory: Path,
    out: Path,
    *,
    split: str = '',
    evaluators: Sequence[str] = (),
    data_dir: str = '',
) -> Mapping[str, float]:
    """What the evaluators of a finished stage find, {'evaluator/metric': value}.

    Args:
      directory: of the stage.
      out: for figures/ and texts/ of evaluators that have them; made if it is not there.
      split: of the recipe's data, for all evaluators; '' for that of each.
      evaluators: which of the stage's; () for all.
      data_dir: in place of the config's, '' for that.

    Raises:
      UserError: no finished stage, no evaluators, or none of this name; a split that is not there.
    """
    recipe = loading.recipe_of(directory)
    if data_dir:
        recipe = dataclasses.replace(recipe, data_dir=data_dir)
    stage = prepare(recipe, directory.name, mesh_lib.make_mesh(recipe.mesh), directory.parent)
    for name in evaluators:
        if name not in stage.evaluators:
            raise UserError(
                f"{directory} has no evaluator '{name}'.{did_you_mean(name, stage.evaluators)} "
                f'Evaluators: {", ".join(stage.evaluators)}.'
            )
    kept = {
        name: (split or own, evaluator)
        for name, (own, evaluator) in stage.evaluators.items()
        if name in evaluators or not evaluators
    }
    if not kept:
        raise UserError(f'{directory} has no evaluators.')
    for wanted, _ in kept.values():
        stage.context.source(wanted)
    stage = dataclasses.replace(stage, evaluators=kept)
    state = loading.restored(stage, directory)
    with files.naming(out):
        out.mkdir(parents=True, exist_ok=True)
    return Evaluation(stage)(state, int(state.step), out)


if __name__ == '__main__':
    process.command(main)
