"""`manifest.json`: a line for every start of a run, with what its numbers depend on.

Where a run goes on under other versions, other code or another teacher than it began with, the
person is told: what it ends with is then the work of both.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from kd import files
from kd.io import checksums
from kd.references import is_foreign, split_foreign, split_reference

log = logging.getLogger('kd')

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets')
_ROOT = Path(__file__).resolve().parent.parent


def record(workdir: Path, config: Mapping[str, Any]) -> None:
    """Appends a line about this start; warns where it differs from the one before.

    Args:
      workdir: of the run.
      config: the recipe as plain values.
    """
    file = workdir / 'manifest.json'
    lines = file.read_text(encoding='utf-8', errors='replace').splitlines() if file.exists() else []
    line = describe(config)
    if lines and any(not (workdir / name / 'done.json').exists() for name in config['stages']):
        for difference in differences(_parsed(lines[-1]), line):
            log.warning(
                'This run began with %s. It goes on, and its numbers are the work of both; choose '
                'another workdir to begin anew.',
                difference,
            )
    files.write_whole(file, ''.join(f'{kept}\n' for kept in [*lines, files.json_text(line)]))


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Command, versions, code, teachers and devices of this start."""
    device = jax.devices()[0]
    return {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': shlex.join([sys.executable, '-m', 'kd.main', *sys.argv[1:]]),
        'cwd': os.getcwd(),
        'commit': commit(),
        'code': code(),
        'teachers': teachers(config),
        'python': platform.python_version(),
        'packages': {name: metadata.version(name) for name in _PACKAGES},
        'device': device.device_kind,
        'platform': device.platform,
        'devices': jax.device_count(),
        'hosts': jax.process_count(),
        'host': socket.gethostname(),
        'config': config,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of two starts differs and may change numbers, in words: 'jax 0.9.1, not 0.10.2'."""
    found = [
        f'{name} {old[name]}, not {new[name]}'
        for name in ('python', 'device')
        if old.get(name, new[name]) != new[name]
    ]
    found += [
        f'{name} {old["packages"][name]}, not {version}'
        for name, version in new['packages'].items()
        if old.get('packages', {}).get(name, version) != version
    ]
    for kind, what in (('code', 'other code in {}'), ('teachers', 'other weights in {}')):
        before = old.get(kind, {})
        found += [
            what.format(name)
            for name, digest in new[kind].items()
            if before.get(name, digest) != digest
        ]
    return found


def code() -> dict[str, str]:
    """{name: digest} of kd and of every loaded module that is not installed: a user's own."""
    digests = {'kd': _digest(sorted(_ROOT.rglob('*.py')))}
    installed = tuple({sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')})
    for name, module in sorted(sys.modules.copy().items()):
        file = getattr(module, '__file__', None) or ''
        inside = file.startswith(installed) or Path(file).is_relative_to(_ROOT)
        if file.endswith('.py') and not inside and os.path.exists(file):
            digests[name] = _digest([Path(file)])
    return digests


def teachers(config: Mapping[str, Any]) -> dict[str, str]:
    """{reference: digest} of the trained networks that come from outside of the run.

    Of stages of other runs it is that of done.json, which names its weights; of files that others
    have written a sample of them.
    """
    stages, entries = config['stages'], config.get('pretrained', {})
    named = [
        reference
        for stage in map(config.__getitem__, stages)
        for reference in (stage['teacher'], *_stages_of(stage['references']))
    ]
    found = {}
    for name in named:
        weights = entries[name]['weights'] if name in entries else name
        if is_foreign(weights):
            found[name] = checksums.sample(split_foreign(weights)[1])
        elif name and name not in stages and (Path(name) / 'done.json').exists():
            found[name] = _digest([Path(name) / 'done.json'])
    return found


def _stages_of(references: Mapping[str, str]) -> list[str]:
    return [split_reference(reference)[0] for reference in references.values()]


def commit(*folders: str) -> str:
    """The commit of the source tree, '+' appended if it has changes; '' outside a repository.

    Args:
      *folders: of the tree's root, the only ones whose changes count; all of them without any.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ['git', '-C', str(_ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ''

    head = git('rev-parse', 'HEAD')
    changes = git('status', '--porcelain', '-uno', '--', *(f':/{each}' for each in folders))
    return head + '+' * bool(head and changes)


def _parsed(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}  # It only serves to warn.


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
