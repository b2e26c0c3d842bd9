"""Adapters as PEFT writes them: adapter_model.safetensors and adapter_config.json.

    python -m kd.export runs/mine/tuned adapters
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(...), 'adapters')

The names are PEFT's: `base_model.model.` and the name of the module in transformers, then
`.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd import files
from kd.errors import UserError
from kd.io import decoder_names, hf_decoders, safetensors
from kd.io.torch_weights import Part
from kd.models import adapters
from kd.models.decoder import Decoder
from kd.state import path_name

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
PREFIX = 'base_model.model.'


def export(
    decoder: Decoder, variables: Mapping[str, Any], directory: Path, *, base: str = ''
) -> dict[str, int]:
    """Writes the adapters of a decoder; what is there under the same names is replaced.

    Args:
      decoder: with its `adapter`.
      variables: {'params': the adapters alone, or all}.
      directory: made if it is not there.
      base: where PEFT finds the base, for `base_model_name_or_path`.

    Returns:
      {file: bytes of its tensors}.

    Raises:
      UserError: a decoder without adapters, one that transformers does not have, adapters of
        matrices that transformers keeps in one, or a directory that cannot be written.
    """
    adapter = adapters.adapter_of(decoder)
    own = adapters.own(variables['params'])
    if adapter is None or not own:
        raise UserError('the network has no adapters; export it whole.')
    tensors = dict(_named(decoder, own))
    modules = {name.removeprefix(PREFIX).rsplit('.', 2)[0] for name in tensors}
    short = {name.rpartition('.')[2] for name in modules}
    # A short name is that of a module in every block.
    everywhere = len(modules) == len(short) * decoder.depth
    kind = hf_decoders.config(decoder)['model_type']
    config = dict(
        peft_type='LORA',
        task_type='CAUSAL_LM',
        base_model_name_or_path=base or None,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(short if everywhere else modules),
        lora_dropout=0.0,
        bias='none',
        # Whether the base keeps kernels as [in, out].
        fan_in_fan_out=decoder_names.HF[kind].kept,
        use_rslora=False,
        use_dora=False,
        inference_mode=True,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        safetensors.save(directory / WEIGHTS, tensors, {'format': 'pt'})
        files.write_json(directory / CONFIG, config)
    except OSError as error:
        raise UserError(f'{directory} cannot be written: {error}.') from error
    return {WEIGHTS: sum(x.nbytes for x in tensors.values())}


def _named(decoder: Decoder, own: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Each factor by its name in the file, as PyTorch has it, [out, in]."""
    kind = hf_decoders.config(decoder)['model_type']
    find = decoder_names.find(decoder, decoder_names.HF[kind], 'transformers')
    for path, leaf in jax.tree_util.tree_flatten_with_path(own)[0]:
        *keys, factor = path_name(path).split('/')
        found = find((*keys, 'kernel'), leaf.shape)
        parts = (found,) if isinstance(found, Part) else found
        layers = [leaf] if isinstance(found, Part) else leaf
        for part, x in zip(parts, layers, strict=True):
            if part.rows is not None:
                raise UserError(
                    f"transformers keeps '{'/'.join(keys)}' and others in one matrix, "
                    f"'{part.name}', which can have no adapters for parts of it; merge them into "
                    'the base (--base).'
                )
            module = part.name.removesuffix('.weight')
            torch = {adapters.DOWN: 'lora_A', adapters.UP: 'lora_B'}[factor]
            x = np.ascontiguousarray(np.asarray(jax.device_get(x)).T)
            yield f'{PREFIX}{module}.{torch}.weight', x
