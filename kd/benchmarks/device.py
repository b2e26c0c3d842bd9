"""What a GPU makes of large sizes within minutes; `launch/device_check.sh` installs and runs it.

    python -m kd.benchmarks.device [--tiny]

| check | |
|---|---|
| fused divergence, 8,192 tokens x 128k bfloat16 | time and memory over the dense form |
| decoder of 1B: decoding, and a distillation step | share of the roofline |
| DMD cycle of five critic moves, flow-map step, UNet | share of the roofline |
| training loop | its speed over that of the bare step |
| resume | whether a stage that was cut off ends with the same bits |

Rooflines are measured in the same run: the rate of a large matrix product in bfloat16 and that of a
copy. The least time of a program is the larger of its operations (`kd.aot.hlo.flops`) over the one
and the bytes of its arguments and results over the other; a share is the least time over that
measured. A check that fails says why, and the next one begins.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import process
from kd.aot import hlo
from kd.benchmarks import distillation_cycle, flow_map, fused_divergence, loop
from kd.claims import seeds
from kd.errors import Preempted
from kd.io import checkpoints
from kd.losses import schedule
from kd.methods.lm.distillation import distillation
from kd.models.decoder import Decoder
from kd.models.decoders import preset
from kd.models.denoiser import Denoised
from kd.models.unet import UNet
from kd.models.unet_conditional import UNetConditional
from kd.network import from_linen
from kd.parallel import mesh as mesh_lib
from kd.sampling.autoregressive import sampler
from kd.training.loop import Loop
from kd.training.stage import prepare

ROUNDS = 5


class Sizes(NamedTuple):
    """How large the checks are.

    Attributes:
      fused: tokens, vocabulary and width.
      decoder: of decoding, and teacher and student of a step.
      rows, prompt, new: of decoding.
      batch, length: of a step, in rows and tokens.
      unet: of the DMD cycle, whose text has as many channels as its `context`.
      pixels, images: of the DMD cycle.
      flow_unet, flow_pixels, flow_images: of the flow-map step.
      loop_ms: lengths of a step at which the loop is measured; seconds for each.
      steps: of the stage that is cut off.
      product: side of the matrices of the roofline.
    """

    fused: tuple[int, int, int]
    decoder: Decoder
    rows: int
    prompt: int
    new: int
    batch: int
    length: int
    unet: UNetConditional
    pixels: int
    images: int
    flow_unet: UNet
    flow_pixels: int
    flow_images: int
    loop_ms: tuple[float, ...]
    loop_s: float
    steps: int
    product: int


_HALF: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
FULL = Sizes(
    fused=(8192, 128_256, 2048),
    decoder=preset('llama3_2_1b', **_HALF), rows=32, prompt=128, new=128, batch=8, length=1024,
    unet=UNetConditional(
        channels=(128, 256, 512), blocks=2, depths=(0, 1, 1), heads=(4, 8, 8), context=768,
    ),
    pixels=64, images=8,
    flow_unet=UNet(channels=128, multipliers=(1, 2, 2), blocks=2, attention=(16,)),
    flow_pixels=32, flow_images=256,
    loop_ms=(2.0, 25.0), loop_s=2.0, steps=200, product=8192,
)  # fmt: skip
TINY = Sizes(
    fused=(32, 64, 16),
    decoder=Decoder(
        num_classes=64, width=16, depth=1, heads=2, kv_heads=1, mlp_hidden=24, **_HALF
    ),
    rows=2, prompt=4, new=4, batch=2, length=8,
    unet=UNetConditional(
        channels=(16, 16), blocks=1, depths=(0, 1), heads=(2, 2), context=8, groups=4
    ),
    pixels=4, images=2,
    flow_unet=UNet(channels=8, multipliers=(1,), blocks=1, attention=()),
    flow_pixels=4, flow_images=8,
    loop_ms=(0.01,), loop_s=0.001, steps=4, product=64,
)  # fmt: skip


class Roofline(NamedTuple):
    """Of a device: operations and bytes a second, as measured."""

    operations: float
    bandwidth: float

    def least(self, operations: float, moved: float) -> float:
        """Seconds that a program takes at least."""
        return max(operations / self.operations, moved / self.bandwidth)


def seconds(work: Callable[[], Any]) -> float:
    """The median of some calls, after one that warms up."""
    took = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(work())
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def roofline(side: int) -> Roofline:
    """Of the first device, by products of matrices [side, side] and a sum over 16 of them."""
    x = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    wide = jnp.ones((16, side, side), jnp.bfloat16)
    raised = jax.jit(lambda a: a + 1)
    return Roofline(
        2 * side**3 / seconds(lambda: product(x, x)),
        2 * wide.nbytes / seconds(lambda: raised(wide)),
    )


def _size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, 'nbytes'))


def _of_least(took: float, least: float) -> str:
    return f'{1000 * took:.2f} ms | {100 * least / took:.3g} % of the roofline'


def fused(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """The divergence of hidden states over that of logits."""
    tokens, vocabulary, width = sizes.fused
    chunk, size = min(256, tokens), (tokens, vocabulary, width, 'bfloat16')
    held = fused_divergence.measure_memory('forward_kl', chunk, *size)
    took = fused_divergence.measure_time('forward_kl', chunk, ROUNDS, *size)
    work = f'fused divergence, {tokens:,} x {vocabulary:,}, bfloat16'
    for form in (fused_divergence.FUSED, fused_divergence.MASKED):
        ratio = held[form] / held[fused_divergence.DENSE]
        yield f'{work}: {form}, memory | {held[form]:,.1f} MiB | {ratio:.3f} of dense'
        ratio = took[form] / took[fused_divergence.DENSE]
        yield f'{work}: {form}, time | {1000 * took[form]:.2f} ms | {ratio:.3f} of dense'


def decoding(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """Greedy answers of a decoder: each token reads all weights."""
    module = sizes.decoder
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    draw = jax.jit(sampler(module, max_new=sizes.new, temperature=0.0))
    prompts = jnp.ones((sizes.rows, sizes.prompt), jnp.int32)
    mask = jnp.ones(prompts.shape, bool)
    took = seconds(lambda: draw(variables, prompts, mask, jax.random.key(0)))
    weights = _size(variables)
    numbers = sum(x.size for x in jax.tree.leaves(variables))
    token = of.least(2 * numbers * sizes.rows, weights)
    least = of.least(2 * numbers * prompts.size, weights) + sizes.new * token
    work = f'decoding, {numbers / 1e9:.2f}B, {sizes.rows} x {sizes.new} after {sizes.prompt}'
    yield f'{work}, {sizes.rows * sizes.new / took:,.0f} tokens a second | {_of_least(took, least)}'


def distilling(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """A step of distillation of one decoder from another of its size."""
    shape = (sizes.length,)
    spec = {'input': jax.ShapeDtypeStruct(shape, jnp.int32)}
    spec['response_mask'] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    network = from_linen(sizes.decoder, jax.ShapeDtypeStruct((1, *shape), jnp.int32))
    context = seeds.context(
        network=network, teacher=network, spec=spec, steps=10**6, batch_size=sizes.batch,
        optimizer=dict(name='adamw', lr=1e-5),
    )  # fmt: skip
    method = distillation(context)
    state = jax.jit(method.init)(jax.random.key(1), {'teacher': network.init(jax.random.key(0))})
    rows = np.random.default_rng(0).integers(0, sizes.decoder.num_classes, (sizes.batch, *shape))
    mask = jnp.ones(rows.shape, bool)
    yield _step(
        f'distillation step, {sizes.batch} x {sizes.length} tokens',
        method.step, state, {'input': jnp.asarray(rows, jnp.int32), 'response_mask': mask}, of,
    )  # fmt: skip


def _step(work: str, step: Callable[..., Any], state: Any, batch: Any, of: Roofline) -> str:
    """The row of a step that donates its state."""
    operations = hlo.flops(step, state, batch)
    # Weights and moments are read and written.
    least = of.least(operations, 2 * _size(state) + _size(batch))
    run, held = jax.jit(step, donate_argnums=0), [state]

    def once() -> Any:
        held[0], metrics = run(held[0], batch)
        return metrics

    return f'{work} | {_of_least(seconds(once), least)}'


def dmd_cycle(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """A cycle of DMD2 with five moves of its critic, of a UNet that reads text."""
    case = distillation_cycle.Case(
        Denoised(sizes.unet, schedule.discrete(), 'eps'), (sizes.pixels, sizes.pixels, 4),
        sizes.images, 999.0, {'text': (8, sizes.unet.context)}, unroll=True,
    )  # fmt: skip
    made = distillation_cycle.cycle(case, 5)
    work = f'DMD cycle, UNet, {sizes.images} x {sizes.pixels} pixels'
    yield _step(work, made.method.step, made.state, made.batch, of)


def flow_step(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """A step of Lagrangian self-distillation."""
    shape = (sizes.flow_pixels, sizes.flow_pixels, 3)
    step = flow_map.make_step('lsd', sizes.flow_unet, shape, sizes.flow_images)
    took = seconds(lambda: step.run(0))
    work = f'flow-map step (lsd), UNet, {sizes.flow_images} x {sizes.flow_pixels} pixels'
    yield f'{work} | {_of_least(took, of.least(step.flops, 0.0))}'


def looped(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """The training loop over the bare step."""
    for milliseconds in sizes.loop_ms:
        steps = max(int(1000 * sizes.loop_s / milliseconds), 2)
        row = loop.measure(milliseconds, 3, steps)
        told = f'{row["bare_ms"]:.2f} ms a step | {row["ratio"]:.3f} of the speed of the bare step'
        yield f'loop, steps of {milliseconds:g} ms | {told}'


def resumed(sizes: Sizes, of: Roofline) -> Iterator[str]:
    """A stage that is cut off half-way, and one that is not."""
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for cut in (False, True):
            directory = Path(folder) / str(cut)
            directory.mkdir()
            ends.append(_trained(sizes.steps, directory, cut))
    leaves = zip(*map(jax.tree.leaves, ends), strict=True)
    same = all(np.array_equal(a, b) for a, b in leaves)
    yield (
        f'{sizes.steps} steps, cut off after {sizes.steps // 2} | resumed | '
        f'{"bit-identical" if same else "NOT bit-identical"}'
    )


def _trained(steps: int, directory: Path, cut: bool) -> Any:
    """Parameters and moments after the last step, on the host."""
    seen, half = [0], steps // 2

    def stop() -> bool:
        seen[0] += 1
        return cut and seen[0] == half

    while True:
        stage = prepare(loop.recipe(64, steps), 'student', mesh_lib.make_mesh({'data': 1}))
        saved = checkpoints.Checkpoints(directory)
        running = Loop(stage, saved, directory, stop)
        try:
            running.run()
        except Preempted:
            continue
        finally:
            saved.close()
        return jax.device_get((running.state.params, running.state.opt_state))


CHECKS = (fused, decoding, distilling, dmd_cycle, flow_step, looped, resumed)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a check fails or bits differ."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.benchmarks.device', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--tiny', action='store_true', help='sizes for a CPU, to try the checks')
    sizes = TINY if parser.parse_args(argv).tiny else FULL
    device = jax.devices()[0]
    of = roofline(sizes.product)
    print(
        f'{device.device_kind}, jax {jax.__version__}; roofline: {of.operations / 1e12:.3g} '
        f'TFLOP/s in bfloat16, {of.bandwidth / 1e9:.3g} GB/s.\n\n'
        '| check | measured | |\n|---|---:|---|',
        flush=True,
    )
    failed = False
    for check in CHECKS:
        try:
            for line in check(sizes, of):
                print(f'| {line} |', flush=True)
                failed |= 'NOT' in line
        except Exception as error:
            failed = True
            print(
                f'| {check.__name__} | failed | {type(error).__name__}: {_first(error)} |',
                flush=True,
            )
    return int(failed)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [''])[0][:200]


if __name__ == '__main__':
    process.command(main)
