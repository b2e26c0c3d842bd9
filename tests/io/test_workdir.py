"""The table of what a stage trains."""

import jax
import jax.numpy as jnp

from kd.io.workdir import write_overview


def test_what_is_trained_is_told_with_its_places_on_the_mesh(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ('data',))
    rows = jax.NamedSharding(mesh, jax.P('data'))
    params = {'network': {'kernel': jax.device_put(jnp.ones((64, 3)), rows)}}
    write_overview(tmp_path, params)
    table = (tmp_path / 'parameters.txt').read_text()
    line = next(line for line in table.splitlines() if 'network/kernel' in line)
    assert [cell.strip() for cell in line.strip('|').split('|')][1:4] == [
        '(64, 3)',
        'float32',
        '192',
    ]
    assert "'data'" in line
    assert 'Total: 192' in table
