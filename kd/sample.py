"""Samples of a trained generator as a picture.

    python -m kd.sample --run=runs/few_steps/four --seed=0
    python -m kd.sample --run=runs/digits/map --steps=2 --out=digits.png
    python -m kd.sample --run=runs/text/student --steps=8 --samples=4

`--run` is the directory of a finished stage: a generator of few steps, which has its own times and
refuses others unless they are given by --times; a denoiser, a flow or a flow map, which take any
number of --steps; a student of few steps of a flow, which takes its own unless told. With --base,
another stage, the steps of a generator before --switch are made by that denoiser, not guided: more
various samples (arXiv:2503.10637). A generator of videos takes its first --steps for each frame.
Classes go round. Images make a grid, points in the plane a density. A masked diffusion model takes
any number of --steps too, and its texts are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import loading, process
from kd.data.sources import Source
from kd.errors import UserError
from kd.evaluators import generation
from kd.evaluators.masked_text import written
from kd.io import safetensors
from kd.losses.masked_diffusion import schedule
from kd.network import Network
from kd.networks import stage_of
from kd.sampling import causal, diffusion, flow, generator, masked, velocity
from kd.sampling import denoiser as denoisers
from kd.sampling import times as times_lib
from kd.sampling.generator import Generator
from kd.sampling.hybrid import hybrid
from kd.state import PyTree

# Steps of a denoiser, flow or flow map unless said otherwise.
_STEPS = 32

# (variables, label or None, key, shape) -> samples
Draw = Callable[[PyTree, jax.Array | None, jax.Array, tuple[int, ...]], jax.Array]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.sample', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--run', required=True, type=process.path_argument, help='a stage')
    parser.add_argument('--out', type=Path, default=Path('samples.png'))
    parser.add_argument('--samples', type=int, default=64)
    parser.add_argument('--steps', type=int, default=0, help="0: the generator's own, else 32")
    parser.add_argument('--times', default='', help='of a generator, in place of its own: 80,2.5')
    parser.add_argument('--base', type=process.path_argument, help='a stage, for the first steps')
    parser.add_argument('--switch', type=int, default=1, help="the generator's first own step")
    parser.add_argument('--guidance', type=float, default=1.0)
    parser.add_argument('--weights', default='final', help="'final' or the name of an average")
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--columns', type=int, default=8)
    parser.add_argument('--zoom', type=int, default=4)
    arguments = parser.parse_args(argv)
    network, source, block, teacher = load(arguments.run)
    variables = safetensors.stage_variables(arguments.run, arguments.weights)
    if np.issubdtype(source.spec['input'].dtype, np.integer):
        texts = of_text(network, source, block, variables, arguments)
        print('\n'.join(texts))
        return 0
    given = tuple(float(t) for t in arguments.times.split(',')) if arguments.times else ()
    if arguments.base:
        first, _, of_base, _ = load(arguments.base)
        draw = begun(network, block, teacher, first, of_base, arguments.switch)
        variables = {'own': variables, 'base': safetensors.stage_variables(arguments.base)}
    else:
        draw = sampler(
            network, block, teacher, steps=arguments.steps, times=given,
            guidance=arguments.guidance,
        )  # fmt: skip
    classes, shape = denoisers.num_classes(network), source.spec['input'].shape
    count = arguments.samples
    label = None if classes is None else jnp.arange(count) % classes
    key = jax.random.key(arguments.seed)
    found = np.asarray(jax.jit(draw, static_argnums=3)(variables, label, key, (count, *shape)))
    if not np.isfinite(found).all():
        raise UserError(f'{arguments.run} makes samples that are not finite.')
    if shape == (2,):
        page = generation.density_page({arguments.run.name: {'samples': found}})
        page.savefig(arguments.out)
    elif len(shape) == 2 and shape[1] == 2:
        generation.frames_page({arguments.run.name: found}).savefig(arguments.out)
    elif len(shape) == 3 and shape[-1] in (1, 3):
        images = source.to_pixels(found)
        generation.save_image_grid(
            arguments.out, images, columns=arguments.columns, zoom=arguments.zoom
        )
    else:
        raise UserError(f'samples of the shape {shape} are no picture.')
    print(f'{arguments.out}: {count} samples of {arguments.run}')
    return 0


def of_text(
    network: Network,
    source: Source,
    block: Mapping[str, Any],
    variables: PyTree,
    arguments: argparse.Namespace,
) -> list[str]:
    """Texts of a masked diffusion model, see `kd.sampling.masked`.

    Raises:
      UserError: another model of text, or options of pictures.
    """
    try:
        draw = masked.sampler(
            network, block.get('mask'), schedule(block.get('schedule', 'log_linear'))
        )
    except ValueError as error:
        raise UserError(f'{arguments.run}: {error} See python -m kd.generate.') from error
    if arguments.times or arguments.base or arguments.guidance != 1.0:
        raise UserError('--times, --base and --guidance are of pictures; texts have --steps.')
    shape = (arguments.samples, *source.spec['input'].shape)
    key = jax.random.key(arguments.seed)
    found = np.asarray(draw(variables, key, shape, arguments.steps or _STEPS))
    return written(source, found)


def load(directory: Path) -> tuple[Network, Source, Mapping[str, Any], Mapping[str, Any]]:
    """(network, data, block of its method, block of the method of what taught it) of a stage.

    Raises:
      UserError: no finished stage, or none that trains a network.
    """
    found = loading.untrained(directory)
    network, stage, recipe = found.network, found.stage, found.recipe
    source = found.source(found.splits[0])
    teacher: Mapping[str, Any] = {}
    if stage.teacher and recipe.foreign(stage.teacher) is None:
        place = recipe.locate(stage.teacher, directory.parent)
        teacher = stage_of(recipe, stage.teacher, place, directory.name)[0]['method']
    return network, source, stage.method, teacher


def sampler(
    network: Network,
    block: Mapping[str, Any],
    teacher: Mapping[str, Any],
    *,
    steps: int = 0,
    times: tuple[float, ...] = (),
    guidance: float = 1.0,
) -> Draw:
    """Samples of a network by what its method made of it.

    Args:
      network: of the stage.
      block: of its method.
      teacher: of its teacher's method, {} for none.
      steps: see the module.
      times: of a generator, in place of its own.
      guidance: scale of classifier-free guidance, of denoisers and flows.

    Raises:
      UserError: steps or guidance that the generator does not have.
    """
    if causal.is_causal(network):
        return _of_causal(network, block, steps, times, guidance)
    if 'times' in block:
        own = tuple(block['times'])
        if not times and steps not in (0, len(own)):
            raise UserError(
                f'this generator was trained at the times {own}, {len(own)} steps, and has no '
                f'others; leave --steps out, or give --times to ask it elsewhere.'
            )
        if guidance != 1.0:
            raise UserError('this generator was distilled with its guidance; leave it out.')
        made = generator.of_block(
            network, {**block, 'times': times or own}, teacher, where='this generator'
        )
        return lambda v, label, key, shape: made.sample(v, _condition(label), key, shape)
    if times:
        raise UserError('--times are of a generator; this takes any number of --steps.')
    if len(network.inputs) == 3:
        return _of_flow(network, block, steps, guidance)
    return _of_denoiser(network, steps or _STEPS, guidance)


def begun(
    network: Network,
    block: Mapping[str, Any],
    teacher: Mapping[str, Any],
    base: Network,
    of_base: Mapping[str, Any],
    switch: int,
) -> Draw:
    """Samples of a generator, whose steps before `switch` are made by a base.

    Its variables are {'own': those of the generator, 'base': those of the base}.

    Args:
      network, block, teacher: as of `sampler`.
      base: network of a denoiser or a flow, which is asked at the generator's times.
      of_base: block of its method.
      switch: see `kd.sampling.hybrid.Hybrid`.

    Raises:
      UserError: no generator, or no such step.
    """
    if 'times' not in block:
        raise UserError('--base begins for a generator; --run has no times of its own.')
    own = generator.of_block(network, block, teacher, where='this generator')
    first = Generator(denoisers.of_network(base, of_base), own.times, own.step)
    made = hybrid(first, own, switch, where='--base')

    def draw(variables, label, key, shape):
        return made.sample(variables['base'], variables['own'], _condition(label), key, shape)

    return draw


def _of_causal(network, block, steps: int, times: tuple[float, ...], guidance: float) -> Draw:
    if guidance != 1.0 or not ('times' in block or times):
        raise UserError('a causal network takes --times, of a generator its own, and no guidance.')
    step = block.get('step', 'restart')
    own = causal.generator(network, times or block['times'], step, where='this generator')
    if steps > len(own.times):
        raise UserError(f'this generator has {len(own.times)} times; --steps is that or fewer.')

    def draw(variables, label, key, shape):
        noise_key, key = jax.random.split(key)
        blocks = shape[1] // own.causal.frames
        grid = causal.times_of_blocks(own.times, steps or len(own.times), blocks)
        z = jax.random.normal(noise_key, shape)
        return causal.causal_sample(
            own.causal, variables, grid, z, key, _condition(label), step=own.step
        )

    return draw


def _of_flow(network: Network, block: Mapping[str, Any], steps: int, guidance: float) -> Draw:
    solve, grid = _solver_of(block, steps)
    scale = velocity.noise_scale(network, block.get('noise_scale'))

    def draw(variables, label, key, shape):
        vfn = velocity.velocity_function(network, variables, label, guidance=guidance)
        noise = flow.draw_noise(key, shape[0], shape[1:], scale=scale)
        return solve(vfn, noise, grid)

    return draw


def _solver_of(block: Mapping[str, Any], steps: int) -> tuple[Callable[..., jax.Array], np.ndarray]:
    """The sampler of a flow and its times, by the method that has trained it.

    Flow maps jump, and so do segments of momenta. Networks of one time that were distilled go by
    Euler steps, as many as they were made for; what is left is solved by Heun's method.
    """
    name = str(block.get('name', '')).removeprefix('kd.methods.flow.')
    if name == 'arcflow.arcflow':
        grid = flow.time_grid(steps or block.get('segments', 2))
        grid = times_lib.moved(grid, 1 / block.get('shift', 1.0))
        return flow.flow_map_sample, np.minimum(grid, 1.0)
    if name.startswith('flow_map'):
        return flow.flow_map_sample, flow.time_grid(steps or _STEPS)
    own = {
        'hyper_sd.tscd': block.get('phases', 8),
        'mdt_dist.mdt_dist': 1,
        'slimflow.flow_guided_distillation': 1,
    }
    if name in own:
        return flow.euler_sample, flow.time_grid(steps or own[name])
    return flow.heun_sample, flow.time_grid(steps or _STEPS)


def _of_denoiser(network: Network, steps: int, guidance: float) -> Draw:
    own = denoisers.guided(denoisers.of_network(network), guidance)
    path, grid = own.schedule, times_lib.sampling(own.schedule, steps)

    def draw(variables, label, key, shape):
        noise_key, key = jax.random.split(key)
        noise = diffusion.noise(path, noise_key, shape, float(grid[0]))
        denoise = own.bind(variables, _condition(label))
        return diffusion.sample(path, denoise, noise, grid, key, step=diffusion.dpm_pp_2m())

    return draw


def _condition(label: jax.Array | None) -> dict[str, jax.Array]:
    return {} if label is None else {'label': label}


if __name__ == '__main__':
    process.command(main)
