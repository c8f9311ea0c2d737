"""Vectors over the domains, checked where they are concrete; traced ones pass unchecked."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Vector = Sequence[float] | np.ndarray | jax.Array

_SUM_ERROR = 1e-3  # far above float32 rounding of a long sum, far below any real mistake


def check_domains(num_domains: int) -> None:
  if num_domains < 1:
    raise ValueError(f'num_domains={num_domains} must be at least 1')


def nonnegative(values, name: str, ndim: int = 1) -> np.ndarray | jax.Array:
  """float32, on the host if concrete, and then known to be finite and >= 0."""
  traced = isinstance(values, jax.core.Tracer)
  array = values.astype(jnp.float32) if traced else np.asarray(values, np.float32)
  if array.ndim != ndim or not array.size:
    expected = '[G]' if ndim == 1 else '[N, G]'
    raise ValueError(f'{name} has shape {array.shape}; expected {expected}, not empty')
  if not traced and not np.all(np.isfinite(array) & (array >= 0)):
    wrong = np.extract(~(np.isfinite(array) & (array >= 0)), array)[0]
    raise ValueError(f'{name} holds {wrong:g}; expected finite numbers, at least 0')
  return array


def sizes_of(values, name: str) -> np.ndarray | jax.Array:
  """`nonnegative`, and not all 0."""
  array = nonnegative(values, name)
  if isinstance(array, np.ndarray) and not array.any():
    raise ValueError(f'{name} are all 0; at least one domain must be above 0')
  return array


def normalized(values, name: str) -> np.ndarray | jax.Array:
  """`sizes_of`, divided by the sum."""
  array = sizes_of(values, name)
  return array / array.sum()


def on_simplex(values, name: str, ndim: int = 1) -> np.ndarray | jax.Array:
  """`nonnegative`, with rows that sum to 1."""
  array = nonnegative(values, name, ndim)
  if isinstance(array, np.ndarray):
    sums = np.atleast_1d(array.sum(axis=-1, dtype=np.float64))
    off = np.flatnonzero(np.abs(sums - 1) > _SUM_ERROR)
    if off.size:
      row = f'{name}[{off[0]}]' if ndim == 2 else name
      raise ValueError(f'{row} sums to {sums[off[0]]:g}; expected 1: divide by the sum')
  return array


def check_drawn(q, p, q_name: str, p_name: str) -> None:
  """A domain that counts but is never drawn would silently drop out of the loss."""
  if q.shape != p.shape:
    raise ValueError(f'{q_name} has shape {q.shape}, {p_name} {p.shape}; they must agree')
  if isinstance(q, np.ndarray) and isinstance(p, np.ndarray):
    missing = np.flatnonzero((p > 0) & (q == 0))
    if missing.size:
      g = missing[0]
      raise ValueError(
        f'{q_name}[{g}]=0 but {p_name}[{g}]={p[g]:g}: a domain that is never drawn has no weight; '
        f'raise the first or set the second to 0'
      )
