"""The dual of a weighting problem: a smooth convex function of one number per row, and its root.

Weights ρ = 1 + s that stay as close to 1 as a penalty Ω measures, subject to a shift of K rows,

    min_s Ω(s)  s.t.  Σ_j q_j A_kj s_j = dμ_k,

with Σ_j q_j s_j = 0 always (the loss divides by the mean weight, so only weights of mean 1 have a
meaning), are q_j s_j = ∂Ω*/∂u_j at u = Aᵀν, where ν ∈ R^K minimizes the dual

    J(ν) = Ω*(Aᵀν) − νᵀ dμ + ½ νᵀ T ν,

whatever the number of columns. The diagonal T ≥ 0 relaxes the constraint to a penalty
½ rᵀ T⁻¹ r on the part r of the shift that is not reached; with T > 0, ν exists and is unique for
every dμ. Columns only enter through sums over them. It is s that is computed, not ρ: a change of
1e-4 added to 1 keeps three digits in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpattern.inversion.spectral import energies, gram, unit_rows, widest

_HIGHEST = jax.lax.Precision.HIGHEST
_MAX_PLAIN_STEPS = 30
_MAX_STEPS = 130
_MAX_HALVINGS = 40
_MAX_BISECTIONS = 100


@runtime_checkable
class Link(Protocol):
    """From the dual field u = Aᵀν to the change of the weights, s = ∇Ω*(u) / q. A pytree."""

    def change(self, field: Array, mass: Array) -> Array:
        """s, with ∂Ω*/∂u_j = q_j s_j."""

    def hessian(self, matrix: Array, field: Array, mass: Array) -> Array:
        """A ∇²Ω*(u) Aᵀ."""


class Box(NamedTuple):
    """Ω = ½ Σ_j q_j s_j² with least ≤ s ≤ most and Σ_j q_j s_j = 0.

    s = clip(u − c, least, most), with c the number that makes the mean of s zero.
    """

    least: Any
    most: Any

    def change(self, field: Array, mass: Array) -> Array:
        shifted = field - self._offset(field, mass)
        bound = jnp.where(shifted <= self.least, self.least, self.most)
        return jnp.where(self._inside(shifted), shifted, bound)

    def hessian(self, matrix: Array, field: Array, mass: Array) -> Array:
        # du − dc on the columns within bounds, with dc the mean of du over them.
        inside = jnp.where(self._inside(field - self._offset(field, mass)), mass, 0.0)
        total = jnp.sum(inside)
        mean = jnp.matmul(matrix, inside, precision=_HIGHEST) / jnp.where(total > 0, total, 1.0)
        return gram(matrix - mean[:, None], inside)

    def _inside(self, shifted: Array) -> Array:
        inside: Array = (shifted > self.least) & (shifted < self.most)
        return inside

    def _offset(self, field: Array, mass: Array) -> Array:
        """c. Its derivative is that of one Newton step from the root, which is the exact one."""
        root = self._root(*jax.lax.stop_gradient((field, mass)))
        mean, inside = self._mean(root, field, mass)
        inside = jax.lax.stop_gradient(inside)
        return root + jnp.where(inside > 0, mean / jnp.where(inside > 0, inside, 1.0), 0.0)

    def _mean(self, offset: Array, field: Array, mass: Array) -> tuple[Array, Array]:
        """Σ q clip(u − c), which falls in c, and the mass of the columns within bounds."""
        shifted = field - offset
        inside = self._inside(shifted)
        bound = jnp.where(shifted <= self.least, self.least, self.most)
        change = jnp.where(inside, shifted, bound)
        counted = jnp.where(mass > 0, mass * jnp.where(mass > 0, change, 0.0), 0.0)
        return jnp.sum(counted), jnp.sum(jnp.where(inside, mass, 0.0))

    def _root(self, field: Array, mass: Array) -> Array:
        """Newton steps on a piecewise linear function, bisection where one leaves the bracket."""
        box = jax.lax.stop_gradient(self)
        eps = jnp.finfo(field.dtype).eps
        used = mass > 0
        low = jnp.min(jnp.where(used, field, jnp.inf))
        high = jnp.max(jnp.where(used, field, -jnp.inf))
        # As least ≤ 0 ≤ most, the mean is ≥ 0 at the smallest u and ≤ 0 at the largest.
        start = jnp.clip(jnp.sum(mass * field) / jnp.sum(mass), low, high)

        def unfinished(state: tuple[Array, ...]) -> Array:
            low, high, _, mean, step = state
            wide = high - low > 4 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
            return wide & (mean != 0) & (step < _MAX_BISECTIONS)

        def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
            low, high, offset, mean, step = state
            low = jnp.where(mean >= 0, offset, low)
            high = jnp.where(mean <= 0, offset, high)
            _, inside = box._mean(offset, field, mass)
            newton = offset + mean / jnp.where(inside > 0, inside, 1.0)
            good = (inside > 0) & (newton > low) & (newton < high) & (step % 3 < 2)
            offset = jnp.where(good, newton, low + (high - low) / 2)
            return low, high, offset, box._mean(offset, field, mass)[0], step + 1

        first = (low, high, start, box._mean(start, field, mass)[0], jnp.zeros((), jnp.int32))
        final: tuple[Array, ...] = jax.lax.while_loop(unfinished, narrow, first)
        return final[2]


class Entropic(NamedTuple):
    """Ω = Σ_j q_j ρ_j log ρ_j with Σ_j q_j s_j = 0: ρ_j = exp(u_j) / Σ_i q_i exp(u_i)."""

    def change(self, field: Array, mass: Array) -> Array:
        change: Array = jnp.expm1(_log_weights(field, mass))
        return change

    def hessian(self, matrix: Array, field: Array, mass: Array) -> Array:
        share = mass * jnp.exp(_log_weights(field, mass))
        mean = jnp.matmul(matrix, share, precision=_HIGHEST)
        return gram(matrix - mean[:, None], share)


class DualProblem(NamedTuple):
    """What J is made of.

    Attributes:
        link: Ω*.
        matrix: A.
        mass: q.
        shift: dμ.
        ridge: diagonal of T, positive.
    """

    link: Any
    matrix: Float[Array, "rows columns"]
    mass: Float[Array, " columns"]
    shift: Float[Array, " rows"]
    ridge: Float[Array, " rows"]


class Iterate(NamedTuple):
    """A point ν of the Newton iteration.

    Attributes:
        dual: ν.
        field: u = Aᵀν.
        miss: A (q ∘ s) − dμ, so that ∇J = miss + T ν.
        relaxation: the share of G's diagonal that T is raised to; 0 in plain steps.
        step: Newton steps so far.
        stalled: whether rounding leaves no more to gain.
    """

    dual: Float[Array, " rows"]
    field: Float[Array, " columns"]
    miss: Float[Array, " rows"]
    relaxation: Float[Array, ""]
    step: Int[Array, ""]
    stalled: Bool[Array, ""]


@jax.custom_jvp
def dual_root(problem: DualProblem) -> tuple[Float[Array, " rows"], Bool[Array, ""]]:
    """The minimizer ν of J by damped Newton steps, and whether ∇J vanishes there up to rounding.

    Each step costs one K×K Gram matrix; the line search runs on u and its direction alone. Rows
    are brought to unit length where sizes are compared, so their units do not matter.

    Where dμ is out of reach, ν is of size 1/T, and on that scale J has kinks, among which plain
    steps may lose their way. The iteration then starts again with T raised to G's diagonal and
    more, and lowers it tenfold each time ν comes near the minimum.
    """
    unit = unit_rows(energies(problem.matrix, problem.mass))
    eps = float(jnp.finfo(problem.matrix.dtype).eps)
    least_relaxation = jnp.min(unit**2 * problem.ridge)
    start = Iterate(
        dual=jnp.zeros_like(problem.shift),
        field=jnp.zeros_like(problem.mass),
        miss=-problem.shift,
        relaxation=jnp.zeros((), problem.matrix.dtype),
        step=jnp.zeros((), jnp.int32),
        stalled=jnp.zeros((), bool),
    )
    relaxed_start = start._replace(
        relaxation=jnp.maximum(jnp.max(jnp.abs(unit * problem.shift)), 1.0)
    )

    def relaxed(now: Iterate) -> DualProblem:
        return problem._replace(ridge=jnp.maximum(problem.ridge, now.relaxation / unit**2))

    def error(now: Iterate) -> Array:
        return jnp.max(jnp.abs(unit * (now.miss + problem.ridge * now.dual)))

    def scale(now: Iterate) -> Array:
        """The size of the terms that cancel in ∇J."""
        change = problem.link.change(now.field, problem.mass)
        spread = jnp.sqrt(jnp.sum(problem.mass * change**2))
        return jnp.max(jnp.abs(unit * problem.shift)) + spread

    def rounding(now: Iterate) -> Array:
        """The change of ∇J when ν changes by its own rounding error."""
        return eps * jnp.max(jnp.abs(now.dual / unit))

    def small(now: Iterate) -> Array:
        return error(now) <= jnp.sqrt(eps) * scale(now) + rounding(now)

    def unfinished(now: Iterate) -> Array:
        done = error(now) <= 4 * eps * scale(now) + rounding(now)
        return ~done & ~now.stalled & (now.step < _MAX_STEPS)

    def newton(now: Iterate) -> Iterate:
        current = relaxed(now)
        gradient = now.miss + current.ridge * now.dual
        direction = -_damped_inverse(current, now.field, unit, gradient)
        length = _line_search(current, now.dual, now.field, gradient, direction)
        dual = now.dual + length * direction
        field = _field(problem, dual)

        near = (-jnp.sum(gradient * direction) < 1) | (length == 0)
        relaxation = jnp.where(near, now.relaxation / 10, now.relaxation)
        moved = Iterate(dual, field, _miss(problem, field), relaxation, now.step + 1, now.stalled)
        worse = ~(error(moved) < error(now))
        no_gain = (length == 0) | (small(now) & ~(error(moved) < error(now) / 2))
        stalled = (now.relaxation <= least_relaxation) & no_gain
        stalled = stalled | ~jnp.isfinite(error(moved))
        new = _where(stalled & worse, now, moved)._replace(step=moved.step, stalled=stalled)

        lost = (stalled | (new.step >= _MAX_PLAIN_STEPS)) & ~small(new)
        again = lost & (now.relaxation == 0)
        return _where(again, relaxed_start._replace(step=new.step), new)

    final = jax.lax.while_loop(unfinished, newton, start)
    return final.dual, error(final) <= jnp.sqrt(eps) * scale(final) + 8 * rounding(final)


@dual_root.defjvp
def _dual_root_jvp(primals: Any, tangents: Any) -> Any:
    # The root is defined by ∇J(ν; A, q, dμ, T, link) = 0. Its total derivative is
    # ∇²J dν + ∂∇J = 0, with ∂ at fixed ν, so dν = −(∇²J)⁻¹ ∂∇J: one K×K solve, linear in the
    # tangents, hence also right when transposed. No step of the iteration is differentiated.
    (problem,), (direction,) = primals, tangents
    dual, converged = dual_root(problem)
    _, explicit = jax.jvp(lambda p: _gradient(dual, p), (problem,), (direction,))
    field = _field(problem, dual)
    hessian = problem.link.hessian(problem.matrix, field, problem.mass) + jnp.diag(problem.ridge)
    tangent = -solve_positive(hessian, explicit)
    return (dual, converged), (tangent, np.zeros((), dtype=jax.dtypes.float0))


def solve_positive(
    matrix: Float[Array, "rows rows"], vector: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """M⁻¹ v by Cholesky, in the widest float there is, rows scaled to a unit diagonal."""
    unit = widest(jax.lax.stop_gradient(unit_rows(jnp.diag(matrix))))
    scaled = unit[:, None] * widest(matrix) * unit[None, :]
    factor = jax.scipy.linalg.cho_factor(scaled)
    return (unit * jax.scipy.linalg.cho_solve(factor, unit * widest(vector))).astype(vector.dtype)


def _log_weights(field: Array, mass: Array) -> Array:
    """u_j − log Σ_i q_i exp(u_i), exact to first order where all u are small.

    The largest u is taken off first: out of reach u may be 1e6, and a logarithm added to that and
    taken off again loses the mean of the weights.
    """
    used = mass > 0
    top = jax.lax.stop_gradient(jnp.max(jnp.where(used, field, -jnp.inf)))
    # A column without mass is no part of the sums, and must not overflow.
    below = jnp.where(used, field - top, 0.0)
    excess = jnp.sum(mass * jnp.expm1(below))
    small = excess > -0.5
    total = jnp.sum(mass * jnp.exp(below))
    log_mean = jnp.where(
        small, jnp.log1p(jnp.where(small, excess, 0.0)), jnp.log(jnp.where(small, 1.0, total))
    )
    return below - log_mean


def _field(problem: DualProblem, dual: Array) -> Array:
    """u = Aᵀν."""
    return jnp.matmul(dual, problem.matrix, precision=_HIGHEST)


def _where(condition: Array, one: Iterate, other: Iterate) -> Iterate:
    """One point or the other."""
    return Iterate(*(jnp.where(condition, a, b) for a, b in zip(one, other, strict=True)))


def _miss(problem: DualProblem, field: Array) -> Array:
    """A (q ∘ s) − dμ."""
    change = problem.link.change(field, problem.mass)
    return jnp.matmul(problem.matrix, problem.mass * change, precision=_HIGHEST) - problem.shift


def _gradient(dual: Array, problem: DualProblem) -> Array:
    """∇J = A (q ∘ s) − dμ + T ν."""
    return _miss(problem, _field(problem, dual)) + problem.ridge * dual


def _damped_inverse(problem: DualProblem, field: Array, unit: Array, gradient: Array) -> Array:
    """(∇²J)⁻¹ ∇J by eigenvalues, each raised to at least what rounding leaves of it."""
    hessian = problem.link.hessian(problem.matrix, field, problem.mass)
    hessian = widest(hessian + jnp.diag(problem.ridge))
    values, vectors = jnp.linalg.eigh(widest(unit[:, None] * unit[None, :]) * hessian)
    eps = jnp.finfo(field.dtype).eps
    values = jnp.maximum(values, jnp.maximum(eps * values[-1], jnp.finfo(field.dtype).tiny))
    inner = jnp.matmul(vectors.T, widest(unit * gradient), precision=_HIGHEST) / values
    return unit * jnp.matmul(vectors, inner, precision=_HIGHEST).astype(field.dtype)


def _line_search(
    problem: DualProblem, dual: Array, field: Array, gradient: Array, direction: Array
) -> Array:
    """The largest step t of 1, ½, ¼ … along which J surely falls; 0 where none is left.

    Near the minimum J falls by less than its own rounding error, so its slope is asked instead.
    J is convex and its slope J' along the direction monotone, hence
    J(t) − J(0) ≤ (t/2) (J'(t/2) + J'(t)), and the fall is sufficient where that is ≤ 0.05 t J'(0).
    """
    link, matrix, mass, shift, ridge = problem
    field_step = jnp.matmul(direction, matrix, precision=_HIGHEST)
    offset = jnp.sum(shift * direction)
    enough = 0.1 * jnp.sum(gradient * direction)

    def slope(step: Array) -> Array:
        change = link.change(field + step * field_step, mass)
        pull = jnp.sum(ridge * (dual + step * direction) * direction)
        return jnp.sum(mass * change * field_step) - offset + pull

    def too_long(state: tuple[Array, Array]) -> Array:
        step, halvings = state
        return (slope(step / 2) + slope(step) > enough) & (halvings < _MAX_HALVINGS)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] / 2, state[1] + 1

    start = (jnp.ones((), matrix.dtype), jnp.zeros((), jnp.int32))
    step, halvings = jax.lax.while_loop(too_long, halve, start)
    return jnp.where(halvings < _MAX_HALVINGS, step, 0.0)
