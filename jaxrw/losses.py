"""Per-example and per-token losses. Nothing here reduces over examples or tokens.

A weighting needs the losses one by one; the step takes the weighted mean. A factor that gradients
must flow through makes a loss and not a weighting, so focal loss, margins and shifted logits are
here. What optax has is not repeated: `optax.losses.sigmoid_focal_loss` for independent binary
outputs, `dice_loss`, `poly_loss_cross_entropy`, `ntxent`.

Labels are not checked here: one that is no class (-1 for unknown, padding) has a loss that means
nothing, often that of the last class. Give such entries base 0, or their weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Softmax cross entropy of each label, in nats: -log softmax(logits)[label].

  Args:
    logits: float[..., V]. Computed in float32 or wider, whatever the input's dtype.
    labels: int[...], class or token indices.

  Returns:
    float32[...], one loss per label, never reduced.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.losses.cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
    Array([1.3862944, 1.3862944], dtype=float32)
  """
  logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def focal(
  logits: jax.Array,
  labels: jax.Array,
  gamma: float = 2.0,
  alpha: jax.Array | None = None,
) -> jax.Array:
  """Focal loss: (1 - p)^gamma * cross entropy, p the probability of the label.

  The factor is differentiated, too. Easy examples fade; mislabeled ones do not.

  Args:
    logits: float[..., V].
    labels: int[...].
    gamma: >= 0. 0 is cross entropy.
    alpha: float[V], a further factor for each class; see `effective_number_weights`. Default: ones.

  Returns:
    float32[...], one loss per label.

  Raises:
    ValueError: a negative gamma.
    TypeError: a traced gamma.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    >>> [round(float(x), 4) for x in jaxrw.losses.focal(logits, jnp.array([0, 0]))]
    [0.0011, 0.1733]

  Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (arXiv 1708.02002), with a
    softmax; for two classes it equals `optax.losses.sigmoid_focal_loss`.
  """
  _check_number(gamma, 0, math.inf, 'gamma')
  losses = cross_entropy(logits, labels)
  if gamma:
    logits = logits.astype(losses.dtype)
    out = (labels[..., None] == jnp.arange(logits.shape[-1])) | (logits == -jnp.inf)
    # Finite, unlike -inf: a row of which nothing is left has a sum, but no gradient.
    others = jax.nn.logsumexp(jnp.where(out, jnp.finfo(logits.dtype).min / 2, logits), axis=-1)
    # log(1 - p) as a difference of two sums: 1 - p itself would round to 0.
    losses *= jnp.exp(gamma * (others - jax.nn.logsumexp(logits, axis=-1)))
  return losses if alpha is None else losses * _of_label(alpha, labels, logits.shape[-1])


def generalized_cross_entropy(logits: jax.Array, labels: jax.Array, q: float = 0.7) -> jax.Array:
  """(1 - p^q) / q, p the probability of the label: between cross entropy and absolute error.

  Bounded by 1 / q, so that labels nobody believes stop pulling. As weights on cross entropy see
  `jaxrw.weights.generalized_cross_entropy`.

  Args:
    logits: float[..., V].
    labels: int[...].
    q: in [0, 1]. 0 is cross entropy; 1 is 1 - p, half the absolute error of the probabilities.

  Returns:
    float32[...], one loss per label.

  Raises:
    ValueError: q outside [0, 1].
    TypeError: a traced q.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> logits = jnp.log(jnp.array([[0.81, 0.19]]))
    >>> round(float(jaxrw.losses.generalized_cross_entropy(logits, jnp.array([0]), q=0.5)[0]), 4)
    0.2

  Source: Zhang and Sabuncu, NeurIPS 2018 (arXiv 1805.07836).
  """
  _check_number(q, 0, 1, 'q')
  losses = cross_entropy(logits, labels)
  return -jnp.expm1(-q * losses) / q if q else losses


def ldam_margins(counts: Sequence[float] | jax.Array, largest: float = 0.5) -> jax.Array:
  """Margins ∝ n_c^(-1/4), the rarest class's being the largest.

  Args:
    counts: float[C], examples of each class, > 0.
    largest: margin of the rarest class, in the logits' unit before `ldam` scales them.

  Returns:
    float32[C].

  Raises:
    ValueError: counts that are not [C] and > 0, a negative margin.

  Example:
    >>> import jaxrw
    >>> [round(float(m), 3) for m in jaxrw.losses.ldam_margins([10_000, 625, 16])]
    [0.1, 0.2, 0.5]

  Source: official code of Cao et al., LDAM-DRW, NeurIPS 2019 (arXiv 1906.07413).
  """
  numbers = np.asarray(counts, np.float32)
  if numbers.ndim != 1 or not np.all(numbers > 0) or not largest >= 0:
    raise ValueError(f'counts={counts} must be [C] and > 0, largest={largest} at least 0')
  return jnp.asarray(largest * (numbers.min() / numbers) ** 0.25)


def ldam(
  logits: jax.Array, labels: jax.Array, margins: jax.Array, scale: float = 30.0
) -> jax.Array:
  """Label-distribution-aware margins: cross entropy of scale * (logits - margin of the label).

  Args:
    logits: float[..., V], cosines: of a classifier whose rows and inputs have norm 1.
    labels: int[...].
    margins: float[V], see `ldam_margins`. Zeros, with scale 1, give cross entropy.
    scale: > 0, since cosines alone could not come near a probability of 1.

  Returns:
    float32[...], one loss per label.

  Raises:
    ValueError: margins that are not [V], a scale <= 0.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> cosines = jnp.array([[0.5, 0.5], [0.5, 0.5]])
    >>> losses = jaxrw.losses.ldam(cosines, jnp.array([0, 1]), jnp.array([0.0, 0.1]), scale=10.0)
    >>> [round(float(x), 4) for x in losses]
    [0.6931, 1.3133]

  Source: official code of Cao et al., LDAM-DRW, NeurIPS 2019; the deferred weights are
    `after(start, effective_number(counts))`.
  """
  if not scale > 0:
    raise ValueError(f'scale={scale} must be greater than 0')
  own = labels[..., None] == jnp.arange(logits.shape[-1])
  margins = _of_classes(margins, logits.shape[-1], 'margins')
  return cross_entropy(scale * (logits - jnp.where(own, margins, 0)), labels)


def logit_adjusted_cross_entropy(
  logits: jax.Array, labels: jax.Array, log_prior: jax.Array, tau: float = 1.0
) -> jax.Array:
  """Cross entropy of logits + tau * log prior: what is trained is balanced once the prior is gone.

  Args:
    logits: float[..., V]. Predict with these, unshifted.
    labels: int[...].
    log_prior: float[V], logarithm of the classes' shares (or counts: a constant does not matter);
      -inf for a class that does not occur.
    tau: >= 0. 0 is cross entropy, 1 is balanced softmax.

  Returns:
    float32[...], one loss per label.

  Raises:
    ValueError: a prior that is not [V], a negative tau.
    TypeError: a traced tau.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> prior = jnp.log(jnp.array([0.9, 0.1]))
    >>> losses = jaxrw.losses.logit_adjusted_cross_entropy(
    ...   jnp.zeros((2, 2)), jnp.array([0, 1]), prior)
    >>> [round(float(x), 4) for x in losses]
    [0.1054, 2.3026]

  Source: Menon et al., Long-tail learning via logit adjustment, ICLR 2021, as recalled.
  """
  _check_number(tau, 0, math.inf, 'tau')
  log_prior = _of_classes(log_prior, logits.shape[-1], 'log_prior')
  return cross_entropy(logits + tau * log_prior if tau else logits, labels)


def balanced_softmax(
  logits: jax.Array, labels: jax.Array, counts: Sequence[float] | jax.Array
) -> jax.Array:
  """Cross entropy of logits + log counts: `logit_adjusted_cross_entropy` at tau = 1.

  Args:
    logits: float[..., V]. Predict with these, unshifted.
    labels: int[...].
    counts: float[V], examples of each class.

  Returns:
    float32[...], one loss per label.

  Raises:
    ValueError: counts that are not [V], negative or not finite.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> losses = jaxrw.losses.balanced_softmax(jnp.zeros((2, 2)), jnp.array([0, 1]), [3, 1])
    >>> [round(float(x), 4) for x in losses]
    [0.2877, 1.3863]

  Source: Ren et al., Balanced Meta-Softmax, NeurIPS 2020; as AT-BSL's code has it.
  """
  counts = _of_classes(counts, logits.shape[-1], 'counts')
  if not isinstance(counts, jax.core.Tracer):
    numbers = np.asarray(counts)
    if not np.all(np.isfinite(numbers) & (numbers >= 0)):
      raise ValueError(f'counts={numbers} must be at least 0 and finite')
  return logit_adjusted_cross_entropy(logits, labels, jnp.log(jnp.asarray(counts, jnp.float32)))


def _check_number(value: float, low: float, high: float, name: str) -> None:
  if isinstance(value, jax.core.Tracer):
    raise TypeError(f'{name} is traced; pass a number, outside jit or by static_argnames')
  if not low <= value <= high:
    wanted = f'in [{low}, {high}]' if high < math.inf else f'at least {low}'
    raise ValueError(f'{name}={value} must be {wanted}')


def _of_classes(values: Sequence[float] | jax.Array, number: int, name: str) -> jax.Array:
  values = jnp.asarray(values)
  if values.shape != (number,):
    raise ValueError(f'{name} has shape {values.shape}; expected [{number}], one for each class')
  return values


def _of_label(per_class: jax.Array, labels: jax.Array, number: int) -> jax.Array:
  """per_class[labels], without an index, which an Explicit mesh refuses."""
  per_class = _of_classes(per_class, number, 'alpha')
  return jnp.sum(jnp.where(labels[..., None] == jnp.arange(number), per_class, 0), axis=-1)


def shrunk_cross_entropy(logits: jax.Array, keep: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross entropy over the kept classes: no gradient to the others.

  Args:
    logits: float[..., V].
    keep: bool[..., V], see `jaxrw.weights.shrink_mask`; the label must be among them.
    labels: int[...].

  Returns:
    float32[...], one loss per label.

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> keep = jnp.array([[True, False, True]])
    >>> jaxrw.losses.shrunk_cross_entropy(jnp.zeros((1, 3)), keep, jnp.array([0]))
    Array([0.6931472], dtype=float32)

  Source: official code of ShrinkMatch, ICCV 2023.
  """
  if keep.shape != logits.shape:
    raise ValueError(f'keep has shape {keep.shape}, logits {logits.shape}')
  # Finite, unlike -inf, for which differences of logits would be NaN.
  return cross_entropy(jnp.where(keep, logits, jnp.finfo(logits.dtype).min / 2), labels)


def bpr(positive: jax.Array, negative: jax.Array) -> jax.Array:
  """Bayesian personalized ranking: -log sigmoid(positive - negative), of each pair.

  Args:
    positive: float[...], scores of what was chosen. Computed in float32 or wider.
    negative: float[...], scores of what was not.

  Returns:
    float32[...], one loss per pair, never reduced.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.losses.bpr(jnp.array([1.0, 0.0]), jnp.array([1.0, 200.0]))
    Array([  0.6931472, 200.       ], dtype=float32)

  Source: Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
  """
  wide = jnp.promote_types(jnp.float32, jnp.result_type(positive, negative))
  return jax.nn.softplus(negative.astype(wide) - positive.astype(wide))


def distillation(
  logits: jax.Array,
  teacher: jax.Array,
  labels: jax.Array,
  *,
  alpha: float,
  temperature: float = 4.0,
) -> jax.Array:
  """(1 - alpha) CE(logits, label) + alpha temperature^2 KL(teacher || student), both softened.

  A teacher trained on all data makes a pruned set nearly as good as all of it; the fewer examples
  are kept, the larger should alpha be, and the less does it matter which. A teacher that has
  learned wrong labels by heart hands them on: stop it early.

  Args:
    logits: float[..., V].
    teacher: float[..., V], logits of the teacher, which get no gradient. A constant added to them
      changes nothing.
    labels: int[...].
    alpha: in [0, 1]. 0 is cross entropy, 1 does not look at the labels; `1 - 0.5 * kept_share` is a
      default to start from (ours).
    temperature: > 0, of both softmaxes. Towards infinity the second term becomes
      ||s - t||^2 / (2 V) of the centered logits.

  Returns:
    float32[...], one loss per label, never reduced.

  Raises:
    ValueError: an alpha outside [0, 1], a temperature <= 0, shapes that do not match.
    TypeError: a traced alpha.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> logits = jnp.array([[2.0, 0.0]])
    >>> same = jaxrw.losses.distillation(logits, logits + 3, jnp.array([0]), alpha=1.0)
    >>> abs(round(float(same[0]), 5))
    0.0

  Source: Hinton et al., 2015; its use on pruned data: Ben-Baruch et al., Distilling the Knowledge
    in Data Pruning, ICML 2025 (arXiv 2403.07854), as recalled.
  """
  _check_number(alpha, 0, 1, 'alpha')
  if isinstance(temperature, (int, float)) and not temperature > 0:
    raise ValueError(f'temperature={temperature} must be greater than 0')
  if teacher.shape != logits.shape:
    raise ValueError(f'teacher has shape {teacher.shape}, logits {logits.shape}')
  losses = cross_entropy(logits, labels)
  if not alpha:
    return losses
  soft = lambda z: jax.nn.log_softmax(z.astype(losses.dtype) / temperature)
  wanted = soft(jax.lax.stop_gradient(teacher))
  terms = jnp.exp(wanted) * (wanted - soft(logits))
  apart = temperature**2 * jnp.sum(jnp.where(wanted == -jnp.inf, 0, terms), axis=-1)
  return apart if alpha == 1 else (1 - alpha) * losses + alpha * apart


def chunked_cross_entropy(
  hidden: jax.Array, table: jax.Array, labels: jax.Array, *, chunk: int
) -> jax.Array:
  """`cross_entropy(hidden @ table.T, labels)` with logits for at most `chunk` positions at a time.

  The logits of all positions, [..., T, V], are most of the memory of a small model with a large
  vocabulary. Here they never exist at once, forwards or backwards: each chunk of positions is
  computed, reduced to its losses and forgotten, and computed again for its gradient. That costs
  one more product with the table, so 4/3 of the head's FLOPs.

  Forms that compute the gradient in the forward pass and spare the recomputation need to know
  what each token's loss will be multiplied by. Weights that depend on the losses are only known
  after all of them, so this one returns the losses and leaves the product to the caller.

  Only positions are cut: rows stay on their devices. Plain JAX inside, so `vmap`, `jvp` and
  `grad` work in any combination. On a mesh of devices, under `jax.shard_map`, the gradient of the
  table crosses devices once; left to the partitioner, once a chunk.

  Args:
    hidden: float[..., T, D]; its dtype is that of the products, which are summed in float32.
    table: float[V, D], one row per class; rounded to the dtype of `hidden` inside each chunk, so
      that the chunks' gradients add up in the table's own dtype.
    labels: int[..., T].
    chunk: positions at a time. T need not be a multiple: the chunks are made equally long, and
      what is missing at the end is filled up and cut off again.

  Returns:
    float32[..., T], one loss per label, never reduced.

  Example:
    >>> import jax, jax.numpy as jnp, jaxrw
    >>> hidden, table = jnp.ones((2, 5, 3)), jnp.zeros((4, 3))
    >>> labels = jnp.zeros((2, 5), int)
    >>> losses = jaxrw.losses.chunked_cross_entropy(hidden, table, labels, chunk=2)
    >>> losses.shape, float(losses[0, 0])
    ((2, 5), 1.3862943649291992)
  """
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be a whole number of positions, at least 1')
  length = labels.shape[-1]
  count = max(1, math.ceil(length / chunk))
  size = math.ceil(length / count)

  def cut(x, axis):
    """[..., T, ...] -> [count, ..., size, ...]."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - length)
    x = jnp.pad(x, padding)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  @functools.partial(jax.checkpoint, prevent_cse=False)  # the loop itself prevents it
  def chunk_losses(part):
    hidden, labels = part
    wide = jnp.promote_types(jnp.float32, hidden.dtype)
    logits = jnp.einsum(
      '...td,vd->...tv', hidden, table.astype(hidden.dtype), preferred_element_type=wide
    )
    return cross_entropy(logits, labels)

  axis = labels.ndim - 1
  losses = jnp.moveaxis(jax.lax.map(chunk_losses, (cut(hidden, axis), cut(labels, axis))), 0, axis)
  return losses.reshape(*labels.shape[:-1], count * size)[..., :length]
