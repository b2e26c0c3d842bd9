"""Run by a Python that has diffusers: see `diffusion_files.said`."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import safetensors.torch
import torch

folder = Path(sys.argv[1])
config = json.loads((folder / 'config.json').read_text())
model = getattr(diffusers, config['_class_name']).from_config(config)
tensors = safetensors.torch.load_file(folder / 'diffusion_pytorch_model.safetensors')
model.load_state_dict(tensors, strict=True)
model.eval()
inputs, outputs = np.load(folder / 'inputs.npz'), {}
for i, (method, result, names) in enumerate(json.loads((folder / 'calls.json').read_text())):
    arguments = {}
    for name in names:
        value, place = torch.tensor(inputs[f'{i}/{name}']), arguments
        *outer, last = name.split('.')
        for each in outer:
            place = place.setdefault(each, {})
        if last == 'img_shapes':
            value = value.tolist()
        place[last] = value
    for name, value in arguments.items():
        if isinstance(value, dict) and all(map(str.isdigit, value)):
            arguments[name] = list(value.values())
    with torch.no_grad():
        said = getattr(model, method)(**arguments)
    for each in result.split('.'):
        said = getattr(said, each)
    said = torch.stack(said) if isinstance(said, list) else said
    outputs[str(i)] = said.numpy()
np.savez(folder / 'outputs.npz', **outputs)
