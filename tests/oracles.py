"""Loss-based weights as NumPy loops in float64, written from the formulas and not from the library.

`base_mean_one` is the library's convention; `official_sum_one` is the published one, step by step
as the method's authors print it.
"""

import math

import numpy as np

SHAPES = {
  'linupper': lambda h: min(h + 1, 1),
  'quadratic': lambda h: 1 - h**2,
  'extremes': abs,
  'upper': lambda h: (h + 1) / 2,
}


def normalized(losses, present):
  """h in [-1, 1] of each loss, over those present; a range below 1e-6 counts as 1e-6."""
  seen = [loss for loss, p in zip(losses, present) if p]
  low, high = min(seen), max(seen)
  return [2 * (loss - (low + high) / 2) / max(high - low, 1e-6) for loss in losses]


def base_mean_one(name, losses, r, base=None, incoming=None):
  """Multipliers [B]: incoming * exp(f / r) / Z, keeping sum(base * incoming); 0 at base 0."""
  losses = [float(loss) for loss in losses]
  base = [1.0] * len(losses) if base is None else [float(b) for b in base]
  incoming = [1.0] * len(losses) if incoming is None else [float(w) for w in incoming]
  present = [b > 0 for b in base]
  if not any(present):
    return np.zeros(len(losses))
  if name == 'kl_dro':
    top = max(loss for loss, p in zip(losses, present) if p)
    scores = [loss - top for loss in losses]
  else:
    scores = [SHAPES[name](h) for h in normalized(losses, present)]
  tilts = [math.exp(s / r) if p else 0.0 for s, p in zip(scores, present)]
  mass = sum(b * w for b, w in zip(base, incoming))
  z = sum(b * w * t for b, w, t in zip(base, incoming, tilts)) / mass
  return np.array([w * t / z for w, t in zip(incoming, tilts)])


def official_sum_one(name, losses, r, delta=1.0, dtype=np.float64):
  """The published pipeline, with its unstable normalization: weights [B] of sum 1."""
  losses = np.asarray(losses, dtype)
  delta = dtype(delta)
  width = max(losses.max() - losses.min(), dtype(1e-6))
  h = 2 * delta * losses / width - delta * (losses.max() + losses.min()) / width
  f = {
    'linupper': lambda: np.minimum(h + delta, delta),
    'quadratic': lambda: 1 - h**2 / delta**2,
    'extremes': lambda: np.abs(h),
    'upper': lambda: dtype(0.5) * h + dtype(0.5) * delta,
    'kl_dro': lambda: losses,
  }[name]()
  scaled = np.exp((f - f.max()) / dtype(r))
  return scaled / scaled.sum()
