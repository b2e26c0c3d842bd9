"""Run by a Python that has diffusers: see `diffusion_files.said`."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch

folder = Path(sys.argv[1])
kind = json.loads((folder / 'config.json').read_text())['_class_name']
model, info = getattr(diffusers, kind).from_pretrained(
    folder, output_loading_info=True, low_cpu_mem_usage=False
)
wrong = {name: names for name, names in info.items() if names}
if wrong:
    raise SystemExit(f'{kind}: {wrong}')
model.eval()
inputs, outputs = np.load(folder / 'inputs.npz'), {}
for i, (method, result, names) in enumerate(json.loads((folder / 'calls.json').read_text())):
    arguments = {}
    for name in names:
        value, place = torch.tensor(inputs[f'{i}/{name}']), arguments
        *outer, last = name.split('.')
        for each in outer:
            place = place.setdefault(each, {})
        place[last.lstrip('*')] = [value] if last.startswith('*') else value
    with torch.no_grad():
        said = getattr(model, method)(**arguments)
    for each in result.split('.'):
        said = getattr(said, each)
    outputs[str(i)] = said.numpy()
np.savez(folder / 'outputs.npz', **outputs)
