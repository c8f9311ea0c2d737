"""Few mixtures that stand for very many domains.

A method that searches the simplex of N basis mixtures need not read each of G domains, whatever G
is. With basis^T w, the mixture over the domains, its gradient along basis mixture j is that of
examples drawn by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw.mixtures._simplex import Vector, on_simplex
from jaxrw.mixtures.core import Mixture


def basis_mixture(
  weights: Vector, basis: Sequence[Sequence[float]] | np.ndarray | jax.Array
) -> jax.Array:
  """basis^T weights: the mixture over G domains that a mixture over N basis mixtures stands for.

  With it a method that searches the simplex of N basis mixtures can serve very many domains.

  Args:
    weights: float[N] on the simplex.
    basis: float[N, G], each row on the simplex, for example an `importance_mixture`.

  Returns:
    float32[G] on the simplex.

  Raises:
    ValueError: weights or a row off the simplex, shapes that do not match.

  Example:
    >>> basis_mixture([0.5, 0.5], [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]).tolist()
    [0.5, 0.25, 0.25]

  Source: distribution reweighting of Dynamic Gradient Alignment (arXiv 2410.02498). Provenance:
    reconstructed.
  """
  weights, basis = on_simplex(weights, 'weights'), on_simplex(basis, 'basis', ndim=2)
  if basis.shape[0] != weights.size:
    raise ValueError(
      f'basis has shape {basis.shape}; expected a row for each of the {weights.size} weights'
    )
  # An accelerator's default may round to 8 bits: too few to stay on the simplex.
  return jnp.matmul(weights, basis, precision='highest')


def on_basis(
  mixture: Mixture, basis: Sequence[Sequence[float]] | np.ndarray | jax.Array
) -> Mixture:
  """A method over N basis mixtures, as a mixture over the G domains that they are made of.

    q = basis^T q_N      p = basis^T p_N

  The state is that of the method, and so are the signals it needs: `domain_alignment` is then
  float[N], each entry measured on examples that are drawn by one row of the basis. For methods that
  follow the losses of the step, which are told by domain, it is of no use.

  Args:
    mixture: over N entries; by sampling, so that its q and p are one vector.
    basis: float[N, G], each row on the simplex.

  Raises:
    ValueError: a row off the simplex, or another number of rows than the mixture has entries.

  Example:
    >>> from jaxrw.mixtures import dga
    >>> mixture = on_basis(dga(2, rate=1.0), [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    >>> told = {'domain_alignment': jnp.array([0.0, 1.0])}
    >>> q = mixture.proportions(mixture.update(mixture.init(), step=0, **told))
    >>> [round(float(x), 3) for x in q]
    [0.269, 0.366, 0.366]

  Source: distribution reweighting of Dynamic Gradient Alignment (arXiv 2410.02498). Provenance:
    reconstructed.
  """
  rows = on_simplex(basis, 'basis', ndim=2)
  basis_mixture(mixture.proportions(mixture.init()), rows)  # checks that they fit
  over_domains = lambda weights: basis_mixture(weights, rows)
  return Mixture(
    init=mixture.init,
    update=mixture.update,
    proportions=lambda state: over_domains(mixture.proportions(state)),
    objective=lambda state: over_domains(mixture.objective(state)),
  )
