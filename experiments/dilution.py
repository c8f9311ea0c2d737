"""Dilution: what a source with a spurious feature does to one without, and what weights win back.

  python -m experiments.dilution --workdir=runs/dilution

Two sources of Gaussian examples share a feature that predicts the label. A second feature agrees
with the label in 55% of the examples of the one source and in 95% of the other's; under shift it
agrees in 20%. A logistic regression is trained on unions with 0 to 100% of the second source, in
`--seeds` independent repetitions at once, and tested on equal parts of both and under shift. At
three quarters of the second source, it is trained again with weights on the sources: Group DRO, and
importance weights that undo the union. Effective robustness is measured against models of the first
source alone that saw less data.

Prints a table with 95% intervals and what the claims come to; writes dilution.json and
dilution.png.

Quality Not Quantity, NeurIPS 2022 (arXiv 2208.05516): its experiments are with CLIP on the web;
this is a linear model of why mixing dilutes, as they have one. Details are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, files, stats
from experiments.errors import UserError
from experiments.evaluators import robustness
from jaxrw import importance_weights, mixtures

FLAGS = flags.FLAGS
AGREEMENT = (0.55, 0.95)  # of the spurious feature, by source
SHIFTED = 0.2
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS, RATE, TEST = 300, 0.5, 20_000


class Curves(NamedTuple):
  """Accuracies [seeds] by arm."""

  accuracy: dict[str, np.ndarray]
  shifted: dict[str, np.ndarray]
  effective: dict[str, np.ndarray]


def draw(key: jax.Array, agreement: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(features float32[N, 3], labels float32[N] of 1 and -1); agreement: float[N]."""
  keys = jax.random.split(key, 3)
  label = jnp.where(jax.random.bernoulli(keys[0], shape=agreement.shape), 1.0, -1.0)
  spurious = label * jnp.where(jax.random.bernoulli(keys[1], agreement), 1.0, -1.0)
  noise = jax.random.normal(keys[2], (agreement.size, 2))
  features = jnp.stack([label + noise[:, 0], spurious + 0.5 * noise[:, 1]], axis=1)
  return jnp.concatenate([features, jnp.ones((agreement.size, 1))], axis=1), label


def fit(
  x: jax.Array, label: jax.Array, source: jax.Array, kind: str, q: tuple[float, float]
) -> jax.Array:
  """Weights of a logistic regression, float32[3], by gradient descent on all examples.

  Args:
    x, label: from `draw`.
    source: int[N].
    kind: 'plain'; 'group_dro'; or 'first': importance weights towards the first source.
    q: shares of the sources in the data.
  """
  mixture = {
    'plain': lambda: mixtures.fixed(q),
    'group_dro': lambda: mixtures.group_dro_mixture(2, rate=0.1, mode='weigh', sampled=q),
    'first': lambda: mixtures.fixed(q, (1.0, 0.0)),
  }[kind]()
  drawn = jnp.asarray(q)[source]

  def losses(w):
    return jax.nn.softplus(-label * (x @ w))

  def step(carry, t):
    w, state = carry
    told = mixtures.domain_signals(losses(w), None, source, 2)
    state = mixture.update(state, step=t, **told)
    weights = importance_weights(mixture.objective(state), drawn, source)
    gradient = jax.grad(lambda w: jnp.mean(weights * losses(w)))(w)
    return (w - RATE * gradient, state), None

  (w, _), _ = jax.lax.scan(step, (jnp.zeros(3), mixture.init()), jnp.arange(STEPS))
  return w


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def accuracies(key: jax.Array, share: float, examples: int, kind: str) -> tuple:
  """(accuracy on both sources alike, accuracy under shift) of one model."""
  second = round(share * examples)
  source = (jnp.arange(examples) < second).astype(jnp.int32)
  train, test, shift = jax.random.split(key, 3)
  q = (1 - second / examples, second / examples)
  w = fit(*draw(train, jnp.asarray(AGREEMENT)[source]), source, kind, q)

  def accuracy(key, agreement):
    x, label = draw(key, agreement)
    return jnp.mean(jnp.sign(x @ w) == label)

  both = jnp.where(jnp.arange(TEST) % 2 == 0, *AGREEMENT)
  return accuracy(test, both), accuracy(shift, jnp.full(TEST, SHIFTED))


def run(seeds: int, examples: int) -> Curves:
  """Every arm in every repetition; arms of a repetition share the noise of their data."""
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  measure: Callable = lambda share, n, kind: jax.vmap(lambda k: accuracies(k, share, n, kind))(keys)
  references = [measure(0.0, n, 'plain') for n in (20, 40, 80, 160, 320, examples)]
  arms = {f'{share:.0%}': (share, 'plain') for share in SHARES}
  arms |= {'75%, Group DRO': (0.75, 'group_dro'), '75%, first source only': (0.75, 'first')}
  found = {name: measure(share, examples, kind) for name, (share, kind) in arms.items()}
  accuracy = {name: np.asarray(a) for name, (a, _) in found.items()}
  shifted = {name: np.asarray(s) for name, (_, s) in found.items()}
  line = robustness.fit_logit_line(*(np.concatenate(v) for v in zip(*references)))
  effective = {
    name: robustness.effective_robustness(accuracy[name], shifted[name], line) for name in arms
  }
  return Curves(accuracy, shifted, effective)


def claims(curves: Curves) -> list[str]:
  """What the repetitions say of each claim."""
  plain = [f'{share:.0%}' for share in SHARES]
  values = np.stack([curves.shifted[name] for name in plain])
  monotone = bool(np.all(np.diff(values.mean(1)) < 0))
  gain = stats.paired(curves.accuracy['25%'].tolist(), curves.accuracy['0%'].tolist())
  lost = values[0] - curves.shifted['75%']
  lines = [
    f'accuracy under shift falls with every part of the second source: '
    f'{"reproduced" if monotone else "not reproduced"}',
    f'while accuracy itself gains at a quarter: {_interval(gain)}: '
    f'{"reproduced" if gain.low > 0 else "not reproduced"}',
  ]
  for name in ('75%, Group DRO', '75%, first source only'):
    back = stats.paired(curves.shifted[name].tolist(), curves.shifted['75%'].tolist())
    part = np.mean(curves.shifted[name] - curves.shifted['75%']) / np.mean(lost)
    lines.append(f'{name}: {_interval(back)} under shift, {part:.0%} of what was lost')
  return lines


def _interval(result: stats.Paired) -> str:
  return f'{result.mean:+.3f} ({result.low:+.3f} to {result.high:+.3f})'


def table_text(curves: Curves) -> str:
  """Means with half-widths of 95% intervals over repetitions, aligned."""
  head = ('second source', 'accuracy', 'under shift', 'effective robustness')
  rows = [(name, *(_mean(values[name]) for values in curves)) for name in curves.accuracy]
  widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
  line = lambda row: '  '.join(
    cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
  )
  return '\n'.join(map(line, (head, *rows)))


def _mean(values: np.ndarray) -> str:
  result = stats.paired(values.tolist(), [0.0] * len(values))
  return f'{result.mean:.3f} ±{(result.high - result.low) / 2:.3f}'


def draw_curves(curves: Curves, theme):
  """Accuracy and accuracy under shift over the share of the second source."""
  from matplotlib.figure import Figure

  fig = Figure(figsize=(6.5, 3.8), layout='constrained')
  ax = fig.subplots()
  names = [f'{share:.0%}' for share in SHARES]
  for values, label, color in (
    (curves.accuracy, 'both sources', theme.colors[0]),
    (curves.shifted, 'under shift', theme.colors[1]),
  ):
    ax.plot(SHARES, [values[n].mean() for n in names], 'o-', color=color, label=label)
    for i, (name, marker) in enumerate((('75%, Group DRO', '^'), ('75%, first source only', 's'))):
      label = name.partition(', ')[2] if values is curves.shifted else None
      ax.plot(0.75, values[name].mean(), marker, color=theme.colors[2 + i], ms=8, label=label)
  ax.set_xlabel('share of the source with the spurious feature')
  ax.set_ylabel('accuracy')
  ax.grid()
  fig.legend(loc='outside upper left', ncols=4, frameon=False)
  return fig


def main(_: list[str]) -> None:
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: try --workdir=runs/dilution')
  if FLAGS.seeds < 2 or FLAGS.examples < 100:
    raise UserError(
      f'--seeds={FLAGS.seeds} must be at least 2 and --examples={FLAGS.examples} at least 100'
    )
  from experiments import plots

  curves = run(FLAGS.seeds, FLAGS.examples)
  print(table_text(curves))
  print('\n' + '\n'.join(said := claims(curves)))
  folder = Path(FLAGS.workdir)
  files.write_json(folder / 'dilution.json', {**curves._asdict(), 'claims': said})
  with files.replacing(folder / 'dilution.png') as path:
    path.write_bytes(plots.draw_png(lambda: draw_curves(curves, plots.LIGHT), plots.LIGHT))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', '', 'folder for dilution.json and dilution.png')
  flags.DEFINE_integer('seeds', 10, 'independent repetitions')
  flags.DEFINE_integer('examples', 20_000, 'training examples')
  cli.run(main)
