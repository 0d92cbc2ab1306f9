"""The localized Gibbs posterior around trained weights, as a pytree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from jaxpattern import tables
from jaxpattern.losses import (
    check_finite_gradient,
    check_finite_losses,
    check_loss,
    counted_rows,
    first_counted,
    is_counted,
    normalise_weights,
    weighted_mean,
    widen,
)
from jaxpattern.pytrees import register_pytree
from jaxpattern.restriction import Restriction, check_restriction
from jaxpattern.runtime.mesh import take
from jaxpattern.types import Batch, Losses, LossFn, Params, Position, import_blackjax
from jaxpattern.validation import (
    batch_length,
    check_deterministic,
    check_hashable,
    check_number,
    check_params,
    old_name,
)


class Minibatch(NamedTuple):
    """Samples of the data with their normalised weights."""

    batch: Batch
    weights: Float[Array, "samples *tokens"]


@runtime_checkable
class Target(Protocol):
    """What a stochastic-gradient sampler asks of a posterior."""

    @property
    def nbeta(self) -> Any:
        """Inverse temperature."""

    @property
    def localization(self) -> Any:
        """γ."""

    @property
    def center(self) -> Position:
        """The position of w*."""

    def minibatch(self, key: Key[Array, ""], size: int | None) -> Any:
        """What stands for a mini-batch."""

    def loss_gradient(self, position: Position, minibatch: Any) -> Position:
        """An estimate of ∇L(w) from what stands for a mini-batch."""

    def grad_estimator(self, position: Position, minibatch: Any) -> Position:
        """An estimate of ∇ log p(w)."""


@register_pytree
@dataclass(frozen=True, eq=False)
class Posterior:
    """p(w) ∝ exp(−nβ L(w) − γ/2 ‖w − w*‖²), with L(w) = Σ_j ρ_j ℓ_j(w) / Σ_j ρ_j.

    Made by `localized_posterior`; a pytree, so that `vmap` over `nbeta`, `localization`, `params`
    or `weights` works. `dataclasses.replace` changes nβ, γ or w*; `reweight` changes ρ, because
    the field `weights` holds ρ normalised to sum N (the number of samples), which makes
    L = (1/N) Σ_j weights_j ℓ_j and its mini-batch estimate an unbiased plain mean.

    A chain moves a *position*: the weights, or the part a restriction selects, in float32 (or
    wider) whatever the dtype of the parameters, so that small steps are not rounded away. The
    loss sees parameters of the dtypes it was given.

    With `mirror` = −1 a position is minus the weights: any sampler, given the same key, then moves
    the weights by the negative of its noise, while the law it samples stays the same. A chain and
    its mirrored twin are an antithetic pair. Mini-batches of the twins are independent.
    """

    # A stack of posteriors, to be vmapped, has leading axes everywhere.
    params: Params
    data: Batch
    weights: Float[Array, "..."]
    nbeta: Float[Array, "..."] | float
    localization: Float[Array, "..."] | float
    restriction: Restriction | None
    loss_fn: LossFn = field(metadata={"static": True})
    mirror: Float[Array, "..."] | None = None
    # A sample that counts, which stands in for those that are excluded.
    spare: Any = 0

    def __str__(self) -> str:
        return tables.text(tables.posterior, self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(tables.posterior, self)

    @property
    def num_samples(self) -> int:
        """N, the number of samples in the data."""
        return self.weights.shape[0]

    @property
    def center(self) -> Position:
        """The position of w*."""
        return self._reflect(jax.tree.map(widen, self.select(self.params)))

    centre = old_name("centre", "center")

    def embed(self, position: Position) -> Params:
        """The full weights at a position: everything outside the restriction stays at w*."""
        like = self.select(self.params)
        weights = self._reflect(position)
        narrow = jax.tree.map(lambda x, reference: x.astype(reference.dtype), weights, like)
        return narrow if self.restriction is None else self.restriction.embed(narrow, self.params)

    def select(self, params: Params) -> Position:
        """What of the parameters a chain moves, in their own types."""
        return params if self.restriction is None else self.restriction.select(params)

    def _reflect(self, position: Position) -> Position:
        mirror = self.mirror
        if mirror is None:
            return position
        return jax.tree.map(lambda x: x * mirror.astype(x.dtype), position)

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """A key that differs between mirrored twins, for what is drawn beside the noise."""
        if self.mirror is None:
            return key
        return jax.random.fold_in(key, (self.mirror < 0).astype(jnp.uint32))

    def losses(self, position: Position, batch: Batch) -> Losses:
        """ℓ_z(w) of a batch, at least in float32."""
        return widen(self.loss_fn(self.embed(position), batch))

    def loss(self, position: Position, minibatch: Minibatch | None = None) -> Float[Array, ""]:
        """L(w) on all the data, or its unbiased estimate from a mini-batch."""
        batch, weights = minibatch or self.minibatch(None, None)
        return weighted_mean(self.losses(position, batch), weights)

    def minibatch(self, key: Key[Array, ""] | None, size: int | None) -> Minibatch:
        """`size` samples drawn uniformly with replacement; all the data where `size` is None.

        In place of a sample that is excluded (all of its weights are 0) stands one that counts,
        with weights 0: what is excluded is never evaluated.
        """
        if size is None or key is None:
            return Minibatch(counted_rows(self.data, self.weights), self.weights)
        index = jax.random.randint(self.own_key(key), (size,), 0, self.num_samples)
        weights = self.weights[index]
        rows = jnp.where(is_counted(weights), index, self.spare)
        return Minibatch(jax.tree.map(lambda x: x[rows], self.data), weights)

    def loss_gradient(self, position: Position, minibatch: Minibatch | None = None) -> Position:
        """∇L(w), or its mini-batch estimate."""
        return jax.grad(self.loss)(position, minibatch)

    def grad_estimator(self, position: Position, minibatch: Minibatch | None = None) -> Position:
        """∇ log p(w) = −nβ ∇L(w) − γ (w − w*): what a blackjax stochastic-gradient kernel takes."""
        return self.drift(position, self.loss_gradient(position, minibatch))

    def drift(self, position: Position, loss_gradient: Position) -> Position:
        """∇ log p(w) = −nβ g − γ (w − w*) for a given gradient g of the loss."""

        def one(g: Array, w: Array, center: Array) -> Array:
            # In the precision of the position, whatever that of the losses.
            nbeta, gamma = (jnp.asarray(x, w.dtype) for x in (self.nbeta, self.localization))
            return -nbeta * g - gamma * (w - center)

        return jax.tree.map(one, loss_gradient, position, self.center)

    def logdensity(self, position: Position) -> Float[Array, ""]:
        """log p(w) up to a constant, on all the data: what a blackjax MCMC kernel takes."""
        loss = self.loss(position)
        squared = jax.tree.map(
            lambda w, center: jnp.sum((w - center.astype(w.dtype)) ** 2).astype(loss.dtype),
            position,
            self.center,
        )
        nbeta, gamma = (jnp.asarray(x, loss.dtype) for x in (self.nbeta, self.localization))
        return -nbeta * loss - gamma / 2 * jax.tree.reduce(jnp.add, squared)

    def reweight(
        self, weights: Shaped[Array | np.ndarray, "samples *tokens"] | list[Any] | None
    ) -> Posterior:
        """The posterior of the same data under weights ρ, of the shape of the losses.

        Raises:
            ValueError: the shape is not that of the losses, a weight is not finite, or their sum
                is not positive.
        """
        weights = normalise_weights(weights, self.weights.shape, self.weights.dtype)
        check_finite_losses(self.loss_fn, self.params, self.data, self.num_samples, weights)
        check_finite_gradient(self.loss_fn, self.params, self.data, weights)
        return replace(self, weights=weights, spare=first_counted(weights))


def localized_posterior(
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    nbeta: float | int | Float[Array, ""],
    localization: float | int | Float[Array, ""],
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | list[Any] | None = None,
) -> Posterior:
    """The localized posterior around trained parameters w*.

        p(w) ∝ exp(−nβ L(w) − γ/2 ‖w − w*‖²)

    Args:
        loss_fn: pure, deterministic function of parameters and batch that returns `[B]` or
            `[B, T]` losses in nats; it does not reduce, and the loss of a sample does not depend on
            what else is in the batch (no dropout, no batch statistics).
        params: w*, a pytree of floating-point arrays, each in one place: what is tied is one leaf
            that `loss_fn` uses twice.
        data: pytree of arrays with one leading sample axis of length N.
        nbeta: inverse temperature nβ > 0, in inverse units of the loss.
        localization: γ ≥ 0, a precision in inverse squared units of the parameters.
        weights: ρ of the shape of the losses, `[N]` or `[N, T]`; zero excludes (padding), and an
            excluded loss may be anything, NaN included. None is ρ = 1. Weights may be negative as
            long as their sum is positive.

    Returns:
        A `Posterior`.

    Raises:
        TypeError: parameters are not floating point, or the loss is not; the loss takes a key.
        ValueError: the loss is reduced, has another leading axis than the batch, is not finite
            at w* (looked at on the first 1024 samples), or depends on the company of a sample (the
            first 64); two leaves of the parameters are one array; the data are empty or ragged; nβ
            or γ is out of range; the weights do not fit.

    Examples:
        >>> def loss_fn(params, batch):  # one loss per sample
        ...     return 0.5 * (params["w"] - batch) ** 2
        >>> data, params = jnp.array([-1.0, 1.0]), {"w": jnp.zeros(())}
        >>> posterior = jp.localized_posterior(
        ...     loss_fn, params, data, nbeta=10.0, localization=100.0
        ... )
        >>> float(posterior.loss({"w": jnp.ones(())}))  # the mean of 2 and 0
        1.0

    References:
        Lau et al. 2023, arXiv 2308.12108, eq. 16; Baker et al. 2025, arXiv 2504.18274.
    """
    check_deterministic("loss_fn", loss_fn)
    check_hashable("loss_fn", loss_fn)
    check_params("params", params)
    num_samples = batch_length("data", data)
    check_number("nbeta", nbeta, minimum=0.0, exclusive=True)
    check_number("localization", localization, minimum=0.0)
    import_blackjax()  # arrays are here, so a backend is up: the samplers need it soon
    params, data, weights = take((params, data, weights))
    params, data = jax.tree.map(jnp.asarray, (params, data))
    shape, dtype = check_loss(loss_fn, params, data, num_samples)
    weights = normalise_weights(weights, shape, dtype)
    check_finite_losses(loss_fn, params, data, num_samples, weights, alone=True)
    check_finite_gradient(loss_fn, params, data, weights)
    return Posterior(
        params=params,
        data=data,
        weights=weights,
        nbeta=jnp.asarray(nbeta, dtype),
        localization=jnp.asarray(localization, dtype),
        restriction=None,
        loss_fn=loss_fn,
        spare=first_counted(weights),
    )


def restrict(posterior: Posterior, restriction: Restriction) -> Posterior:
    """The posterior of one component, all other weights held at w*.

    Raises:
        TypeError: `restriction` is not a `Restriction`, or what it selects is not floating point.
        ValueError: the posterior is restricted already, or the restriction selects nothing, or
            putting back what it selects does not give the same weights.
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"posterior must come from localized_posterior, got {type(posterior).__name__}"
        )
    if posterior.restriction is not None:
        raise ValueError(
            "posterior is restricted already; restrict the full posterior, "
            "with union(...) of restrictions where more is wanted"
        )
    check_restriction(restriction, posterior.params)
    return replace(posterior, restriction=restriction)
