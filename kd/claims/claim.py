"""Claims: a paper's headline as an experiment of arms and seeds, with a verdict.

A claim lives in `configs/claims/NAME.py`, whose `get_claim(smoke)` returns a `Claim`. Each check of
a claim is a paired difference over seeds, with a 95 % t interval. The verdict is

    reproduced                        every interval lies above zero
    not reproduced at this scale      some interval lies below zero
    inconclusive                      otherwise
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kd import config as config_lib
from kd import files
from kd.claims.results import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, RESULTS
from kd.errors import UserError, did_you_mean
from kd.io.manifest import commit
from kd.metrics import mean_interval

CLAIMS = Path('configs/claims')

# {arm: {metric: one value per seed}}
Measured = Mapping[str, Mapping[str, Sequence[float]]]


class Check(NamedTuple):
    """The inequality `metric(better) > metric(worse) + margin`, paired over seeds.

    Attributes:
      text: the inequality in words.
      metric: its name.
      better, worse: arms; `worse` may be a number instead.
      margin: how much better at least.
      lower: the metric is better when lower: `metric(better) < metric(worse) - margin`.
      ratio: compare `metric(better)` with `ratio * metric(worse)`.
    """

    text: str
    metric: str
    better: str
    worse: str | float
    margin: float = 0.0
    lower: bool = False
    ratio: float = 1.0


class Claim(NamedTuple):
    """What a paper says and how it is tried.

    Attributes:
      paper: title and arXiv id.
      statement: the claim in one sentence.
      setting: data, networks, tuning and seeds in a sentence or two.
      run: `run(say) -> {arm: {metric: [value per seed]}}`; `say(text)` shows progress.
      checks: what must hold.
      draw: `draw(measured) -> Figure`.
      notes: facts to report besides, which no check depends on.
    """

    paper: str
    statement: str
    setting: str
    run: Callable[[Callable[[str], None]], Measured]
    checks: Sequence[Check]
    draw: Callable[[Measured], Figure]
    notes: str = ''


def judge(check: Check, measured: Measured) -> dict[str, Any]:
    """The paired difference of a check with its interval and verdict."""
    first = np.asarray(measured[check.better][check.metric], float)
    second = check.ratio * (
        np.asarray(measured[check.worse][check.metric], float)
        if isinstance(check.worse, str)
        else np.full_like(first, check.worse)
    )
    difference = (second - first if check.lower else first - second) - check.margin
    count = len(difference)
    if count < 3:
        raise ValueError(f'A check needs at least 3 seeds, got {count}.')
    mean, half = mean_interval(difference)
    if mean - half > 0:
        verdict = REPRODUCED
    elif mean + half < 0:
        verdict = NOT_REPRODUCED
    else:
        verdict = INCONCLUSIVE
    return {
        'check': check.text,
        'difference': mean,
        'interval': [mean - half, mean + half],
        'seeds': count,
        'verdict': verdict,
    }


def overall(verdicts: Sequence[str]) -> str:
    """The verdict of a claim from those of its checks."""
    if NOT_REPRODUCED in verdicts:
        return NOT_REPRODUCED
    return REPRODUCED if set(verdicts) == {REPRODUCED} else INCONCLUSIVE


def load(name: str, *, smoke: bool = False) -> Claim:
    """The claim in `configs/claims/NAME.py`."""
    file = CLAIMS / f'{name}.py'
    if not file.is_file():
        raise UserError(
            f"There is no claim '{name}'.{did_you_mean(name, names())} Claims: {names()}"
        )
    return config_lib.load_module(file).get_claim(smoke=smoke)


def names() -> list[str]:
    """All claims."""
    return sorted(file.stem for file in CLAIMS.glob('*.py'))


def run(name: str, *, smoke: bool = False, output: Path = RESULTS) -> dict[str, Any]:
    """Runs a claim, writes `NAME.json` and `NAME.png`, and returns what was written."""
    claim = load(name, smoke=smoke)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f'[{time.monotonic() - began:6.1f} s] {line}', flush=True)

    measured = claim.run(say)
    checks = [judge(check, measured) for check in claim.checks]
    result = {
        'claim': name,
        'paper': claim.paper,
        'statement': claim.statement,
        'setting': claim.setting,
        'verdict': overall([check['verdict'] for check in checks]),
        'checks': checks,
        'notes': claim.notes,
        'arms': {
            arm: {metric: _summary(values) for metric, values in metrics.items()}
            for arm, metrics in measured.items()
        },
        'seconds': round(time.monotonic() - began, 1),
        'commit': commit(),
    }
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / f'{name}.json', result)
    claim.draw(measured).savefig(output / f'{name}.png')
    return result


def redraw(name: str, *, output: Path = RESULTS) -> None:
    """Draws `NAME.png` anew from `NAME.json`; raises `UserError` where nothing was measured."""
    file = output / f'{name}.json'
    claim = load(name)
    if not file.is_file():
        raise UserError(f"{file} is not there: 'python -m kd.claims {name}' measures the claim.")
    arms = json.loads(file.read_text())['arms']
    measured: dict[str, Any] = {
        arm: {metric: np.asarray(found['values']) for metric, found in metrics.items()}
        for arm, metrics in arms.items()
    }
    claim.draw(measured).savefig(output / f'{name}.png')


def text(result: Mapping[str, Any]) -> str:
    """A result for the terminal."""
    lines = [f'{result["claim"]}: {result["statement"]}', f'  {result["paper"]}', '']
    for arm, metrics in result['arms'].items():
        cells = [f'{m} {v["mean"]:.4f} ± {v["standard_error"]:.4f}' for m, v in metrics.items()]
        lines.append(f'  {arm:28s} ' + '   '.join(cells))
    lines.append('')
    for check in result['checks']:
        low, high = check['interval']
        lines.append(
            f'  {check["verdict"]:30s} {check["check"]}: '
            f'{check["difference"]:+.4f} [{low:+.4f}, {high:+.4f}]'
        )
    return '\n'.join([*lines, '', f'Verdict: {result["verdict"]} ({result["seconds"]} s)'])


def _summary(values: Sequence[float]) -> dict[str, Any]:
    array = np.asarray(values, float)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else 0.0
    return {
        'mean': float(array.mean()),
        'standard_error': float(error),
        'values': [float(value) for value in array],
    }
