"""χ without sampling: the Laplace approximation, classical influence functions at w*.

With H = ∇²L(w*) and Σ = (nβ H + γ)⁻¹ the localized posterior is taken as N(w*, Σ), and φ and
D_z = ℓ_z − L as quadratics. Then χ_z = −Cov[φ, D_z] with

    Cov[φ, D_z] = ∇φᵀ Σ ∇D_z + ½ tr(∇²φ Σ ∇²D_z Σ) .

At a minimum ∇φ = 0 for a component's excess loss, and the trace is all there is. Σ is applied by
conjugate gradients on Hessian-vector products; the first term is one Jacobian-vector product of
the losses along Σ∇φ, and the trace is Hutchinson's, E_u ⟨ΣAΣu, ∇²D_z u⟩ with A = ∇²φ and u of
random signs, two solves and one second directional derivative of all losses for each u.
A baseline and a cross-check: w* is rarely a minimum, and the posterior rarely Gaussian.
Sources: Koh & Liang 2017 (influence functions); arXiv 2509.26544 (their Bayesian form).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.run import Run
from jaxpattern.diagnostics import Summary
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.response.measure import Estimates, Part, by_component, over_components
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response
from jaxpattern.response.shares import column_mean
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.host import Host
from jaxpattern.types import Position
from jaxpattern.validation import check_count, check_number


@dataclass(frozen=True)
class Laplace:
    """χ without sampling, at w*; made by `laplace`, which says what the settings mean."""

    num_signs: int = 32
    tolerance: float = 1e-4
    max_iterations: int = 100

    def __call__(self, run: Run, problem: Problem, host: Host) -> Response:
        """The response matrix."""
        del host
        _check_forward_mode(run.posterior)

        def measure(group: ComponentGroup) -> Part:
            estimates = _components(self, run, problem.core, group)
            nan = jax.device_put(np.full(len(group.ids) * problem.num_rows, np.nan, "f"))
            mean = np.tile(np.asarray(problem.offsets), len(group.ids))
            summary = Summary(mean=jax.device_put(mean), stderr=nan, rhat=nan, ess=nan)
            return Part(estimates, summary, np.zeros((nan.size, 0), bool))

        solves = problem.num_components * problem.num_rows * (1 + 2 * self.num_signs)
        # An upper bound: solves stop sooner where they converge.
        cost = 3.0 * solves * self.max_iterations * run.posterior.num_samples
        return by_component(run, problem, measure, name="laplace", cost=cost)


def laplace(*, num_signs: int = 32, tolerance: float = 1e-4, max_iterations: int = 100) -> Laplace:
    """χ_z = −∇φᵀ Σ ∇D_z − ½ tr(∇²φ Σ ∇²D_z Σ) at w*, with Σ = (nβ H + γ)⁻¹.

    The sampler is not used, and of the plan only `chunk`. `stderr` is that of the trace alone: the
    error of the approximation itself is not in it. `diagnostics["residual"]`, `[K]`, is the largest
    relative residual of the solves; near or above 1 says that nβ H + γ is not positive definite
    and the numbers mean nothing. ⟨φ⟩ is φ(w*), its error NaN.

    Args:
        num_signs: random sign vectors for the trace, at least 2.
        tolerance: relative residual at which a solve stops.
        max_iterations: Hessian-vector products a solve may take.

    Raises:
        ValueError, TypeError: an argument does not fit, or the loss has no second derivatives by
            forward mode, as with a `custom_vjp` inside.
    """
    check_count("num_signs", num_signs, minimum=2)
    check_count("max_iterations", max_iterations, minimum=1)
    check_number("tolerance", tolerance, minimum=0.0, exclusive=True)

    return Laplace(num_signs, tolerance, max_iterations)


def _check_forward_mode(posterior: Posterior) -> None:
    center = posterior.center
    batch = jax.tree.map(lambda x: x[:1], posterior.data)

    def losses(position: Position) -> Array:
        return posterior.losses(position, batch)

    def slope(position: Position) -> Array:
        return jax.jvp(losses, (position,), (center,))[1]

    try:
        jax.eval_shape(lambda: jax.jvp(slope, (center,), (center,)))
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            "laplace needs second derivatives of the losses by forward mode, and loss_fn does not "
            f"allow it ({str(error).splitlines()[0]}); pathwise() needs gradients alone"
        ) from error


@partial(jax.jit, static_argnums=0)
def _components(settings: Laplace, run: Run, problem: Problem, group: ComponentGroup) -> Estimates:
    """χ of all components, one after the other."""

    def one(component: tuple[Array, Restriction | None]) -> Estimates:
        index, restriction = component
        posterior = run.posterior
        if restriction is not None:
            posterior = replace(posterior, restriction=restriction)
        signs_key = jax.random.fold_in(run.key, index)
        chi, residual = _laplace(posterior, problem, signs_key, settings, run.plan.chunk)
        return _mean(chi, residual, problem.mass)

    ids = jnp.asarray(group.ids, jnp.uint32)
    each = jax.lax.map(one, (ids, group.restrictions))
    return over_components(lambda estimates: estimates, each)


def _laplace(
    posterior: Posterior,
    problem: Problem,
    key: Key[Array, ""],
    settings: Laplace,
    chunk: int | None,
) -> tuple[dict[str, Array], Array]:
    """χ for each vector of signs, `[signs, K, ...]`, and the worst residual of each row."""
    center, num_signs = posterior.center, settings.num_signs

    def precision(v: Position) -> Position:
        """(nβ H + γ) v."""
        product = _hessian_product(posterior, v, chunk)
        return jax.tree.map(
            lambda h, x: posterior.nbeta * h + posterior.localization * x, product, v
        )

    def solve(v: Position) -> tuple[Position, Array]:
        x, _ = jax.scipy.sparse.linalg.cg(
            precision, v, tol=settings.tolerance, maxiter=settings.max_iterations
        )
        left = optax.tree.norm(jax.tree.map(jnp.subtract, precision(x), v))
        return x, left / jnp.maximum(optax.tree.norm(v), 1e-30)

    def columns(position: Position) -> dict[str, Array]:
        return problem.columns(posterior, position)[1]

    def along(v: Position) -> dict[str, Array]:
        return jax.jvp(columns, (center,), (v,))[1]

    def row(k: Array) -> tuple[dict[str, Array], Array]:
        def phi(position: Position) -> Array:
            return problem.phi_at(posterior, position)[k]

        slope = jax.grad(phi)
        direction, residual = solve(slope(center))
        first = along(direction)

        def trace(index: Array) -> tuple[dict[str, Array], Array]:
            signs_key = jax.random.fold_in(key, k * num_signs + index)
            signs = optax.tree.random_like(signs_key, center, jax.random.rademacher)
            inner, r1 = solve(signs)
            bent = jax.jvp(slope, (center,), (inner,))[1]
            outer, r2 = solve(bent)
            second = jax.jvp(lambda w: jax.jvp(columns, (w,), (outer,))[1], (center,), (signs,))[1]
            return second, jnp.maximum(r1, r2)

        second, residuals = jax.lax.map(trace, jnp.arange(num_signs))
        chi = jax.tree.map(lambda f, s: -f[None] - s / 2, first, second)
        return chi, jnp.maximum(residual, residuals.max())

    chi, residual = jax.lax.map(row, jnp.arange(problem.num_rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), chi), residual


def _hessian_product(posterior: Posterior, v: Position, chunk: int | None) -> Position:
    """∇²L(w*) v on all the data, `chunk` samples at a time."""

    def product(minibatch: Minibatch) -> Position:
        gradient = partial(posterior.loss_gradient, minibatch=minibatch)
        return jax.jvp(gradient, (posterior.center,), (v,))[1]

    size = posterior.num_samples
    everything = posterior.minibatch(None, None)
    if chunk is None or chunk >= size:
        return product(everything)
    whole = size // chunk * chunk
    pieces = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), everything)

    def add(total: Position, piece: Minibatch) -> tuple[Position, None]:
        return jax.tree.map(lambda t, p: t + p * (chunk / size), total, product(piece)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, v), pieces)
    if whole == size:
        return total
    rest = product(jax.tree.map(lambda x: x[whole:], everything))
    return jax.tree.map(lambda t, p: t + p * ((size - whole) / size), total, rest)


def _mean(chi: dict[str, Array], residual: Array, mass: dict[str, Array]) -> Estimates:
    """Mean over the sign vectors, and its error."""
    first = next(iter(chi.values()))
    count, half = first.shape[0], first.shape[0] // 2
    return Estimates(
        chi={name: x.mean(axis=0) for name, x in chi.items()},
        stderr={name: x.std(axis=0, ddof=1) / count**0.5 for name, x in chi.items()},
        halves={
            name: jnp.stack([x[:half].mean(axis=0), x[half:].mean(axis=0)])
            for name, x in chi.items()
        },
        batches={name: column_mean(x, mass[name]) for name, x in chi.items()},
        diagnostics={"residual": residual},
    )
