"""What claims have measured, as it lies in results/NAME.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd import files

RESULTS = Path('results')
REPRODUCED, NOT_REPRODUCED = 'reproduced', 'not reproduced at this scale'
INCONCLUSIVE, NOT_MEASURED = 'inconclusive', 'not measured'

# What `kd.claims.claim.run` writes.
Result = Mapping[str, Any]


def measured(root: Path = Path()) -> dict[str, Result]:
    """All results so far, by claim, below the root of a checkout."""
    found = sorted((root / RESULTS).glob('*.json'))
    return {file.stem: files.read_json(file, 'run the claim again') for file in found}


def verdict(claim: str, results: Mapping[str, Result]) -> str:
    """The verdict of a claim, or 'not measured'."""
    return results[claim]['verdict'] if claim in results else NOT_MEASURED


def held(result: Result) -> str:
    """'3 of 5': the checks that hold."""
    verdicts = [check['verdict'] for check in result['checks']]
    return f'{verdicts.count(REPRODUCED)} of {len(verdicts)}'


def took(result: Result) -> str:
    """'26 s' or '19 min': how long the claim ran."""
    seconds = result['seconds']
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'


def rest(result: Result) -> str:
    """The checks that do not hold; where all hold, the one closest to zero.

    Closest in units of its interval, and with that interval.
    """
    checks = result['checks']
    others = [check for check in checks if check['verdict'] != REPRODUCED]
    if others:
        told = 'open' if result['verdict'] == INCONCLUSIVE else 'not'
        return f'{told}: ' + '; '.join(map(_shown, others))
    return f'closest: {_shown(min(checks, key=_clearance))}'


def _shown(check: Mapping[str, Any]) -> str:
    low, high = check['interval']
    return f'{check["check"]} {check["difference"]:+.3g} [{low:+.3g}, {high:+.3g}]'


def _clearance(check: Mapping[str, Any]) -> float:
    """By how many half widths of its interval the difference lies above zero."""
    low, high = check['interval']
    return check['difference'] / max((high - low) / 2, 1e-12)
