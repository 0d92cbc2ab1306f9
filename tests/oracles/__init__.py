"""Exact answers in NumPy float64, independent of the package under test.

gaussian: quadratic losses, where χ, the finite response and every moment are closed.
euler: what an unadjusted Langevin chain of finite step does on a quadratic.
llc: local learning coefficients of regular and singular models.
anharmonic: a one-dimensional posterior by quadrature.
superposition: the toy model of superposition, its population loss and its exact posterior.
inversion: small data-weight problems by general-purpose optimisers.
"""
