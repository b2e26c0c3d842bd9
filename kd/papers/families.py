"""Families of papers: what one can do with each, and how their papers stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kd.claims import results
from kd.claims.results import Result
from kd.papers.index import Paper

VERDICTS = (
    results.REPRODUCED, results.INCONCLUSIVE, results.NOT_REPRODUCED, results.NOT_MEASURED,
)  # fmt: skip


class Family(NamedTuple):
    """A folder of methods and of configs.

    Attributes:
      title: for people.
      line: what one can do with it, in one line.
      command: a run of minutes on two cores.
    """

    title: str
    line: str
    command: str


def _run(config: str, variant: str = 'cpu') -> str:
    return f'python -m kd.main --config=configs/{config}.py:{variant} --workdir=runs/{config}'


FAMILIES = {
    'vision': Family(
        'Classifiers',
        'a small classifier learns from a large one, from features, from a robust or a wrong one',
        _run('vision/logit_kd'),
    ),
    'lm': Family(
        'Language models',
        "a language model learns a larger one's answers, or its probabilities on its own answers",
        _run('lm/taid'),
    ),
    'rl': Family(
        'Rewards',
        'a policy learns from rewards that programs give, with or without a teacher',
        _run('rl/grpo'),
    ),
    'flow': Family(
        'Flow maps',
        'one network learns a flow and its jumps, and generates in one step or two',
        _run('flow/checkerboard', 'cpu,lsd'),
    ),
    'diffusion': Family(
        'Diffusion in few steps',
        'a diffusion model becomes a generator of one to four steps, by scores, games or rewards',
        _run('diffusion/mnist'),
    ),
    'discrete': Family(
        'Words in parallel',
        'a masked diffusion model of text says many words at once',
        _run('discrete/dparallel'),
    ),
    'dataset': Family(
        'Small data sets',
        'a data set becomes a few images that teach a new network as well as many',
        _run('dataset/mtt'),
    ),
    'sr': Family(
        'Pictures restored',
        'small pictures become large ones, in one call of a network',
        _run('sr/oftsr'),
    ),
    'graph': Family(
        'Graphs',
        'a data set of graphs becomes a few trees of messages',
        _run('graph/mirage'),
    ),
    'tabular': Family(
        'Tables',
        'a fair table is made of an unfair one, and a network learns from it',
        _run('tabular/fair_data'),
    ),
}


def of(papers: Iterable[Paper], family: str) -> list[Paper]:
    """The papers of a family, in the order of the index."""
    return [paper for paper in papers if paper.family == family]


def told(paper: Paper, measured: Mapping[str, Result]) -> str:
    """'reproduced, 3 of 3'; 'no claim of its own' where there is none."""
    if not paper.claim:
        return 'no claim of its own'
    verdict = results.verdict(paper.claim_name, measured)
    result = measured.get(paper.claim_name)
    return verdict if result is None else f'{verdict}, {results.held(result)}'


def counted(papers: Iterable[Paper], measured: Mapping[str, Result]) -> str:
    """'Of 5 papers with a claim 3 are reproduced, 1 ...': how all of them stand, in a sentence."""
    verdicts = [results.verdict(p.claim_name, measured) for p in papers if p.claim]
    first, *others = (f'{verdicts.count(verdict)}' for verdict in VERDICTS)
    parts = (f'{count} {verdict}' for count, verdict in zip(others, VERDICTS[1:], strict=True))
    return f'Of {len(verdicts)} papers with a claim {first} are {VERDICTS[0]}, {", ".join(parts)}.'
