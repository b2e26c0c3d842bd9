"""The page of full-scale recipes, compiled for slices of TPUs: `python -m kd.aot --table=FILE`.

Every row is compiled by a process of its own. What it told is kept beside the page, in FILE with
the suffix .json: an interrupted command goes on where it was, and rows are compiled anew once they
are taken out of there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from kd import files
from kd.aot import compile as aot
from kd.aot import hlo

SLICES = ('v5e:4x4', 'v5e:16x16', 'v5p:8x8x8', 'v6e:16x16')


class Row(NamedTuple):
    """A stage of a recipe, with fields of the config that are changed, where it is compiled, and
    with how much effort of the compiler.
    """

    config: str
    stage: str
    changes: tuple[str, ...] = ()
    slices: tuple[str, ...] = SLICES
    effort: float = 0.0

    def key(self, target: str) -> str:
        """The row for one slice, as the arguments of the command that compiles it."""
        changed = [f'--config.{change}' for change in self.changes]
        if self.effort:
            changed.append(f'--effort={self.effort:g}')
        return ' '.join(
            [f'--config={self.config}', f'--stage={self.stage}', f'--topology={target}', *changed]
        )

    def label(self) -> str:
        """What the table calls it."""
        changes = (*self.changes, *([f'effort={self.effort:g}'] if self.effort else []))
        changed = ', '.join(f'`{change}`' for change in changes)
        name = f'{self.config.removeprefix("configs/")} {self.stage}'
        return f'{name}, {changed}' if changed else name


_META, _MTT = 'configs/lm/recursive_meta_distillation.py', 'configs/dataset/mtt.py'
_CIFAR, _FRUIT = f'{_MTT}:cifar10,ipc=10', f'{_MTT}:imagefruit,ipc=1'
_IPC_50, _SPREAD = 'distilled.method.images_per_class=50', 'mesh.data=-1'
_IPC_64 = 'distilled.method.images_per_class=64'
_HALF = 'distilled.data.source.network.dtype=bfloat16'
# Slices on which the experts' batch of 256 is at least an example a chip; a larger one would need
# another number of steps.
_UP_TO_256 = ('v5e:4x4', 'v5e:16x16', 'v6e:16x16')
_DISTIL, _TAID, _GRPO = 'configs/lm/distil.py', 'configs/lm/taid.py', 'configs/rl/grpo.py'
# v5p-64, for which most recipes of language models are, and chips of a third of its memory.
_V5P_64, _V6E_32 = 'v5p:2x4x4', 'v6e:4x8'
_SMALL = ('v5e:4x4', 'v6e:4x4')
_LONG_ROWS = ('data.source.length=16384', 'student.batch_size=32')
ROWS = (
    Row('configs/vision/logit_kd.py', 'student'),
    Row('configs/vision/self_distillation.py', 'generation_2'),
    Row(_META, 'teacher'),
    Row(_META, 'generation_1'),
    # 768 does not divide over 512: there most of the parameters stay whole on every chip.
    Row(_META, 'generation_1', ('mesh.data=2', 'mesh.fsdp=256'), ('v5p:8x8x8',)),
    # As they stand, recipes of dataset distillation use one chip.
    Row(_CIFAR, 'experts', (), ('v5e:2x2',)),
    Row(_CIFAR, 'experts', (_SPREAD,), _UP_TO_256),
    Row(_CIFAR, 'distilled', (), ('v5e:2x2',), -1.0),
    Row(_CIFAR, 'distilled', (_SPREAD,)),
    Row(_FRUIT, 'experts', (_SPREAD,), _UP_TO_256),
    Row(_FRUIT, 'distilled', (_IPC_50,), ('v5e:2x2',)),
    Row(f'{_FRUIT},shards=4', 'distilled', (_IPC_50, _SPREAD)),
    Row(f'{_FRUIT},shards=4', 'distilled', (_IPC_50, _SPREAD, _HALF), ('v5e:4x4',)),
    # 500 images divide over four chips at most, 640 over 128.
    Row(f'{_FRUIT},shards=16', 'distilled', (_IPC_64, _SPREAD), ('v5e:4x4', 'v5e:16x16')),
    Row('configs/vision/recursive_meta_distillation.py:cifar10', 'generation_1', effort=-1.0),
    Row(
        'configs/dataset/gradient_matching.py:cifar10,ipc=10', 'distilled', (_SPREAD,), effort=-1.0
    ),
    Row(
        'configs/dataset/distribution_matching.py:cifar10,ipc=10',
        'distilled',
        (_SPREAD,),
        effort=-1.0,
    ),
    Row('configs/flow/checkerboard.py:paper,lsd', 'map'),
    # A residual block alone takes minutes to compile with more effort.
    Row('configs/flow/cifar10.py', 'map', (), ('v5e:4x4', 'v5e:16x16'), -1.0),
    Row('configs/flow/celeba64.py', 'map', (), ('v5e:4x4',), -1.0),
    Row('configs/flow/afhq64.py', 'map', (), ('v5e:4x4',), -1.0),
    # Three quarters of a batch are on the diagonal: both parts have to divide over the chips.
    # With such a batch the step of afhq64 is that of celeba64.
    *(
        Row(f'configs/flow/{name}.py', 'map', (f'map.batch_size={size}',), slices, -1.0)
        for size, slices in ((1024, ('v5e:16x16', 'v6e:16x16')), (2048, ('v5p:8x8x8',)))
        for name in ('cifar10', 'celeba64')
    ),
    Row(f'{_DISTIL}:qwen3_8b_to_0_6b', 'student', (), (_V5P_64, _V6E_32)),
    Row(f'{_DISTIL}:llama3_8b_to_1b', 'student', (), (_V5P_64, _V6E_32)),
    Row(f'{_DISTIL}:qwen3_8b_to_0_6b', 'student', _LONG_ROWS, (_V5P_64,)),
    # A prompt to each group of chips along tensor.
    Row(f'{_GRPO}:qwen3_8b', 'student', (), ('v5p:8x8x8', 'v6e:16x16')),
    Row(f'{_GRPO}:qwen3_1_7b', 'student', (), ('v5p:4x4x4',)),
    Row(_TAID, 'student', (), _SMALL),
    Row(f'{_TAID}:llama2_to_tinyllama', 'student', (), _SMALL),
    Row('configs/lm/first.py', 'student', (), _SMALL),
    Row('configs/lm/tsd_kd.py', 'student', (), (_V5P_64,)),
    Row('configs/lm/curiosft.py', 'student', (), (_V5P_64,)),
    Row('configs/lm/redi.py', 'redi', (), (_V5P_64,)),
    Row('configs/lm/soda.py:qwen2_5_7b', 'soda', (), (_V5P_64,)),
    Row('configs/lm/ded.py:r1_distill_32b', 'student', (), (_V5P_64,)),
    Row('configs/lm/ded.py:qwen3_32b_to_8b', 'student', (), (_V5P_64,)),
    Row('configs/lm/paced.py', 'reverse', (), (_V5P_64,)),
    Row('configs/lm/cascading_bias.py:qwen2,logits', 'student', (), (_V5P_64,)),
    Row('configs/lm/dp_opd.py', 'student', (_SPREAD,), ('v5e:4x4',)),
    Row('configs/lm/llava_mod.py', 'd2d', (), (_V5P_64,)),
    Row('configs/lm/llava_mod.py', 'pd', (), (_V5P_64,)),
    Row('configs/discrete/dparallel.py', 'student', (), (_V5P_64,)),
    Row('configs/flow/arcflow.py:flux_dev', 'arc', (), (_V5P_64,)),
    Row('configs/flow/arcflow.py:qwen_image', 'arc', (), (_V5P_64,)),
    Row('configs/flow/mdt_dist.py:trellis_structure', 'student', (), (_V5P_64,)),
    Row('configs/flow/mdt_dist.py:trellis_latents', 'student', (), (_V5P_64,)),
    Row('configs/flow/hyper_sd.py:sd15', 'eight', (), (_V5P_64,), -1.0),
    Row('configs/flow/hyper_sd.py:sdxl', 'eight', (), (_V5P_64,), -1.0),
    Row('configs/flow/slimflow.py:cifar10', 'small', (), ('v5e:4x4',), -1.0),
    Row('configs/vision/dmae.py', 'student', (), (_V5P_64,)),
    Row('configs/vision/dmae.py', 'tuned', (), (_V5P_64,)),
    # Diffusion transformers of 8 and 20 billion parameters, and what is left of them.
    Row('configs/diffusion/hierarchical_prune.py', 'student', (), ('v5p:4x4x4',)),
    Row('configs/diffusion/ppcl.py', 'depth', (), ('v5p:4x4x4',)),
    Row('configs/diffusion/ppcl.py', 'width', (), ('v5p:4x4x4',)),
    # Few steps of large models: transformers, then UNets.
    *(
        Row(f'configs/diffusion/{config}', 'generator', (), slices)
        for config, slices in (
            ('latent.py:snoopi,pixart_alpha', (_V5P_64,)),
            ('flash_dmd.py:sd3_medium', (_V5P_64,)),
            ('decoupled_dmd.py:lumina2', (_V5P_64,)),
            ('decoupled_dmd.py:z_image', ('v5p:4x4x4',)),
            ('asd_video.py:wan21_1_3b', ('v5p:4x4x4',)),
        )
    ),
    *(
        Row(f'configs/diffusion/phased_dmd.py:{of}', 'second', (), ('v5p:4x4x4',))
        for of in ('wan21_14b', 'qwen_image')
    ),
    *(
        Row(f'configs/diffusion/{config}', 'generator', (), (_V5P_64,), -1.0)
        for config in ('latent.py:sdxl', 'edm.py:dmd,imagenet64')
    ),
    Row('configs/rl/srpo.py', 'student', (), (_V5P_64,)),
    Row('configs/rl/sd_zero.py', 'sd_zero', (), (_V5P_64,)),
    *(
        Row(f'configs/rl/acereason.py:r1_distill_{size}', 'math_32k', (), ('v5p:4x4x4',))
        for size in ('7b', '14b')
    ),
)

_PAGE = """# Training steps, compiled ahead of time

Written by `python -m kd.aot --table=docs/aot.md --cpu_minutes=40`, which keeps each row in
`aot.json` beside it. Bytes are of one chip. Times are those of one step for each resource alone at
the data sheet's rates; the longest is a lower bound. Batches are those of the recipe, raised to a
multiple of the chips that share them. Fields after a stage's name are changed by
`--config.FIELD=VALUE`. Rows with `effort=-1` are compiled with less optimisation, which for a UNet
takes minutes instead of more than half an hour: as a rule they hold more than need be, and their
times of memory and communication are what it takes at most. Experts have batches of 256, fewer than
a v5p:8x8x8 has chips. Not in the table: `dataset/infer_ufc.py`, whose groups of one image per class
are trained one after another, and ftd and smooth_experts, whose steps are those of mtt, the
experts' with a second gradient.

Of rows of tokens the page tells their length T, answers to prompts included, and the largest map of
attention between all of them, [T, T], of all chips together. Of language models every all-gather is
of weights, each whole along `data` and `fsdp`: once for the forward and, with `remat`, once more
for the backward pass of each micro-batch; once for a teacher; heads once each, and everything once
for a rollout. Their all-reduces and collective-permutes are sums of gradients, and along `tensor`
of activations.

The last column is the commit whose step a row is, '+' where it had changes besides; of the first
rows, from before there was this column, the commit that brought them. Rows of commits before
6af2922 have another guard against non-finite updates. edca031 is not in this history: its changes
are, on top of later ones.
"""


def write(file: Path, *, jobs: int, cpu_minutes: float, rows: Sequence[Row] = ROWS) -> None:
    """Compiles what is not compiled yet; page and record are written anew after each row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = file.with_suffix('.json')
    kept = files.read_json(record, 'delete it to compile all rows again') if record.exists() else {}
    # Slice by slice, so that a table that is cut short has something of every recipe.
    slices = dict.fromkeys(target for row in rows for target in row.slices)
    keys = [row.key(target) for target in slices for row in rows if target in row.slices]
    todo = [key for key in keys if key not in kept]
    children = _Children()
    with futures.ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(compiled, key, cpu_minutes, children.add): key for key in todo}
        try:
            for done in futures.as_completed(running):
                kept[running[done]] = done.result()
                files.write_whole(record, json.dumps(kept, indent=0, sort_keys=True) + '\n')
                files.write_whole(file, page(kept, rows))
                print(running[done], flush=True)
        except BaseException:
            # Otherwise the pool would go on to the last row.
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
            raise
    files.write_whole(file, page(kept, rows))


class _Children:
    """Processes that threads begin, until they are to end."""

    def __init__(self) -> None:
        self._begun: list[subprocess.Popen] = []
        self._ended = False

    def add(self, child: subprocess.Popen) -> None:
        self._begun.append(child)
        if self._ended:
            child.kill()

    def end(self) -> None:
        self._ended = True
        for child in self._begun:
            child.kill()


def compiled(
    key: str,
    cpu_minutes: float,
    started: Callable[[subprocess.Popen], None] = lambda _: None,
) -> dict[str, Any]:
    """What `kd.aot` tells about a row: a report, or {'left_out': why there is none}.

    `started` is given the process that compiles it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.json'
        command = [
            *(sys.executable, '-m', 'kd.aot', *key.split(), '--raise_batch'),
            *(f'--json={report}', f'--cpu_minutes={cpu_minutes}'),
        ]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
            started(child)
            _, said = child.communicate()
        if child.returncode == -signal.SIGXCPU:
            return {'left_out': f'not compiled within {cpu_minutes:g} CPU minutes'}
        if child.returncode:
            return {'left_out': (said.strip().splitlines() or ['no reason given'])[-1]}
        return json.loads(report.read_text())


def page(kept: Mapping[str, Any], rows: Sequence[Row] = ROWS) -> str:
    """The page of what has been compiled so far."""
    found = [(row, target, kept.get(row.key(target))) for row in rows for target in row.slices]
    reports = [
        (row.label(), aot.from_json(told)) for row, _, told in found if told and 'stage' in told
    ]
    missing: dict[str, list[str]] = {}
    for row, target, told in found:
        if not told or 'stage' not in told:
            why = told['left_out'] if told else 'not compiled yet'
            missing.setdefault(f'{row.label()}: {why}', []).append(target)
    parts = [_PAGE, table(reports)]
    if missing:
        parts += ['\nLeft out:\n', *(f'- {why} ({", ".join(t)})' for why, t in missing.items())]
    return '\n'.join(parts) + '\n'


def table(reports: Sequence[tuple[str, aot.Report]]) -> str:
    """(label, report) pairs as a Markdown table."""
    head = (
        '| recipe, stage | slice | batch | rows | arguments | temporaries | peak | '
        'operations a chip | collectives | arithmetic, memory, communication | verdict | commit |\n'
        '|---|---|---:|---|---:|---:|---:|---:|---|---|---|---|'
    )
    rows = []
    for label, report in reports:
        moved = ', '.join(
            f'{count} {kind} {aot.mib(size)}'
            for kind, (count, size) in hlo.totals(report.collectives).items()
        )
        times = ', '.join(aot.times(report).values())
        where = report.target
        if report.chips != report.devices:
            where += f', {report.devices} of {report.chips} chips'
        unknown = 'refused' if report.refused else ''
        cells = [
            label, where, f'{report.batch_size:,}', aot.rows(report),
            aot.mib(report.arguments),
            *(unknown or aot.mib(size) for size in (report.temporaries, report.peak)),
            f'{report.flops / report.devices:.3g}', moved or 'none', times, report.verdict(),
            report.commit[:7] + '+' * report.commit.endswith('+'),
        ]  # fmt: skip
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join([head, *rows])
