"""Contrastive losses over any positives, and classes split into subclasses of equal size.

  s_ij   = cosine of z_i and z_j
  loss_i = - mean over p in P(i) of  [ s_ip / t_i - log sum_{a in A(i)} exp(s_ia / t_i) ]

P(i) are the positives of anchor i, A(i) what it is told apart from, t_i its temperature. SupCon has
P(i) = the others of its label and A(i) = all others; NT-Xent is SupCon with the example's id as the
label, for two views of each. An anchor without positives has no loss: 0, and not valid.

Subclass-balanced contrastive learning (SBCL) does not weight rare classes up. It cuts the common
ones into subclasses about as large as a rare class (on the host: `subclass_counts`,
`balanced_kmeans`) and contrasts those (`sbcl`).

An anchor is compared with the *global* batch: under jit the losses are the same numbers on one
device and on many.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import check_positive

_BASE_TEMPERATURE = 0.07  # T1 is multiplied by temperature / this


def supcon(
  z: jax.Array,
  positives: jax.Array,
  denominators: jax.Array | None = None,
  temperature: float | jax.Array = 0.1,
  *,
  base: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The contrastive loss of every anchor; see the module for the formula.

  Args:
    z: float[N, D], features; their length does not matter.
    positives: bool[N, N], positives[i, p] if p is a positive of anchor i; or int[N], labels: the
      others of the same label are. A row of label -1 has no positives; others are told apart
      from it.
    denominators: bool[N, N], A(i). Default: everything but i.
    temperature: float[] or float[N], > 0, one per anchor.
    base: float[N], 0 for padding: neither an anchor nor compared with, whatever it holds.
      Default: ones.

  Returns:
    (losses float32[N], valid bool[N]); 0 where not valid. The loss of a batch is
    `masked.mean(losses, valid)`.

  Raises:
    ValueError: shapes that do not match, a temperature <= 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.contrastive import supcon
    >>> z = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> losses, valid = supcon(z, jnp.array([0, 0, 1]), temperature=1.0)
    >>> [round(float(x), 4) for x in losses], valid.tolist()
    ([0.3133, 0.3133, 0.0], [True, True, False])

  Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (their L_out), with masks.
  """
  rows = z.shape[0]
  _check(z, positives=positives, denominators=denominators, temperature=temperature, base=base)
  if isinstance(temperature, (int, float)):
    check_positive(temperature=temperature)
  dtype = jnp.promote_types(jnp.float32, z.dtype)
  present = jnp.ones(rows, bool) if base is None else base > 0
  z = jnp.where(present[:, None], z, 0).astype(dtype)
  # Not sqrt(sum) and a division: the gradient at 0 would be NaN.
  z = z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=1, keepdims=True), 1e-24))

  if positives.ndim == 1:
    positives = _alike(positives)
  others = ~jnp.eye(rows, dtype=bool) & present[:, None] & masked.replicate(present)
  positives = positives & others
  denominators = others if denominators is None else denominators & others
  valid = jnp.any(positives, axis=1) & jnp.any(denominators, axis=1)

  temperature = jnp.broadcast_to(jnp.asarray(temperature, dtype), (rows,))
  logits = jnp.matmul(z, masked.replicate(z).T, precision='highest') / temperature[:, None]
  # An anchor that is not valid gets a full row, so that its gradient is 0 and not NaN.
  inside = denominators | ~valid[:, None]
  log_sum = jax.nn.logsumexp(jnp.where(inside, logits, -jnp.inf), axis=1)
  drawn = masked.divide(
    jnp.sum(jnp.where(positives, logits, 0), axis=1), jnp.sum(positives, axis=1).astype(dtype)
  )
  return jnp.where(valid, log_sum - drawn, 0), valid


def sbcl(
  z: jax.Array,
  labels: jax.Array,
  subclasses: jax.Array,
  views: jax.Array | None = None,
  temperature: float | jax.Array = 0.1,
  class_temperatures: jax.Array | None = None,
  gamma: float = 0.25,
) -> tuple[jax.Array, jax.Array]:
  """Subclass-balanced contrastive losses: (temperature / 0.07) T1 + gamma T2.

    T1   positives: the same subclass                           told apart from all others
    T2   positives: the same class but another subclass,        told apart from every other
         and other views                                        subclass, and other views

  Args:
    z: float[N, D], features.
    labels: int[N]. -1 is unknown: no positives but its other views.
    subclasses: int[N], counted within the class or over all; only equality matters.
    views: int[N], the example each row is a view of. Without it, an anchor may have no positives in
      one term (it counts 0) or in both (it is not valid).
    temperature: of T1.
    class_temperatures: float[C], of T2 by the anchor's class; see `class_temperatures`. Default:
      `temperature`.
    gamma: weight of T2, >= 0.

  Returns:
    (losses float32[N], valid bool[N]), as `supcon`.

  Raises:
    ValueError: shapes that do not match, gamma < 0, a temperature <= 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.contrastive import sbcl
    >>> z = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> losses, valid = sbcl(z, jnp.zeros(4, int), jnp.array([0, 0, 1, 1]))
    >>> losses.shape, bool(valid.all())
    ((4,), True)

  Source: official code of Hou et al., Subclass-balancing Contrastive Learning for Long-tailed
    Recognition, ICCV 2023 (arXiv 2306.15925), from its description.
  """
  _check(z, labels=labels, subclasses=subclasses, views=views)
  if isinstance(gamma, (int, float)) and not gamma >= 0:
    raise ValueError(f'gamma={gamma} must be at least 0')
  same_class = _alike(labels)
  same_subclass = same_class & (subclasses[:, None] == masked.replicate(subclasses))
  same_example = jnp.zeros_like(same_class) if views is None else _alike(views)
  of_class = temperature
  if class_temperatures is not None:
    of_class = jnp.where(labels == -1, temperature, masked.lookup(class_temperatures, labels))

  near, has_near = supcon(z, same_subclass, None, temperature)
  far, has_far = supcon(
    z, (same_class & ~same_subclass) | same_example, ~same_subclass | same_example, of_class
  )
  return temperature / _BASE_TEMPERATURE * near + gamma * far, has_near | has_far


def _alike(ids: jax.Array) -> jax.Array:
  """bool[N, N]: the same id, and not -1."""
  return (ids[:, None] == masked.replicate(ids)) & (ids != -1)[:, None]


def _check(z: jax.Array, **rows: jax.Array | float | None) -> None:
  """Holds arrays to one entry, or one row of N, for each row of z."""
  if z.ndim != 2:
    raise ValueError(f'z must be [N, D], got shape {z.shape}')
  n = z.shape[0]
  shapes = {'positives': ((n,), (n, n)), 'denominators': ((n, n),), 'temperature': ((), (n,))}
  for name, value in rows.items():
    allowed = shapes.get(name, ((n,),))
    if value is not None and jnp.shape(value) not in allowed:
      expected = ' or '.join(map(str, allowed))
      raise ValueError(f'{name} has shape {jnp.shape(value)}, z {z.shape}; expected {expected}')


# The rest runs on the host, between epochs, on the features of all training examples.


def subclass_counts(counts: np.ndarray, minimum: int = 10) -> np.ndarray:
  """Into how many subclasses to cut each class: m_c = max(1, floor(n_c / max(n_min, minimum))).

  Args:
    counts: int[C], examples of each class.
    minimum: size below which no subclass should fall, >= 1 (published: 10 for CIFAR, 20 for
      ImageNet-LT).

  Returns:
    int[C].

  Example:
    >>> import numpy as np
    >>> from jaxrw.contrastive import subclass_counts
    >>> subclass_counts(np.array([5000, 500, 50, 5]))
    array([500,  50,   5,   1])
  """
  if minimum < 1:
    raise ValueError(f'minimum={minimum} must be at least 1')
  counts = np.asarray(counts)
  return np.maximum(1, counts // max(int(counts.min()), minimum))


def balanced_assign(similarity: np.ndarray) -> np.ndarray:
  """Assigns rows to clusters of sizes N // k or N // k + 1, the most similar pairs first.

  All pairs are gone through in decreasing order, once for clusters of up to N // k, and once more
  for the N mod k rows that are left. Ties go to the lower row, then to the lower cluster.

  Args:
    similarity: float[N, k], of each row with each cluster.

  Returns:
    int[N], the cluster of each row.

  Raises:
    ValueError: a similarity that is not [N, k] or holds NaN.

  Example:
    >>> import numpy as np
    >>> from jaxrw.contrastive import balanced_assign
    >>> balanced_assign(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.5]]))
    array([0, 0, 1, 1])
  """
  similarity = np.asarray(similarity)
  if similarity.ndim != 2 or similarity.shape[1] == 0:
    raise ValueError(f'similarity has shape {similarity.shape}; expected [N, k]')
  if np.any(np.isnan(similarity)):
    raise ValueError('similarity holds NaN')
  rows, clusters = similarity.shape
  order = np.argsort(-similarity, axis=None, kind='stable')
  pairs = list(zip(*(x.tolist() for x in np.unravel_index(order, similarity.shape))))
  assigned, sizes = [-1] * rows, [0] * clusters
  for size in (rows // clusters, rows // clusters + 1):
    for row, cluster in pairs:
      if assigned[row] == -1 and sizes[cluster] < size:
        assigned[row] = cluster
        sizes[cluster] += 1
  return np.array(assigned, int)


def balanced_kmeans(
  features: np.ndarray,
  clusters: int,
  *,
  seed: int = 0,
  iterations: int = 35,
  tolerance: float = 1e-3,
) -> np.ndarray:
  """k-means by cosine, from k-means++ centers, with balanced assignments.

  Args:
    features: float[N, D], of one class; their length does not matter.
    clusters: k, between 1 and N.
    seed: of the first centers. The numbers of the clusters mean nothing.
    iterations: at most so many.
    tolerance: stop when the squared moves of all centers sum to less.

  Returns:
    int[N], the cluster of each row; sizes differ by at most 1.

  Raises:
    ValueError: clusters outside 1 .. N.

  Example:
    >>> import numpy as np
    >>> from jaxrw.contrastive import balanced_kmeans
    >>> a, b, c, d = balanced_kmeans(np.array([[1, 0], [0, 1], [5, 1], [1, 5]]), 2)
    >>> bool(a == c), bool(b == d), bool(a == b)
    (True, True, False)
  """
  features = _unit(np.asarray(features, np.float64))
  if not 1 <= clusters <= len(features):
    raise ValueError(f'clusters={clusters} must be between 1 and the {len(features)} rows')
  rng = np.random.default_rng(seed)
  chosen = [int(rng.integers(len(features)))]
  while len(chosen) < clusters:
    far = np.maximum(1 - (features @ features[chosen].T).max(axis=1), 0)
    far[chosen] = 0
    odds = far / far.sum() if far.sum() > 0 else None  # all the same: any will do
    chosen.append(int(rng.choice(len(features), p=odds)))
  centers = features[chosen]
  for _ in range(iterations):
    assigned = balanced_assign(features @ centers.T)
    moved = _unit(np.stack([features[assigned == c].mean(axis=0) for c in range(clusters)]))
    shift = np.sum((moved - centers) ** 2)
    centers = moved
    if shift < tolerance:
      break
  return balanced_assign(features @ centers.T)


def class_temperatures(
  features: np.ndarray, labels: np.ndarray, subclasses: np.ndarray, temperature: float = 0.1
) -> np.ndarray:
  """Temperatures of T2 in `sbcl`: wide classes get a high one, compact classes a low one.

    phi_c = mean_i |f_i - mean f| / log(n_c + 10),  clipped to its 20th to 80th percentile over c
    t_c   = temperature * phi_c / mean(phi);        t_c = temperature for a class in one piece

  Args:
    features: float[N, D], of all training examples, as they enter the loss (of unit length).
    labels: int[N], 0 .. C - 1.
    subclasses: int[C], how many subclasses each class has.
    temperature: the mean, > 0.

  Returns:
    float32[C].

  Raises:
    ValueError: a class without examples.

  Source: official code of SBCL, from its description.
  """
  check_positive(temperature=temperature)
  features, labels, subclasses = map(np.asarray, (features, labels, subclasses))
  spread = np.empty(len(subclasses))
  for c in range(len(subclasses)):
    members = features[labels == c].astype(np.float64)
    if not len(members):
      raise ValueError(f'class {c} has no examples')
    distances = np.linalg.norm(members - members.mean(axis=0), axis=1)
    spread[c] = distances.mean() / np.log(len(members) + 10)
  spread = np.clip(spread, *np.percentile(spread, [20, 80]))
  scaled = temperature * spread / spread.mean() if spread.mean() > 0 else temperature
  return np.where(subclasses == 1, temperature, scaled).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
