"""Does it help? Small experiments with known answers: attacks, trimming, weights of outputs.

Each prints its table (`pytest -m slow -s`) and asserts the direction only.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw
from jaxrw.adversarial import pgd_linf

pytestmark = pytest.mark.slow
SEEDS = 3


def mlp_init(key, sizes):
  keys = jax.random.split(key, len(sizes))
  return [
    (jax.random.normal(k, (a, b)) * np.sqrt(2 / a), jnp.zeros(b))
    for k, a, b in zip(keys, sizes, sizes[1:])
  ]


def mlp(params, x):
  for w, b in params[:-1]:
    x = jax.nn.relu(x @ w + b)
  w, b = params[-1]
  return x @ w + b


# --- adversarial training with rare classes

COUNTS, WIDTH, EPS = (600, 600, 600, 24, 24), 10, 0.35


def classes(key, separation, counts):
  """(x, y): five Gaussian classes of unit noise; the means come from one key for all sets."""
  means = separation * jax.random.normal(jax.random.key(100), (5, WIDTH))
  y = jnp.repeat(jnp.arange(5), jnp.array(counts), total_repeat_length=sum(counts))
  return means[y] + jax.random.normal(key, (y.size, WIDTH)), y


def ce(params, x, y):
  return jaxrw.losses.cross_entropy(mlp(params, x), y)


def adversarial_training(seed, separation, start, steps=400):
  """Robust accuracy (majority, minority, all); class weights from step `start` on."""
  key = jax.random.key(seed)
  x, y = classes(jax.random.fold_in(key, 1), separation, COUNTS)
  params = mlp_init(jax.random.fold_in(key, 2), (WIDTH, 64, 64, 5))
  tx = optax.adam(3e-3)
  attack = partial(pgd_linf, ce, eps=EPS, bounds=(-np.inf, np.inf))
  weights = jaxrw.effective_number_weights(COUNTS)

  def step(carry, t):
    params, opt_state = carry
    now = jax.random.fold_in(key, 1000 + t)
    rows = jax.random.randint(now, (128,), 0, y.size)
    xs, ys = x[rows], y[rows]
    xs = attack(params, xs, ys, step=0.14, steps=5, key=now)

    def loss(params):
      return jnp.mean(jnp.where(t >= start, weights[ys], 1) * ce(params, xs, ys))

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
  x, y = classes(jax.random.fold_in(key, 3), separation, (200,) * 5)
  x = attack(params, x, y, step=0.05, steps=15, key=key)
  right = jnp.argmax(mlp(params, x), 1) == y
  by_class = jnp.mean(right.reshape(5, 200), axis=1)
  return jnp.stack([by_class[:3].mean(), by_class[3:].mean(), by_class.mean()])


def test_weights_cost_the_majority_where_classes_overlap():
  """The minority gains from weights; what the majority pays for it depends on the overlap."""
  robust = {}
  for separation in (0.9, 1.6):
    for name, start in (('plain', 400), ('weighted', 0), ('deferred', 240)):
      run = jax.vmap(partial(adversarial_training, separation=separation, start=start))
      robust[separation, name] = np.mean(jax.jit(run)(jnp.arange(SEEDS)), axis=0)
      print(separation, name, np.round(robust[separation, name], 3))
  cost = {s: robust[s, 'plain'][0] - robust[s, 'weighted'][0] for s in (0.9, 1.6)}
  assert cost[0.9] > cost[1.6] + 0.02
  for separation in (0.9, 1.6):
    for name in ('weighted', 'deferred'):
      assert robust[separation, name][1] > robust[separation, 'plain'][1]


# --- trimming the ranking loss under noise


USERS, ITEMS, TRAIN = 150, 600, 16
NOISES = (0.0, 0.3, 0.5)


def tastes(seed, noise):
  """(training items [USERS, TRAIN], some of them random; liked items held out [USERS, 8])."""
  rng = np.random.default_rng(seed)
  taste, item = rng.normal(size=(USERS, 4)), rng.normal(size=(ITEMS, 4))
  appeal = taste @ item.T + 0.5 * rng.normal(size=(USERS, ITEMS))
  liked = rng.permuted(np.argsort(-appeal, axis=1)[:, : TRAIN + 8], axis=1)
  random = rng.random((USERS, TRAIN)) < noise
  return np.where(random, rng.integers(0, ITEMS, random.shape), liked[:, :TRAIN]), liked[:, TRAIN:]


def ranking_scores(positives, seed, share, side, steps=1000):
  """Matrix factorization by BPR, against items the user was not seen with; those score -inf."""
  u, v, k = jax.random.split(jax.random.key(seed), 3)
  params = (0.1 * jax.random.normal(u, (USERS, 16)), 0.1 * jax.random.normal(v, (ITEMS, 16)))
  seen = jnp.zeros((USERS, ITEMS), bool).at[jnp.arange(USERS)[:, None], positives].set(True)
  tx = optax.adamw(1e-2, weight_decay=1e-2)

  def step(carry, key):
    params, opt_state = carry
    a, b, c = jax.random.split(key, 3)
    who = jax.random.randint(a, (512,), 0, USERS)
    good = positives[who, jax.random.randint(b, (512,), 0, TRAIN)]
    first, second = jax.random.randint(c, (2, 512), 0, ITEMS)
    bad = jnp.where(seen[who, first], second, first)

    def loss(params):
      u, v = params
      score = lambda item: jnp.sum(u[who] * v[item], axis=1)
      losses = jaxrw.losses.bpr(score(good), score(bad))
      return jnp.mean(jaxrw.trimmed_weights(losses, share, side) * losses)

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  start = params, tx.init(params)
  (params, _), _ = jax.lax.scan(step, start, jax.random.split(k, steps))
  return jnp.where(seen, -jnp.inf, params[0] @ params[1].T)


def recalls(share, side, seeds=2):
  """recall@20 by noise, the mean over seeds."""
  sets = [tastes(seed, noise) for noise in NOISES for seed in range(seeds)]
  positives = jnp.stack([train for train, _ in sets])
  run = jax.jit(jax.vmap(partial(ranking_scores, share=share, side=side)))
  scores = np.asarray(run(positives, jnp.tile(jnp.arange(seeds), len(NOISES))))
  top = np.argsort(-scores, axis=2)[..., :20]
  hits = [
    np.mean([np.isin(t, b) for t, b in zip(held, best)]) for (_, held), best in zip(sets, top)
  ]
  return np.reshape(hits, (len(NOISES), seeds)).mean(axis=1)


def test_which_side_of_the_ranking_loss_to_keep():
  """Dropping the easy half costs nothing, as it has nothing left to say; dropping the hardest fifth
  costs much without noise, and does not pay with it."""
  everything, high, low = recalls(1.0, 'high'), recalls(0.5, 'high'), recalls(0.8, 'low')
  print('noise', NOISES, 'all', everything, 'high half', high, 'low four fifths', low)
  assert np.all(high > everything - 0.02)
  assert np.all(low < everything)
  assert low[0] < everything[0] - 0.05


# --- weights for each output of a dense binary prediction


def output_weights(labels, cap):
  """Weights [V, 2] of labels 0 and 1: effective numbers of counts scaled to 1000 per output,
  blended with those of all outputs together, of sum 1 (vertex-level class balance)."""
  ones = 1000 * np.mean(labels, axis=0)
  ones = cap * ones + (1 - cap) * ones.mean()
  counts = np.maximum(np.stack([1000 - ones, ones], axis=1), 20)
  counts *= 1000 / counts.sum(axis=1, keepdims=True)
  raw = (1 - 0.9999) / (1 - 0.9999**counts)
  return raw / raw.sum(axis=1, keepdims=True)


def precision_recall(predicted, labels):
  hits = np.sum(predicted & labels)
  return hits / max(1, predicted.sum()), hits / labels.sum()


def test_output_weights_trade_precision_for_recall():
  """120 outputs, a third each of base rate .35, .08, .015; the model is well specified. Recall on
  the rare third rises, F1 at threshold 0.5 does not."""
  outcome = {}
  for seed in range(2):
    rng = np.random.default_rng(seed)
    rates = np.repeat([0.35, 0.08, 0.015], 40)
    truth = rng.normal(size=(20, 120)) / np.sqrt(20) * 4
    x = rng.normal(size=(6000, 20))
    lines = x @ truth
    shifted = rng.logistic(size=lines.shape) - lines  # the quantile gives each output its rate
    offset = np.array([np.quantile(shifted[:, v], r) for v, r in enumerate(rates)])
    labels = lines + offset + rng.logistic(size=lines.shape) > 0
    tables = {
      'plain': np.full((120, 2), 0.5),
      'shared': output_weights(labels[:4000], 0.0),
      'blended': output_weights(labels[:4000], 0.3),
      'own': output_weights(labels[:4000], 1.0),
    }
    features, targets = jnp.asarray(x[:4000], jnp.float32), jnp.asarray(labels[:4000])

    @jax.jit
    def fit(table, features=features, targets=targets):
      weights = jnp.where(targets, table[:, 1], table[:, 0])
      tx = optax.adam(0.1)

      def loss(params):
        z = features @ params[0] + params[1]
        bce = optax.losses.sigmoid_binary_cross_entropy(z, targets)
        return jnp.sum(jnp.mean(weights * bce, axis=0))

      def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

      start = jnp.zeros((20, 120)), jnp.zeros(120)
      return jax.lax.scan(step, (start, tx.init(start)), length=200)[0][0]

    for name, table in tables.items():
      w, b = fit(jnp.asarray(table, jnp.float32))
      predicted = np.asarray(x[4000:] @ w + b > 0)
      p, r = precision_recall(predicted, labels[4000:])
      rare = precision_recall(predicted[:, 80:], labels[4000:, 80:])[1]
      outcome.setdefault(name, []).append([p, r, 2 * p * r / (p + r), rare])
  outcome = {name: np.mean(rows, axis=0) for name, rows in outcome.items()}
  for name, row in outcome.items():
    print(name, 'precision, recall, F1, recall on the rare third', np.round(row, 3))
  assert outcome['plain'][3] + 0.1 < outcome['shared'][3] < outcome['own'][3]
  assert outcome['plain'][2] > max(outcome[name][2] for name in ('shared', 'blended', 'own'))
