"""Contrastive losses against double loops and their limits; clusters against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrw import contrastive, masked
from jaxrw.contrastive import balanced_assign, balanced_kmeans, subclass_counts

ROWS, WIDTH = 16, 4
supcon, sbcl = jax.jit(contrastive.supcon), jax.jit(contrastive.sbcl)


@pytest.fixture(scope='module')
def batch():
  """Two views of 8 examples; classes 0 (subclasses 0 and 1), 1 (one) and 2 (one example)."""
  z = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
  labels, subclasses = np.array([0, 0, 0, 0, 1, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0, 0, 0])
  return z, np.tile(labels, 2), np.tile(subclasses, 2), np.tile(np.arange(8), 2)


def loop(z, is_positive, is_compared, temperature):
  """(losses, valid), pair by pair, in float64."""
  z = np.asarray(z, np.float64)
  cosine = lambda i, j: z[i] @ z[j] / np.sqrt((z[i] @ z[i]) * (z[j] @ z[j]))
  losses, valid = [], []
  for i in range(len(z)):
    others = [j for j in range(len(z)) if j != i]
    positives = [p for p in others if is_positive(i, p)]
    sum_exp = sum(np.exp(cosine(i, a) / temperature(i)) for a in others if is_compared(i, a))
    terms = [-np.log(np.exp(cosine(i, p) / temperature(i)) / sum_exp) for p in positives]
    losses.append(np.mean(terms) if terms else 0.0)
    valid.append(bool(terms))
  return np.array(losses), np.array(valid)


def always(i, j):
  return True


def test_supcon_equals_a_double_loop(batch):
  z, labels, *_ = batch
  labels = np.where(np.arange(ROWS) == 15, 3, labels)  # two classes of one row
  expected, has = loop(z, lambda i, p: labels[i] == labels[p], always, lambda i: 0.3)
  losses, valid = supcon(z, labels, None, 0.3)
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(valid, has)
  assert has.sum() == ROWS - 2


def test_any_masks_and_a_temperature_for_each_anchor(batch):
  z = batch[0]
  rng = np.random.default_rng(1)
  positives = rng.random((ROWS, ROWS)) < 0.2
  denominators = positives | (rng.random((ROWS, ROWS)) < 0.4)
  temperature = rng.uniform(0.2, 1, ROWS)
  expected, has = loop(
    z, lambda i, p: positives[i, p], lambda i, a: denominators[i, a], lambda i: temperature[i]
  )
  losses, valid = supcon(z, positives, denominators, temperature.astype(np.float32))
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(valid, has)


def test_two_views_with_the_example_as_label_are_nt_xent(batch):
  """NT-Xent as a cross entropy over 2B - 1 classes, the right one being the other view."""
  z, _, _, views = batch
  losses, _ = supcon(z, views, None, 0.5)
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  logits = np.where(np.eye(ROWS), -np.inf, unit @ unit.T / 0.5)
  log_probs = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(
    losses, -log_probs[np.arange(ROWS), (np.arange(ROWS) + 8) % ROWS], rtol=1e-5
  )


def test_permuting_rows_permutes_losses_and_scaling_them_does_nothing(batch):
  z, labels, *_ = batch
  order = np.random.default_rng(2).permutation(ROWS)
  losses, _ = supcon(z, labels)
  np.testing.assert_allclose(supcon(z[order], labels[order])[0], losses[order], rtol=1e-5)
  np.testing.assert_allclose(supcon(7 * z, labels)[0], losses, rtol=1e-5)


def test_an_anchor_without_positives_is_0_where_the_plain_formula_is_nan():
  z = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 0.0]])
  labels = jnp.array([0, 0, 1])

  @jax.jit
  def naive(z):
    same = (labels[:, None] == labels) & ~jnp.eye(3, dtype=bool)
    logits = jnp.where(jnp.eye(3, dtype=bool), -jnp.inf, z @ z.T)
    log_probs = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    return jnp.mean(-jnp.sum(jnp.where(same, log_probs, 0), 1) / jnp.sum(same, 1))

  def ours(z):
    losses, valid = supcon(z, labels)
    return masked.mean(losses, valid)

  assert np.isnan(naive(z))
  value, slope = jax.jit(jax.value_and_grad(ours))(z)
  two = supcon(z, labels)[0][:2]
  np.testing.assert_allclose(value, jnp.mean(two), rtol=1e-6)
  assert np.all(np.isfinite(slope))  # the row of zeros, too
  nobody, valid = supcon(z, jnp.array([-1, -1, -1]))
  assert not valid.any()
  np.testing.assert_array_equal(nobody, np.zeros(3))


def test_padding_is_neither_anchor_nor_compared_with(batch):
  z, labels, *_ = batch
  base = (np.arange(ROWS) < 12).astype(np.float32)
  dirty = np.where(base[:, None] > 0, z, np.nan)
  losses, valid = supcon(dirty, labels, base=base)
  expected, has = supcon(z[:12], labels[:12])
  np.testing.assert_allclose(losses[:12], expected, rtol=1e-5)
  np.testing.assert_array_equal(valid, np.append(has, [False] * 4))
  slope = jax.grad(lambda z: jnp.sum(supcon(z, labels, base=base)[0]))(dirty)
  assert np.all(np.isfinite(slope))


def test_sbcl_equals_a_double_loop(batch):
  z, labels, subclasses, views = batch
  of_class = np.array([0.2, 0.1, 0.15], np.float32)
  same = lambda i, j: labels[i] == labels[j] and subclasses[i] == subclasses[j]
  view = lambda i, j: views[i] == views[j]
  near, _ = loop(z, same, always, lambda i: 0.1)
  far, _ = loop(
    z,
    lambda i, p: (labels[i] == labels[p] and not same(i, p)) or view(i, p),
    lambda i, a: not same(i, a) or view(i, a),
    lambda i: of_class[labels[i]],
  )
  losses, valid = sbcl(z, labels, subclasses, views, 0.1, of_class, 0.25)
  np.testing.assert_allclose(losses, 0.1 / 0.07 * near + 0.25 * far, rtol=1e-5)
  assert valid.all()
  swapped = np.where(labels == 0, 1 - subclasses, subclasses)
  np.testing.assert_array_equal(sbcl(z, labels, swapped, views, 0.1, of_class, 0.25)[0], losses)
  unique = subclasses + np.array([0, 2, 3])[labels]
  np.testing.assert_array_equal(sbcl(z, labels, unique, views, 0.1, of_class, 0.25)[0], losses)


def test_sbcl_of_classes_in_one_piece(batch):
  """T1 is SupCon on classes; T2 is the pair of views among other classes."""
  z, labels, _, views = batch
  whole = np.zeros(ROWS, int)
  t1, _ = sbcl(z, labels, whole, views, 0.1, gamma=0.0)
  np.testing.assert_allclose(t1, supcon(z, labels)[0] / 0.7, rtol=1e-5)
  both, _ = sbcl(z, labels, whole, views, 0.1, gamma=1.0)
  view = lambda i, j: views[i] == views[j]
  pairs, _ = loop(z, view, lambda i, a: labels[i] != labels[a] or view(i, a), lambda i: 0.1)
  np.testing.assert_allclose(both - t1, pairs, rtol=1e-4, atol=1e-5)


def test_sbcl_without_views_and_with_unknown_labels(batch):
  z, labels, subclasses, views = batch
  labels = np.where(np.arange(ROWS) % 8 == 7, -1, labels)
  losses, valid = sbcl(z, labels, subclasses, class_temperatures=np.full(3, 0.2, np.float32))
  np.testing.assert_array_equal(valid, labels != -1)
  assert np.all(np.isfinite(losses))
  _, valid = sbcl(z, labels, subclasses, views)
  assert valid.all()


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_compare_with_the_whole_batch(batch, axis_type):
  @jax.jit
  def value(z, labels, subclasses, views):
    def loss(z):
      losses, valid = contrastive.sbcl(z, labels, subclasses, views)
      return masked.mean(losses, valid.astype(losses.dtype)), losses

    return jax.value_and_grad(loss, has_aux=True)(z)

  alone = value(*batch)
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    together = value(*jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data'))))
  for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'z': np.zeros(3)}, 'z must be'),
    ({'positives': np.zeros(4, int)}, 'positives has shape'),
    ({'denominators': np.zeros((3, 2), bool)}, 'denominators has shape'),
    ({'temperature': 0.0}, 'temperature=0.0'),
    ({'temperature': np.ones(2)}, 'temperature has shape'),
    ({'base': np.ones((3, 1))}, 'base has shape'),
  ],
)
def test_bad_input_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    contrastive.supcon(**{'z': np.ones((3, 2)), 'positives': np.zeros(3, int), **change})


def test_bad_input_of_sbcl_is_named():
  z, ids = np.ones((3, 2)), np.zeros(3, int)
  with pytest.raises(ValueError, match='gamma=-1'):
    contrastive.sbcl(z, ids, ids, gamma=-1)
  with pytest.raises(ValueError, match='views has shape'):
    contrastive.sbcl(z, ids, ids, ids[:2])


def test_subclass_counts():
  np.testing.assert_array_equal(subclass_counts([5000, 300, 39, 12, 3], 20), [250, 15, 1, 1, 1])
  np.testing.assert_array_equal(subclass_counts([100, 60, 30]), [3, 2, 1])  # the rarest: 30
  with pytest.raises(ValueError, match='minimum=0'):
    subclass_counts([3], 0)


@pytest.mark.parametrize('rows', [7, 12])
def test_balanced_assignment_is_the_greedy_one(rows):
  """Again and again the best pair that is still allowed, by search over all pairs."""
  similarity = np.random.default_rng(rows).integers(0, 5, (rows, 3)) / 4  # with ties
  expected, sizes = np.full(rows, -1), [0, 0, 0]
  for full in (rows // 3, rows // 3 + 1):
    while pairs := [
      (-similarity[i, c], i, c)
      for i in range(rows)
      for c in range(3)
      if expected[i] == -1 and sizes[c] < full
    ]:
      _, i, c = min(pairs)
      expected[i] = c
      sizes[c] += 1
  found = balanced_assign(similarity)
  np.testing.assert_array_equal(found, expected)
  assert np.ptp(np.bincount(found, minlength=3)) <= 1


def test_bad_clusters_are_named():
  with pytest.raises(ValueError, match='similarity holds NaN'):
    balanced_assign([[np.nan, 1.0]])
  with pytest.raises(ValueError, match='similarity has shape'):
    balanced_assign(np.ones(3))
  with pytest.raises(ValueError, match='clusters=4 must be between 1 and the 3 rows'):
    balanced_kmeans(np.ones((3, 2)), 4)


def test_five_planted_blobs_are_found():
  rng = np.random.default_rng(0)
  blobs = np.repeat(np.arange(5), 40)
  features = np.linalg.qr(rng.normal(size=(8, 8)))[0][blobs] + 0.1 * rng.normal(size=(200, 8))
  for seed in range(5):
    found = balanced_kmeans(features, 5, seed=seed)
    table = np.array([[np.sum((found == c) & (blobs == b)) for b in range(5)] for c in range(5)])
    assert table.max(axis=1).sum() == 200, f'purity {table.max(axis=1).sum() / 200}'
    assert np.all(table.sum(axis=1) == 40)
  np.testing.assert_array_equal(balanced_kmeans(features, 5, seed=4), found)
  assert np.ptp(np.bincount(balanced_kmeans(np.ones((7, 2)), 3))) == 1  # all the same


def test_class_temperatures_follow_the_spread():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(6), [80, 60, 40, 20, 10, 5])
  features = rng.normal(size=(215, 3)) * (1 + labels)[:, None]
  pieces = np.array([8, 6, 4, 2, 1, 1])
  phi = []
  for c in range(6):
    own = [f for f, y in zip(features, labels) if y == c]
    center = sum(own) / len(own)
    phi.append(sum(np.sqrt(sum((f - center) ** 2)) for f in own) / len(own) / np.log(len(own) + 10))
  low, high = np.percentile(phi, 20), np.percentile(phi, 80)
  phi = [min(max(p, low), high) for p in phi]
  expected = [0.1 * p / np.mean(phi) if m > 1 else 0.1 for p, m in zip(phi, pieces)]
  found = contrastive.class_temperatures(features, labels, pieces, 0.1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  same = contrastive.class_temperatures(np.ones((4, 2)), [0, 0, 1, 1], np.array([2, 2]))
  np.testing.assert_allclose(same, 0.1)
  with pytest.raises(ValueError, match='class 1 has no examples'):
    contrastive.class_temperatures(features[:9], np.zeros(9, int), np.array([2, 1]))
