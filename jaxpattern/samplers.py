"""Samplers: functions from a `Posterior` to a blackjax `SamplingAlgorithm`, and their needs.

`sgld`, `sgnht` and `mala` run the kernels of blackjax; the RMSprop-preconditioned SGLD, which
blackjax has not, is written here. Step sizes are ε in the field's convention,
w ← w + (ε/2) ∇log p + √ε ξ; blackjax's is ε/2.

A sampler is a pytree whose leaves are its settings, so that it passes through `jit` without
compiling again for another step size, and can be vmapped over one. A user's own sampler is any
function of the posterior that returns a `SamplingAlgorithm`: with `step(key, state, minibatch) →
state` as the stochastic-gradient kernels of blackjax (bind their step size), or
`step(key, state) → (state, info)` as its MCMC kernels. `make_sampler` lets it say more of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key, PyTree

from jaxpattern.posterior import Posterior, Target
from jaxpattern.pytrees import register_pytree
from jaxpattern.types import Position, SamplingAlgorithm
from jaxpattern.types import import_blackjax as import_blackjax
from jaxpattern.validation import as_pytree_function, check_number, is_concrete

Noise = Literal["flat", "leaf"]


@register_pytree
@dataclass(frozen=True, eq=False)
class Sampler:
    """A function from a posterior to a `SamplingAlgorithm`, and what it needs.

    Attributes:
        algorithm: the function; its bound settings are leaves.
        needs_minibatch: whether `step` takes (key, state, minibatch) and returns a state, or
            (key, state) and returns (state, info).
        gradients_per_step: loss gradients a step asks the posterior for; None: not known. A chain
            can be differentiated where it is one.
        relaxation_steps: function of posterior and settings that gives the steps in which a chain
            forgets a direction of precision γ by a factor e, or None; itself None: not known. Where
            it has been measured the root mean square of the loss gradient is among the settings,
            as `"gradient"`.
        step_scale: function of state and settings that gives the standard deviation of the random
            part of a step, a number or one for each parameter; None: not known.
        caveat: what is known to be wrong with the law of its chains, in words; results repeat it.
        tempers_noise: whether its friction adapts to the noise of mini-batches, so that they do not
            heat it.
        name: what it is called.
    """

    algorithm: Callable[[Any], SamplingAlgorithm]
    needs_minibatch: bool = field(default=True, metadata={"static": True})
    gradients_per_step: int | None = field(default=None, metadata={"static": True})
    relaxation_steps: Callable[[Posterior, dict[str, Any]], float | None] | None = field(
        default=None, metadata={"static": True}
    )
    step_scale: Callable[[Any, dict[str, Any]], Any] | None = field(
        default=None, metadata={"static": True}
    )
    caveat: str = field(default="", metadata={"static": True})
    tempers_noise: bool = field(default=False, metadata={"static": True})
    name: str = field(default="sampler", metadata={"static": True})

    def __call__(self, posterior: Any) -> Any:
        return self.algorithm(posterior)

    @property
    def settings(self) -> dict[str, Any]:
        """What is bound to the algorithm by name."""
        return dict(getattr(self.algorithm, "keywords", {}))

    def relaxation(self, posterior: Posterior, gradient: float | None = None) -> float | None:
        """Steps in which a chain forgets a flat direction (one of precision γ) by a factor e.

        None where it is not known: another sampler, γ = 0, or settings that are being traced.
        """
        known = all(map(is_concrete, jax.tree.leaves((posterior.localization, self.settings))))
        if self.relaxation_steps is None or not known or float(posterior.localization) == 0:
            return None
        measured = {} if gradient is None else {"gradient": gradient}
        return self.relaxation_steps(posterior, self.settings | measured)

    def __repr__(self) -> str:
        inside = (f"{k}={_show(v)}" for k, v in self.settings.items())
        return f"{self.name}({', '.join(inside)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sampler):
            return False
        if jax.tree.structure(self) != jax.tree.structure(other):  # type: ignore[operator]
            return False
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return all(a is b or bool(np.array_equal(a, b)) for a, b in pairs)

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))


def make_sampler(
    algorithm: Callable[[Target], SamplingAlgorithm],
    *,
    needs_minibatch: bool = True,
    gradients_per_step: int | None = None,
    relaxation_steps: Callable[[Posterior, dict[str, Any]], float | None] | None = None,
    step_scale: Callable[[Any, dict[str, Any]], Any] | None = None,
    name: str | None = None,
) -> Sampler:
    """A sampler from a function of the posterior that returns a `SamplingAlgorithm`.

    Args:
        algorithm: the function; a `jax.tree_util.Partial` of it makes its settings leaves.
        needs_minibatch, gradients_per_step, relaxation_steps, step_scale: see `Sampler`.
        name: what it is called when printed.
    """
    inner = getattr(algorithm, "func", algorithm)
    return Sampler(
        algorithm=as_pytree_function(algorithm),
        needs_minibatch=needs_minibatch,
        gradients_per_step=gradients_per_step,
        relaxation_steps=relaxation_steps,
        step_scale=step_scale,
        name=name or str(getattr(inner, "__name__", type(inner).__name__)),
    )


def _show(value: Any) -> str:
    if not all(map(is_concrete, jax.tree.leaves(value))):
        return "traced"
    single = np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf"
    return f"{float(value):g}" if single else str(value)


def sgld(*, step_size: float | Float[Array, ""], noise: Noise = "flat") -> Sampler:
    """Stochastic gradient Langevin dynamics, w ← w − (ε/2)[nβ ∇L_B(w) + γ(w − w*)] + √ε ξ.

    On a quadratic of curvature h, with per-sample gradient variance C, batch size m and
    P = nβ h + γ, its stationary variance is P⁻¹ (1 + ε (nβ)² C / 4m) / (1 − εP/4), and it forgets
    as (1 − εP/2)^t.

    Args:
        step_size: ε > 0, in squared units of the parameters.
        noise: `"flat"`: blackjax's kernel, which draws ξ as one vector. `"leaf"`: ξ is drawn array
            by array, where each lies; for parameters that are cut over the mesh axis `model`.

    Returns:
        A sampler.

    References:
        Welling & Teh 2011; Lau et al. 2023, arXiv 2308.12108.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    return Sampler(
        Partial(noise_of(noise, _sgld, _sgld_by_leaf), step_size=step_size),
        gradients_per_step=1,
        relaxation_steps=_overdamped,
        step_scale=_root_step,
        name="sgld",
    )


def _root_step(state: Any, settings: dict[str, Any]) -> Any:
    """√ε."""
    return jnp.sqrt(settings["step_size"])


def _overdamped(posterior: Posterior, settings: dict[str, Any]) -> float:
    """2 / (εγ)."""
    return 2 / (float(settings["step_size"]) * float(posterior.localization))


def noise_of(noise: str, flat: Any, leaf: Any) -> Any:
    """One of two, by how noise is drawn."""
    if noise not in ("flat", "leaf"):
        raise ValueError(f"noise must be 'flat' or 'leaf', got {noise!r}")
    return flat if noise == "flat" else leaf


def _sgld(posterior: Target, *, step_size: Any) -> SamplingAlgorithm:
    blackjax = import_blackjax()
    kernel = blackjax.sgld.build_kernel()
    step_size = _narrow(posterior, step_size)

    def step(key: Key[Array, ""], position: Position, minibatch: Any) -> Position:
        new = kernel(key, position, posterior.grad_estimator, minibatch, step_size / 2)
        return _cast_like(new, position)

    return SamplingAlgorithm(_at_position, step)


def _sgld_by_leaf(posterior: Target, *, step_size: Any) -> SamplingAlgorithm:
    step_size = _narrow(posterior, step_size)

    def step(key: Key[Array, ""], position: Position, minibatch: Any) -> Position:
        drift = posterior.grad_estimator(position, minibatch)

        def move(w: Array, force: Array, xi: Array) -> Array:
            return w + step_size / 2 * force + jnp.sqrt(step_size) * xi

        return jax.tree.map(move, position, drift, noise_by_leaf(key, position))

    return SamplingAlgorithm(_at_position, step)


def _narrow(posterior: Target, setting: Any) -> Array:
    """A setting in the precision of the position: one of float64 would widen what it moves."""
    return jnp.asarray(setting, jnp.result_type(*jax.tree.leaves(posterior.center)))


def _cast_like(new: PyTree[Array], old: PyTree[Array]) -> PyTree[Array]:
    """The new state in the dtypes of the old: with x64, blackjax draws float64 for any position."""
    return jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)


def _at_position(position: Position, rng_key: Key[Array, ""] | None = None) -> Position:
    return position


def noise_by_leaf(key: Key[Array, ""], position: Position) -> Position:
    """ξ ~ N(0, 1), drawn leaf by leaf: a leaf that is sharded gets its noise where it lies."""
    leaves, treedef = jax.tree.flatten(position)
    noise = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, noise)


def noise_flat(key: Key[Array, ""], position: Position) -> Position:
    """ξ ~ N(0, 1) as blackjax draws it, one vector for the whole position: one small program."""
    return _cast_like(import_blackjax().util.generate_gaussian_noise(key, position), position)


def sgnht(
    *,
    step_size: float | Float[Array, ""],
    friction: float | Float[Array, ""] = 1.0,
    noise: Noise = "flat",
) -> Sampler:
    """Stochastic gradient Nosé-Hoover thermostat: momentum with a friction that adapts.

    With h = √(ε/2), so that the gradient moves the parameters by (ε/2) ∇log p as in SGLD:
    w ← w + h p,  p ← (1 − ξh) p + h ∇log p + √(2αh) η,  ξ ← ξ + h (p·p/d − 1).
    The thermostat absorbs mini-batch noise that is the same in all directions. These are explicit
    Euler steps: a direction of precision P is sampled at a temperature of about
    1 + h (P − P̄)/α − αh/2, with P̄ the mean precision, so it needs hP ≪ α ≪ 1/h; `sweep` shows it.

    Args:
        step_size: ε > 0, in squared units of the parameters.
        friction: α > 0, per unit of the time h.
        noise: as in `sgld`.

    Returns:
        A sampler.

    References:
        Ding et al. 2014.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    check_number("friction", friction, minimum=0.0, exclusive=True)
    return Sampler(
        Partial(noise_of(noise, _sgnht, _sgnht_by_leaf), step_size=step_size, friction=friction),
        gradients_per_step=1,
        relaxation_steps=_underdamped,
        step_scale=_momentum_scale,
        tempers_noise=True,
        name="sgnht",
    )


def _momentum_scale(state: Any, settings: dict[str, Any]) -> Any:
    """h = √(ε/2), by which a momentum of variance 1 moves the position."""
    return jnp.sqrt(settings["step_size"] / 2)


def _underdamped(posterior: Posterior, settings: dict[str, Any]) -> float:
    """The slower of momentum and position, in steps h = √(ε/2)."""
    friction = float(settings["friction"])
    time = max(2 / friction, friction / float(posterior.localization))
    return time / float(np.sqrt(float(settings["step_size"]) / 2))


def _sgnht(posterior: Target, *, step_size: Any, friction: Any) -> SamplingAlgorithm:
    blackjax = import_blackjax()
    friction, step_size = _narrow(posterior, friction), _narrow(posterior, step_size)
    kernel = blackjax.sgnht.build_kernel(alpha=friction)

    def init(position: Position, rng_key: Key[Array, ""]) -> Any:
        state = blackjax.sgnht.init(position, rng_key, friction)
        return state._replace(momentum=_cast_like(state.momentum, position))

    def step(key: Key[Array, ""], state: Any, minibatch: Any) -> Any:
        h = jnp.sqrt(step_size / 2)
        return _cast_like(kernel(key, state, posterior.grad_estimator, minibatch, h), state)

    return SamplingAlgorithm(init, step)


def _sgnht_by_leaf(posterior: Target, *, step_size: Any, friction: Any) -> SamplingAlgorithm:
    """The same steps with η and the first momentum drawn leaf by leaf."""
    blackjax = import_blackjax()

    def init(position: Position, rng_key: Key[Array, ""]) -> Any:
        momentum = noise_by_leaf(rng_key, position)
        return blackjax.sgmcmc.sgnht.SGNHTState(position, momentum, jnp.asarray(friction, float))

    def step(key: Key[Array, ""], state: Any, minibatch: Any) -> Any:
        h = jnp.sqrt(step_size / 2)
        keep, scale = 1 - state.xi * h, jnp.sqrt(2 * friction * h)
        force = posterior.grad_estimator(state.position, minibatch)
        position = jax.tree.map(lambda w, p: w + h * p, state.position, state.momentum)
        momentum = jax.tree.map(
            lambda p, g, eta: keep * p + h * g + scale * eta,
            state.momentum,
            force,
            noise_by_leaf(key, state.momentum),
        )
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(momentum))
        dimension = sum(p.size for p in jax.tree.leaves(momentum))
        return type(state)(position, momentum, state.xi + h * (squares / dimension - 1))

    return SamplingAlgorithm(init, step)


def mala(*, step_size: float | Float[Array, ""]) -> Sampler:
    """Metropolis-adjusted Langevin algorithm on all the data: exact, as a check of the others.

    Proposes w + (ε/2) ∇log p + √ε ξ and accepts it by Metropolis-Hastings, so that its
    stationary law has no step bias and no mini-batch temperature.

    Args:
        step_size: ε > 0, in squared units of the parameters.

    Returns:
        A sampler.

    References:
        Roberts & Tweedie 1996.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    return Sampler(Partial(_mala, step_size=step_size), needs_minibatch=False, name="mala")


def _mala(posterior: Posterior, *, step_size: Any) -> SamplingAlgorithm:
    step_size = _narrow(posterior, step_size)
    # With x64 the proposal is float64, and so must be all that is compared with it.
    wide = jnp.promote_types(step_size.dtype, jnp.result_type(float))
    inner = import_blackjax().mala(lambda w: posterior.logdensity(w).astype(wide), step_size / 2)

    def step(key: Key[Array, ""], state: Any) -> tuple[Any, Any]:
        widened = jax.tree.map(lambda x: x.astype(wide), state)
        new, info = inner.step(key, widened)
        return _cast_like(new, state), info

    return SamplingAlgorithm(inner.init, step)
