"""The benchmark of the fused divergence: its memory target, its command and what that reports."""

import json
import subprocess
import sys

from kd.benchmarks import fused_divergence as benchmark


def test_temporary_memory_at_full_size_is_at_most_an_eighth_of_the_dense_form():
    memory = benchmark.measure_memory('forward_kl', 256, 4096, 131072, 1024, 'float32')
    assert memory['dense'] > 3 * 4096 * 131072 * 4 / 2**20  # it does hold whole logits
    assert memory['fused'] <= memory['dense'] / 8


def test_command_prints_both_tables_and_writes_the_ratios_it_is_judged_by(tmp_path):
    sizes = ('--tokens=64', '--vocabulary=512', '--width=16', '--chunk=8', '--rounds=2')
    sizes += ('--time_tokens=32', '--time_vocabulary=64', f'--json={tmp_path / "out.json"}')
    command = [sys.executable, '-m', 'kd.benchmarks.fused_divergence', *sizes]
    run = subprocess.run(command, capture_output=True, text=True)
    record = json.loads((tmp_path / 'out.json').read_text())
    assert record['memory_mib']['dense'] >= 64 * 512 * 4 / 2**20
    for what, unit, digits in (('memory', 'memory_mib', 0), ('time', 'seconds', 3)):
        ratio = record[unit]['fused'] / record[unit]['dense']
        assert record['fused_over_dense'][what] == ratio
        assert f'| fused | {record[unit]["fused"]:.{digits}f} | {ratio:.3f} |' in run.stdout
    ratios = record['fused_over_dense']
    missed = ratios['memory'] > 1 / 8 or ratios['time'] > 1.2
    assert run.returncode == int(missed), run.stderr
