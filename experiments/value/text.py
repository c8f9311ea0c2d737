"""Leave-k-out on a small GPT: do attribution scores foretell what training without some data does?

A model is trained on n pieces of text of a few domains, then again and again without a random part
of them, whose weights are 0. Scores of each example for each target, a set of held-out pieces of
one domain, foretell how much the target's loss rises: the sum over what was left out. The linear
datamodeling score (LDS) is the rank correlation of that with what happened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import compiled, stats
from experiments.errors import UserError
from jaxrw import attribution, scores

VOCAB = 256  # bytes
CHECKPOINTS = 4


class Settings(NamedTuple):
  """Sizes.

  Attributes:
    domains, examples: how many, and training pieces of all of them together.
    length: bytes of a piece, less one.
    targets: sets of held-out pieces of each domain.
    target_size: pieces of a set.
    steps, batch, rate: of Adam, with a cosine to 0.
    left_out: shares of the examples.
    subsets: of each share.
    sketch: dimensions of TRAK's projection.
  """

  domains: int = 4
  examples: int = 512
  length: int = 32
  width: int = 32
  layers: int = 2
  heads: int = 2
  targets: int = 2
  target_size: int = 32
  steps: int = 96
  batch: int = 64
  rate: float = 3e-3
  left_out: tuple[float, ...] = (0.02, 0.1, 0.3)
  subsets: int = 32
  sketch: int = 128


class Data(NamedTuple):
  """train int32[n, T + 1], targets int32[M, size, T + 1] and the domain of each."""

  train: np.ndarray
  targets: np.ndarray
  domain: np.ndarray
  target_domain: np.ndarray
  names: tuple[str, ...]


def read(source: Any, s: Settings) -> Data:
  """Pieces at random places of the documents of a `readers.Source`."""
  if len(source.domains) < s.domains:
    raise UserError(f'{source.label} has {len(source.domains)} domains; {s.domains} are needed')
  rng = np.random.default_rng(17)
  names = tuple(source.domains[: s.domains])
  each = s.examples // s.domains
  train, targets = [], []
  for name in names:
    cut = functools.partial(_pieces, rng, length=s.length + 1)
    train.append(cut(source.documents(name, 'train'), each, name))
    held = cut(source.documents(name, 'validation'), s.targets * s.target_size, name)
    targets.append(held.reshape(s.targets, s.target_size, -1))
  return Data(
    np.concatenate(train),
    np.concatenate(targets),
    np.repeat(np.arange(s.domains), each),
    np.repeat(np.arange(s.domains), s.targets),
    names,
  )


def _pieces(rng, documents: Iterator[Any], number: int, name: str, length: int) -> np.ndarray:
  texts = [d.text.encode('utf-8', 'replace') for d in documents]
  texts = [text for text in texts if len(text) > length]
  if not texts:
    raise UserError(f'domain {name} has no documents of {length} bytes in one of its splits')
  out = []
  for _ in range(number):
    text = texts[rng.integers(len(texts))]
    begin = rng.integers(len(text) - length)
    out.append(np.frombuffer(text, np.uint8, length, begin))
  return np.stack(out).astype(np.int32)


# Model --------------------------------------------------------------------------------------------


def initial(key: jax.Array, s: Settings) -> dict[str, Any]:
  """Parameters; linear layers are `kernel` and `bias`."""
  d = s.width

  def linear(key, rows, columns, scale=1.0):
    kernel = scale * jax.random.normal(key, (rows, columns)) / rows**0.5
    return {'kernel': kernel, 'bias': jnp.zeros(columns)}

  keys = iter(jax.random.split(key, 3 + 4 * s.layers))
  small = (2 * s.layers) ** -0.5
  return {
    'tokens': 0.1 * jax.random.normal(next(keys), (VOCAB, d)),
    'places': 0.1 * jax.random.normal(next(keys), (s.length, d)),
    'blocks': {
      str(i): {
        'qkv': linear(next(keys), d, 3 * d),
        'out': linear(next(keys), d, d, small),
        'up': linear(next(keys), d, 4 * d),
        'down': linear(next(keys), 4 * d, d, small),
      }
      for i in range(s.layers)
    },
    'head': linear(next(keys), d, VOCAB, 0.1),
  }


def forward(s: Settings, params, layer, batch) -> jax.Array:
  """Logits [B, T, VOCAB] of a pre-norm GPT that calls its linear layers through `layer`."""
  inputs = batch['tokens'][:, :-1]
  x = params['tokens'][inputs] + params['places']
  norm = functools.partial(jax.nn.standardize, epsilon=1e-5)
  split = lambda y: y.reshape(*y.shape[:2], s.heads, -1)
  for i in range(s.layers):
    q, k, v = map(split, jnp.split(layer(f'blocks/{i}/qkv', norm(x)), 3, axis=-1))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + layer(f'blocks/{i}/out', y.reshape(x.shape))
    x = x + layer(f'blocks/{i}/down', jax.nn.gelu(layer(f'blocks/{i}/up', norm(x))))
  return layer('head', norm(x))


def example_losses(s: Settings, params, tokens: jax.Array) -> jax.Array:
  """Mean cross entropy of each piece, float[B], in nats a byte."""
  logits = forward(s, params, attribution.layers(params), {'tokens': tokens})
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  return losses.mean(axis=1)


class Trainer:
  """One deterministic training run for each seed and vector of weights."""

  def __init__(self, s: Settings, data: Data):
    self.settings, self.data = s, data
    self.tokens, self.targets = jnp.asarray(data.train), jnp.asarray(data.targets)
    # Smooth, or metagradients say nothing of finite changes, and at 0 they would be NaN: a small
    # rate, and eps under the root.
    rate = optax.cosine_decay_schedule(s.rate, s.steps)
    self.optimizer = optax.adam(rate, eps_root=1e-6)
    self.rates = [float(rate(round((i + 0.5) * s.steps / CHECKPOINTS))) for i in range(CHECKPOINTS)]
    loss = lambda params, weights, tokens: jnp.mean(weights * example_losses(s, params, tokens))
    self._slope = attribution.mixed_grad(loss)
    self.run = jax.jit(self._run)
    self.target_losses = jax.jit(self._target_losses)

  def rows(self, seed: int) -> jax.Array:
    """Examples of every step, int32[steps, batch]."""
    s, rng = self.settings, np.random.default_rng([seed, 5])
    passes = -(-s.steps * s.batch // len(self.data.train))
    dealt = np.concatenate([rng.permutation(len(self.data.train)) for _ in range(passes)])
    return jnp.asarray(dealt[: s.steps * s.batch].reshape(s.steps, s.batch), jnp.int32)

  def start(self, seed: jax.Array | int) -> Any:
    params = initial(jax.random.key(seed), self.settings)
    return params, self.optimizer.init(params)

  def step(self, state: Any, weights: jax.Array, tokens: jax.Array) -> Any:
    params, moments = state
    updates, moments = self.optimizer.update(self._slope(params, weights, tokens), moments)
    return optax.apply_updates(params, updates), moments

  def _run(self, seed, rows: jax.Array, weights: jax.Array) -> Any:
    """Parameters at CHECKPOINTS points, the last at the end; weights float[n]."""

    def part(state, rows):
      move = lambda state, r: (self.step(state, weights[r], self.tokens[r]), None)
      state, _ = jax.lax.scan(move, state, rows)
      return state, state[0]

    parts = rows.reshape(CHECKPOINTS, -1, rows.shape[1])
    return jax.lax.scan(part, self.start(seed), parts)[1]

  def _target_losses(self, params) -> jax.Array:
    return jax.vmap(lambda t: example_losses(self.settings, params, t).mean())(self.targets)


# Scores -------------------------------------------------------------------------------------------


def _metagradient(trainer: Trainer, seed: int, path) -> tuple[Callable, tuple]:
  def run(start, rows, targets):
    def one(target):
      objective = lambda state: example_losses(trainer.settings, state[0], target).mean()
      _, slope = attribution.metagradient(
        trainer.step, objective, start, jnp.ones(rows.shape), trainer.tokens[rows]
      )
      return -attribution.add_up(slope, rows, len(trainer.tokens))

    return jax.lax.map(one, targets)

  return run, (trainer.start(seed), trainer.rows(seed), trainer.targets)


def _solved(trainer: Trainer, params, solve: Callable[[Any], Any]) -> Callable[[jax.Array], Any]:
  """target -> scores of all examples along solve(gradient of the target)."""
  losses = lambda p: example_losses(trainer.settings, p, trainer.tokens)

  def one(target):
    slope = jax.grad(lambda p: example_losses(trainer.settings, p, target).mean())(params)
    return attribution.influence(losses, params, solve(slope))

  return one


def _gradient(trainer: Trainer, seed: int, path) -> tuple[Callable, tuple]:
  last = jax.tree.map(lambda leaf: leaf[-1], path)
  run = lambda last, targets: jax.lax.map(_solved(trainer, last, lambda u: u), targets)
  return run, (last, trainer.targets)


def _tracin(trainer: Trainer, seed: int, path) -> tuple[Callable, tuple]:
  def run(path, targets):
    points = [jax.tree.map(lambda leaf, i=i: leaf[i], path) for i in range(CHECKPOINTS)]
    losses = lambda p: example_losses(trainer.settings, p, trainer.tokens)
    one = lambda target: attribution.tracin(
      losses, lambda p: example_losses(trainer.settings, p, target).mean(), points, trainer.rates
    )
    return jax.lax.map(one, targets)

  return run, (path, trainer.targets)


def _trak(trainer: Trainer, seed: int, path) -> tuple[Callable, tuple]:
  last = jax.tree.map(lambda leaf: leaf[-1], path)
  s = trainer.settings

  def margins(params, tokens):
    logits = forward(s, params, attribution.layers(params), {'tokens': tokens})
    return scores.logit_margin(logits, tokens[:, 1:]).mean(axis=1)

  def run(last, targets):
    features = lambda tokens: attribution.projected_gradients(
      jax.random.key(3), lambda p: margins(p, tokens), last, s.sketch
    )
    ours = features(trainer.tokens)
    theirs = features(targets.reshape(-1, targets.shape[-1]))
    theirs = theirs.reshape(*targets.shape[:2], -1).mean(axis=1)
    pulls = 1 - jnp.exp(-example_losses(s, last, trainer.tokens))
    damping = 1e-3 * jnp.trace(ours.T @ ours) / s.sketch
    kernel = ours.T @ ours + damping * jnp.eye(s.sketch)
    return theirs @ jnp.linalg.solve(kernel, ours.T) * pulls

  return run, (last, trainer.targets)


def _ekfac(trainer: Trainer, seed: int, path) -> tuple[Callable, tuple]:
  last, s = jax.tree.map(lambda leaf: leaf[-1], path), trainer.settings

  def run(key, last, targets):
    batches = [{'tokens': t} for t in jnp.split(trainer.tokens, s.examples // s.batch)]
    # Labels are drawn from the model.
    factors = attribution.ekfac(key, functools.partial(forward, s), last, batches)
    solve = functools.partial(attribution.ekfac_solve, factors)
    return jax.lax.map(_solved(trainer, last, solve), targets)

  return run, (jax.random.key(seed), last, trainer.targets)


def overlap(data: Data, buckets: int = 4096) -> np.ndarray:
  """Cosine between byte trigrams of each example and of a target: no model at all, float[M, n]."""

  def counts(tokens: np.ndarray) -> np.ndarray:
    flat = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    grams = (flat[..., :-2] * 65_599 + flat[..., 1:-1] * 257 + flat[..., 2:]) % buckets
    out = np.stack([np.bincount(g.reshape(-1), minlength=buckets) for g in grams]).astype(float)
    return out / np.linalg.norm(out, axis=1, keepdims=True)

  return counts(data.targets) @ counts(data.train).T


PROGRAMS = {
  'metagradient': _metagradient,
  'ekfac': _ekfac,
  'tracin': _tracin,
  'gradient': _gradient,
  'trak': _trak,
}
# In the order of the tables; the last two look at no model.
METHODS = ('metagradient', 'ekfac', 'trak', 'tracin', 'gradient', 'overlap', 'same domain')


class Truth(NamedTuple):
  """What happened: left_out bool[S, n], its share float[S], rise float[S, M] of target losses, and
  what these were with everything, float[M]."""

  left_out: np.ndarray
  share: np.ndarray
  rise: np.ndarray
  whole: np.ndarray


def left_out(s: Settings) -> tuple[np.ndarray, np.ndarray]:
  """Random subsets of every share, the same for all seeds."""
  rng = np.random.default_rng(23)
  masks, shares = [], []
  for share in s.left_out:
    size = max(1, round(share * s.examples))
    for _ in range(s.subsets):
      masks.append(np.isin(np.arange(s.examples), rng.permutation(s.examples)[:size]))
      shares.append(share)
  return np.stack(masks), np.array(shares)


def retrained(trainer: Trainer, seed: int, show: Callable[[Any], Any] = iter) -> Truth:
  """Trains without each subset."""
  masks, shares = left_out(trainer.settings)
  rows, all_ = trainer.rows(seed), jnp.ones(len(trainer.tokens))
  reached = lambda weights: np.asarray(
    trainer.target_losses(jax.tree.map(lambda p: p[-1], trainer.run(seed, rows, weights))),
    np.float64,
  )
  whole = reached(all_)
  rise = np.stack([reached(jnp.asarray(1.0 - mask)) - whole for mask in show(masks)])
  return Truth(masks, shares, rise, whole)


def scored(trainer: Trainer, seed: int, method: str) -> tuple[np.ndarray, float]:
  """(scores float[M, n], cost in matrix products of one training run)."""
  if method == 'overlap':
    return overlap(trainer.data), 0.0
  if method == 'same domain':
    same = trainer.data.target_domain[:, None] == trainer.data.domain
    return same.astype(float), 0.0
  path = trainer.run(seed, trainer.rows(seed), jnp.ones(len(trainer.tokens)))
  function, arguments = PROGRAMS[method](trainer, seed, path)
  program = jax.jit(function).lower(*arguments).compile()
  found = np.asarray(program(*arguments), np.float64)
  return found, compiled.costs(program).matmul_flops / run_flops(trainer)


def one_seed(trainer: Trainer, seed: int, show: Callable[[Any], Any] = iter) -> dict[str, Any]:
  """The truth, and scores and cost of every method, as arrays by name."""
  out: dict[str, Any] = retrained(trainer, seed, show)._asdict()
  for name in METHODS:
    out[f'scores {name}'], cost = scored(trainer, seed, name)
    out[f'cost {name}'] = np.array(cost)
  return out


@functools.lru_cache(maxsize=2)
def run_flops(trainer: Trainer) -> int:
  """Floating-point operations in the matrix products of one training run."""
  arguments = (0, trainer.rows(0), jnp.ones(len(trainer.tokens)))
  return compiled.costs(trainer.run.lower(*arguments).compile()).matmul_flops


def agreement(values: np.ndarray, truth: Truth, share: float) -> float:
  """LDS: mean over targets of the rank correlation, over subsets, of foretold and actual rise."""
  chosen = truth.share == share
  foretold = truth.left_out[chosen] @ values.T
  return float(
    np.mean([stats.rank_correlation(f, r) for f, r in zip(foretold.T, truth.rise[chosen].T)])
  )


def others(truths: Sequence[Truth], i: int) -> Truth:
  """The mean rise over the runs with other seeds: initial parameters and order differ."""
  rest = [t.rise for j, t in enumerate(truths) if j != i]
  return truths[i]._replace(rise=np.mean(rest, axis=0))
