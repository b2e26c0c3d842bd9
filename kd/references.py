"""How a config names trained networks.

'teacher'                  a stage of the recipe
'runs/mine/teacher'        the directory of a stage of another run
'teacher@slow'             an average that the stage keeps, of either
'hf:/models/Qwen3-8B'      a directory of a Hugging Face model: config.json, model.safetensors
'gguf:SmolLM2.gguf'        a GGUF file
'qwen'                     an entry of the recipe's `pretrained`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd import files
from kd.errors import UserError, did_you_mean

# Name of the reference, in a stage's `references`, that a stage starts from.
START = 'start'
# Kinds of files that other libraries write.
FOREIGN = ('hf', 'gguf')


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network that others have trained.

    Attributes:
      weights: 'hf:DIRECTORY' or 'gguf:FILE'.
      network: block of the network. Without a `name` it changes the one that the file describes;
        with one, as of a preset, the file may be missing while a recipe is only compiled.
    """

    weights: str
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def block(self) -> Mapping[str, Any]:
        """The network's block."""
        described = {'name': 'kd.io.pretrained.network', 'of': self.weights}
        return self.network if 'name' in self.network else {**described, **self.network}


def is_foreign(reference: str) -> bool:
    """Whether a reference is the file of another library."""
    kind, colon, _ = reference.partition(':')
    return bool(colon) and kind in FOREIGN


def split_foreign(reference: str) -> tuple[str, Path]:
    """('hf' or 'gguf', directory or file) of such a reference.

    Raises:
      UserError: another kind of reference, nothing behind the colon, or an address.
    """
    kind, _, path = reference.partition(':')
    if not is_foreign(reference) or not path:
        raise UserError(
            f"a pretrained network is 'hf:DIRECTORY' or 'gguf:FILE', not '{reference}'."
        )
    return kind, files.local(path, kind).expanduser()


def split_reference(reference: str) -> tuple[str, str]:
    """(stage or directory, 'final' or the name of an average) of 'stage' or 'stage@average'."""
    stage, at, average = reference.rpartition('@')
    if not at or '/' in average or is_foreign(reference):
        return reference, 'final'
    return stage, average


def parse_pretrained(entries: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
    """Refuses entries of a recipe's `pretrained` that lack something or have a stage's name."""
    known = [field.name for field in dataclasses.fields(Pretrained)]
    for name, entry in entries.items():
        where = f'pretrained.{name}'
        if name in stages:
            raise UserError(f"{where} has the name of a stage; references to '{name}' are unclear.")
        if not isinstance(entry, Mapping) or 'weights' not in entry:
            raise UserError(f"{where} must be a block with `weights`, 'hf:DIR' or 'gguf:FILE'.")
        for key in entry:
            if key not in known:
                raise UserError(f"Unknown key '{where}.{key}'.{did_you_mean(key, known)}")
        try:
            split_foreign(entry['weights'])
        except UserError as error:
            raise UserError(f'{where}.weights: {error}') from error
