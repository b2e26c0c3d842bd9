"""What a trained network says of a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kd.data import pipeline, sources
from kd.network import Network
from kd.parallel import mesh as mesh_lib


def logits_of(
    network: Network, source: sources.Source, batch_size: int, mesh: Mesh
) -> Callable[[Any], np.ndarray]:
    """`of(variables)`: float32 [N, V] over the whole split, in its order."""
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    size = -(-min(batch_size, len(source)) // ways) * ways
    apply = jax.jit(lambda variables, *inputs: network.apply(variables, *inputs).logits)

    def of(variables: Any) -> np.ndarray:
        outputs = []
        for batch in pipeline.eval_batches(source, size):
            inputs = {name: batch[name] for name in network.fields}
            inputs = mesh_lib.put_batch(inputs, mesh_lib.batch_sharding(mesh))
            outputs.append(np.asarray(apply(variables, *network.of(inputs)))[batch['mask']])
        return np.concatenate(outputs)

    return of
