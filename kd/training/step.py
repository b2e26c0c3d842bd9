"""What a stage compiles: its step and its initial state; and a trace of them, to find mistakes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kd import metrics as metrics_lib
from kd.config import Recipe
from kd.context import Evaluator, Probe
from kd.data import catalogue
from kd.errors import UserError, did_you_mean, one_line
from kd.parallel import layout
from kd.state import State
from kd.training.stage import Stage, prepare, replicated


def make_train_step(stage: Stage) -> Callable[..., tuple[State, Any]]:
    """`train_step(state, frozen, window, batch) -> (state, window)`, jitted.

    `state` has no frozen trees and is donated, as is `window`, the sum of the metrics since they
    were last written.
    """
    abstract = stage.abstract_state()
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    trained = shardings.replace(frozen={})
    everywhere = replicated(stage.mesh)

    def train_step(state, frozen, window, batch):
        with layout.inside(stage.mesh):
            state, metrics = stage.method.step(state.replace(frozen=frozen), batch)
        return state.replace(frozen={}), metrics_lib.merge(window, metrics)

    return jax.jit(
        train_step,
        donate_argnums=(0, 2),
        in_shardings=(trained, shardings.frozen, everywhere, stage.batch_sharding()),
        out_shardings=(trained, everywhere),
    )


def abstract_arguments(stage: Stage) -> tuple[State, Any, Any, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and shardings of the arguments of the train step, for ahead-of-time compilation."""
    state, spec = stage.abstract_state(), dict(stage.context.spec)
    if stage.config.poisson:
        spec['mask'] = jax.ShapeDtypeStruct((), bool)
    batch = {
        name: jax.ShapeDtypeStruct(
            (stage.config.batch_size, *x.shape), x.dtype, sharding=stage.batch_sharding()
        )
        for name, x in spec.items()
    }
    metrics = jax.eval_shape(stage.method.step, state, batch)[1]
    window = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(stage.mesh)), metrics
    )
    return state.replace(frozen={}), state.frozen, window, batch


def initial_state(stage: Stage) -> State:
    """The state at step 0, computed on the mesh; its `frozen` is left empty."""
    return make_init(stage)(stage.key())


def make_init(stage: Stage) -> Callable[[jax.Array], State]:
    """`init(key)`, the state at step 0, jitted."""
    shardings = jax.tree.map(lambda x: x.sharding, stage.abstract_state().replace(frozen={}))

    def init(key, frozen):
        return stage.method.init(key, frozen).replace(frozen={})

    # Initialisation runs once: on CPU, where compiling it well takes longer than running it badly,
    # it is compiled badly.
    on_cpu = stage.mesh.devices.flat[0].platform == 'cpu'
    options = {'xla_backend_optimization_level': '0'} if on_cpu else None
    compiled = jax.jit(init, out_shardings=shardings, compiler_options=options)
    return lambda key: compiled(key, stage.frozen)


def zeros(abstract: Any) -> Any:
    """An empty metric window."""
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)


def check(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> None:
    """Traces a stage's step and evaluators, computing nothing: what is wrong shows at once."""
    stage = prepare(recipe, name, mesh)
    for split in (*stage.context.splits, *(split for split, _ in stage.evaluators.values())):
        stage.context.source(split)
    stage.batches()  # Raises where a batch does not fit the data.
    for found in stage.trained.values():
        # Those of this run may still be to come; where data are only described, nothing is read.
        if found.recipe is not recipe and recipe.data_dir != catalogue.DESCRIBED:
            found.verify()
    with _tracing(stage, f'the step of {stage.config.method["name"]}'):
        state, frozen, window, batch = abstract_arguments(stage)
    metrics = {'train': list(window)}
    batch['mask'] = jax.ShapeDtypeStruct((stage.config.batch_size,), bool)
    for label, (_, evaluator) in stage.evaluators.items():
        if not isinstance(evaluator, Probe):
            with _tracing(stage, f'the evaluator {label}'):
                sums = jax.eval_shape(evaluator.update, state.replace(frozen=frozen), batch)
            metrics[label] = _metrics_of(evaluator, sums)
    _check_best(stage, metrics)


@contextlib.contextmanager
def _tracing(stage: Stage, what: str) -> Iterator[None]:
    """Says in one line what of a stage fails, in whose code, and which field its data lack."""
    try:
        with one_line(f'{stage.name}: {what} fails'):
            yield
    except UserError as error:
        # Some are raised far from what knows the stage.
        if str(error).startswith(stage.name):
            raise
        raise UserError(f'{stage.name}: {error}') from error
    except KeyError as error:
        if error.args[0] in stage.context.spec:
            raise
        raise UserError(
            f'{stage.name}: {what} asks for {error.args[0]!r}, and the data have only '
            f'{", ".join(stage.context.spec)}.'
        ) from error


def _check_best(stage: Stage, metrics: Mapping[str, list[str]]) -> None:
    """Refuses a metric to go by that none of `metrics` is; what probes measure is not known."""
    of, _, metric = stage.config.best.lstrip('-').partition('/')
    if metrics.get(of) and metric not in metrics[of]:
        raise UserError(
            f"{stage.name}.best='{stage.config.best}': '{of}' has no metric '{metric}'."
            f'{did_you_mean(metric, metrics[of])} It has: {", ".join(metrics[of])}.'
        )


def _metrics_of(evaluator: Evaluator, sums: Any) -> list[str]:
    """Names of an evaluator's metrics; none if they cannot be had of sums that are all 1."""
    with np.errstate(all='ignore'), contextlib.suppress(ArithmeticError, ValueError):
        return list(evaluator.finish(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sums)))
    return []
