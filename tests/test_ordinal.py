"""PRESTO against scipy, scikit-learn, its optimality conditions and its limits; a slow pilot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy import optimize
from scipy.special import expit

from jaxrw import ordinal
from jaxrw.ordinal import OrdinalFit, penalty_path, presto_probabilities, prox_l1

COLUMNS, LEVELS = 4, 4


def fit(x, y, penalty, levels=LEVELS, **kwargs):
  """Compiled once for all penalties."""
  return ordinal.presto_fit(x, y, levels, np.float64(penalty), tolerance=1e-9, **kwargs)


@pytest.fixture(autouse=True)
def _in_float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='module')
def data():
  """Columns off center and of different scales; the second line has a slope of its own."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, COLUMNS)) * [1, 0.5, 2, 1] + [3, -1, 0, 2]
  return x, levels_of(rng, x - [3, -1, 0, 2], np.array([[0.5, 0, 0.2, 0], [0, 0.8, 0, 0], [0] * 4]))


def levels_of(rng, x, differences, intercepts=(0, 1.5, 3)):
  lines = np.array(intercepts) + x @ np.cumsum(differences, axis=0).T
  return (rng.random((len(x), 1)) > expit(lines)).sum(axis=1)


def standardized(x):
  return (x - x.mean(axis=0)) / x.std(axis=0)


def test_losses_are_minus_log_differences_of_sigmoids(data):
  x, y = data
  rng = np.random.default_rng(1)
  a, psi = np.array([0.0, 1.5, 3.0]), 0.05 * rng.normal(size=(3, COLUMNS))
  losses = jax.jit(ordinal.cumulative_logit_losses)(a, psi, x, y)
  for row in range(len(y)):
    beta = np.zeros(COLUMNS)
    lines = [-np.inf]
    for k in range(3):
      beta = beta + psi[k]
      lines.append(a[k] + x[row] @ beta)
    lines.append(np.inf)
    p = expit(lines[y[row] + 1]) - expit(lines[y[row]])
    np.testing.assert_allclose(losses[row], -np.log(p), rtol=1e-9)
  p = presto_probabilities(OrdinalFit(a, psi, 0), x)
  np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
  np.testing.assert_allclose(-np.log(p[np.arange(300), y]), losses, rtol=1e-9)


def test_far_tails_keep_their_digits():
  """The difference of sigmoids is 0 where the formula in logarithms has a value."""
  a, psi, x = np.array([40.0, 41.0]), np.zeros((2, 1)), np.zeros((3, 1))
  losses = ordinal.cumulative_logit_losses(a, psi, x, jnp.array([0, 1, 2]))
  np.testing.assert_allclose(losses[1:], [40 - np.log(1 - np.exp(-1)), 41], rtol=1e-12)
  assert expit(41.0) - expit(40.0) == 0
  p = presto_probabilities(OrdinalFit(a, psi, 0), x)
  np.testing.assert_allclose(-np.log(p[0, 1:]), losses[1:], rtol=1e-9)


def test_crossing_lines_have_infinite_loss_and_are_shown():
  a, psi = np.array([0.0, 1.0]), np.array([[0.0], [-1.0]])
  x = np.array([[0.0], [2.0]])  # the lines meet at 1
  value = lambda psi: ordinal.cumulative_logit_losses(a, psi, x, jnp.array([1, 1]))
  losses = value(psi)
  assert np.isfinite(losses[0])
  assert losses[1] == np.inf
  assert np.all(np.isfinite(jax.jit(jax.jacrev(value))(psi)))
  p = presto_probabilities(OrdinalFit(a, psi, 0), x)
  np.testing.assert_array_equal((p < 0).any(axis=1), [False, True])
  np.testing.assert_allclose(p.sum(axis=1), 1)
  np.testing.assert_allclose(p[1, 1], expit(-1.0) - expit(0.0))


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_compute_the_losses_of_one(data, axis_type):
  x, y = data[0][:16], data[1][:16]
  model = np.array([0.0, 1.5, 3.0]), np.full((3, COLUMNS), 0.01)
  losses = jax.jit(ordinal.cumulative_logit_losses)
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    rows = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec('data')))
    together = losses(*jax.device_put(model, NamedSharding(mesh, PartitionSpec())), *rows)
  np.testing.assert_allclose(together, losses(*model, x, y), rtol=1e-12)


def test_prox_minimizes_what_it_says():
  grid = np.linspace(-3, 3, 60_001)
  for x in (-2.0, -0.3, 0.0, 0.7, 1.4):
    best = grid[np.argmin((grid - x) ** 2 / 2 + 0.7 * np.abs(grid))]
    np.testing.assert_allclose(prox_l1(jnp.float64(x), 0.7), best, atol=1e-4)


def test_an_infinite_penalty_on_all_but_the_first_is_proportional_odds(data):
  x, y = data

  def loss(v):  # three increasing intercepts, one slope vector
    a = np.cumsum([v[0], np.exp(v[1]), np.exp(v[2])])
    cumulative = np.hstack([np.zeros((300, 1)), expit(a + (x @ v[3:])[:, None]), np.ones((300, 1))])
    return -np.mean(np.log(np.diff(cumulative)[np.arange(300), y]))

  best = optimize.minimize(loss, np.zeros(3 + COLUMNS), method='BFGS', options={'gtol': 1e-7}).x
  found = fit(x, y, np.inf, penalize_first=False)
  np.testing.assert_allclose(found.differences[0], best[3:], atol=1e-4)
  np.testing.assert_array_equal(found.differences[1:], 0)
  a = np.cumsum([best[0], np.exp(best[1]), np.exp(best[2])])
  np.testing.assert_allclose(found.intercepts, a, atol=2e-4)


@pytest.mark.parametrize('penalty', [0.0, 0.03])
def test_two_levels_are_logistic_regression(data, penalty):
  """P(y <= 0) is scikit-learn's class 1 of y == 0; its C is 1 / (n penalty)."""
  from sklearn.linear_model import LogisticRegression

  z, target = standardized(data[0]), (data[1] == 0).astype(int)
  strength = {'C': 1 / (300 * penalty)} if penalty else {'C': np.inf}
  peer = LogisticRegression(
    solver='saga', l1_ratio=1.0, tol=1e-9, max_iter=20_000, random_state=0, **strength
  ).fit(z, target)
  found = fit(z, 1 - target, penalty, levels=2)
  np.testing.assert_allclose(found.differences, peer.coef_, atol=1e-5)
  np.testing.assert_allclose(found.intercepts, peer.intercept_, atol=1e-5)
  assert penalty == 0 or 0 < np.count_nonzero(found.differences) < COLUMNS


@pytest.mark.parametrize('penalize_first', [True, False])
def test_optimality_conditions(data, penalize_first):
  """|slope| <= penalty at zeros, slope = -penalty * sign elsewhere, 0 for what is free."""
  z, y = standardized(data[0]), data[1]
  penalty = 0.01
  found = fit(z, y, penalty, penalize_first=penalize_first)
  mean = lambda a, psi: jnp.mean(ordinal.cumulative_logit_losses(a, psi, z, y))
  of_a, of_psi = jax.jit(jax.grad(mean, argnums=(0, 1)))(found.intercepts, found.differences)
  psi, free = np.asarray(found.differences), 0 if penalize_first else 1
  np.testing.assert_allclose(of_a, 0, atol=1e-6)
  np.testing.assert_allclose(of_psi[:free], 0, atol=1e-6)
  psi, of_psi = psi[free:], np.asarray(of_psi)[free:]
  assert 0 < np.count_nonzero(psi) < psi.size
  assert np.all(np.abs(of_psi[psi == 0]) <= penalty + 1e-6)
  np.testing.assert_allclose(of_psi[psi != 0], -penalty * np.sign(psi[psi != 0]), atol=1e-6)
  assert found.iterations < 2000


@pytest.mark.parametrize('penalize_first', [True, False])
def test_the_path_starts_where_the_first_difference_appears(data, penalize_first):
  x, y = data
  free = 0 if penalize_first else 1
  path = penalty_path(x, y, LEVELS, penalize_first=penalize_first, count=3)
  np.testing.assert_allclose(path / path[0], [1, 0.1, 0.01], rtol=1e-6)
  at = lambda penalty: fit(x, y, penalty, penalize_first=penalize_first).differences[free:]
  np.testing.assert_array_equal(at(path[0] * 1.0001), 0)
  assert np.count_nonzero(at(path[0] * 0.99)) == 1


def test_slopes_return_to_their_units_with_all_differences_up_to_them(data):
  """The published code shifts intercept k by psi_k alone: fine for the first line, wrong above."""
  x, y = data
  mean, sd = x.mean(axis=0), x.std(axis=0)
  inside = fit(standardized(x), y, 0.005)
  ours = fit(x, y, 0.005)
  expected = presto_probabilities(inside, standardized(x))
  np.testing.assert_allclose(presto_probabilities(ours, x), expected, atol=1e-6)

  psi = np.asarray(inside.differences) / sd
  naive = OrdinalFit(inside.intercepts - psi @ mean, psi, 0)
  lines = lambda f: np.asarray(ordinal._lines(f.intercepts, f.differences, x))
  np.testing.assert_allclose(lines(naive)[:, 0], lines(ours)[:, 0], atol=1e-5)
  assert np.abs(lines(naive)[:, 1:] - lines(ours)[:, 1:]).min() > 0.5


def test_weights_count_rows(data):
  """Weight 2 is the row twice; weight 0 is a row that is not there, whatever it holds."""
  x, y = data
  counts = np.random.default_rng(2).integers(0, 3, 300).astype(float)
  dirty = np.where(counts[:, None] > 0, x, np.nan)
  twice = np.repeat(np.arange(300), counts.astype(int))
  weighted = fit(dirty, y, 0.005, weights=counts)
  repeated = fit(x[twice], y[twice], 0.005)
  np.testing.assert_allclose(weighted.differences, repeated.differences, atol=1e-6)
  np.testing.assert_allclose(weighted.intercepts, repeated.intercepts, atol=1e-6)


def test_reversing_the_levels_reverses_the_model(data):
  """Where the first difference is free; a penalized one makes its end of the order special."""
  x, y = data

  def both(penalize_first, penalty):
    one = fit(x, y, penalty, penalize_first=penalize_first)
    other = fit(x, LEVELS - 1 - y, penalty, penalize_first=penalize_first)
    slopes = [np.cumsum(f.differences, axis=0) for f in (one, other)]
    return one.intercepts, -other.intercepts[::-1], slopes[0], -slopes[1][::-1]

  a, mirrored_a, beta, mirrored_beta = both(False, 0.005)
  np.testing.assert_allclose(a, mirrored_a, atol=1e-5)
  np.testing.assert_allclose(beta, mirrored_beta, atol=1e-5)
  _, _, beta, mirrored_beta = both(True, 0.02)
  assert np.abs(beta - mirrored_beta).max() > 0.01


def test_float32_a_constant_column_and_a_whole_path_at_once(data):
  x, y = data
  with jax.enable_x64(False):
    x32 = np.column_stack([x, np.full(300, 7.0)]).astype(np.float32)
    path = jnp.array([0.05, 0.01, 0.001])
    found = jax.jit(jax.vmap(lambda p: ordinal.presto_fit(x32, y, LEVELS, p)))(path)
    assert found.intercepts.dtype == jnp.float32
    assert np.all(found.iterations < 2000)
    np.testing.assert_array_equal(found.differences[..., -1], 0)
  for at, penalty in enumerate([0.05, 0.01, 0.001]):
    np.testing.assert_allclose(
      found.differences[at, :, :-1], fit(x, y, penalty).differences, atol=2e-3
    )


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'num_levels': 1}, ValueError, 'num_levels=1'),
    ({'penalty': -0.1}, ValueError, 'penalty=-0.1'),
    ({'y': np.array([0, 1, 3])}, IndexError, 'y holds 3'),
    ({'y': np.array([0, 1, 1])}, ValueError, 'y has no row of level 2'),
    ({'y': np.array([0, 1])}, ValueError, 'y \\(2,\\)'),
    ({'weights': np.ones(2)}, ValueError, 'weights has shape'),
  ],
)
def test_bad_input_is_named(change, error, message):
  good = {'x': np.ones((3, 2)), 'y': np.arange(3), 'num_levels': 3, 'penalty': 0.1}
  with pytest.raises(error, match=message):
    ordinal.presto_fit(**{**good, **change})


def test_bad_paths_and_shapes_are_named(data):
  with pytest.raises(ValueError, match='count=0'):
    penalty_path(*data, LEVELS, count=0)
  with pytest.raises(ValueError, match='ratio=1'):
    penalty_path(*data, LEVELS, ratio=1)
  with pytest.raises(ValueError, match='intercepts'):
    ordinal.cumulative_logit_losses(np.zeros(3), np.zeros((2, 4)), *data)
  with pytest.raises(ValueError, match='y holds -1'):
    ordinal.presto_fit(data[0], data[1] - 1, LEVELS, 0.1)
  losses = jax.jit(ordinal.cumulative_logit_losses)(
    np.zeros(1), np.zeros((1, 2)), np.ones((2, 2)), np.array([-1, 0])
  )
  np.testing.assert_array_equal(np.isnan(losses), [True, False])


def chosen(x, y):
  """The fit at the penalty of the lowest cross-validated Brier score; ties go to the larger."""
  path = np.asarray(penalty_path(x, y, LEVELS, count=8))
  fold = np.arange(len(y)) % 3
  score = np.zeros(len(path))
  for f in range(3):
    held_out, target = x[fold == f], np.eye(LEVELS)[y[fold == f]]
    for at, penalty in enumerate(path):
      model = ordinal.presto_fit(x, y, LEVELS, penalty, weights=(fold != f).astype(float))
      score[at] += np.sum((np.asarray(presto_probabilities(model, held_out)) - target) ** 2)
  return ordinal.presto_fit(x, y, LEVELS, path[np.argmin(score)])


def rare_errors(share, size, simulations=4):
  """MSE of the rare level's probability [simulations, 3]: proportional odds, logistic regression of
  the rare level, PRESTO."""
  out = []
  for seed in range(simulations):
    rng = np.random.default_rng(seed)
    psi = np.full((3, 10), 0.5)
    psi[1:] = (rng.random((2, 10)) < share) * rng.choice([-size, size], (2, 10))
    x = rng.uniform(-1, 1, (2500, 10))
    y = levels_of(rng, x, psi, intercepts=(0, 3, 5))
    new = rng.uniform(-1, 1, (5000, 10))
    rare = 1 - expit(np.max([0, 3, 5] + new @ np.cumsum(psi, axis=0).T, axis=1))
    models = (
      ordinal.presto_fit(x, y, LEVELS, np.inf, penalize_first=False),
      ordinal.presto_fit(x, (y == 3).astype(int), 2, 0.0),
      chosen(x, y),
    )
    out.append([np.mean((presto_probabilities(m, new)[:, -1] - rare) ** 2) for m in models])
  return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('regime', 'share', 'size'), [('none', 0, 0), ('few', 1 / 3, 0.5), ('all', 1, 0.7)]
)
def test_sharing_pays_where_few_slopes_differ(regime, share, size):
  """The paper's simulation, 2500 rows with about 1% rare: no, few or all slopes differ."""
  errors = rare_errors(share, size)
  odds, logistic, presto = errors.mean(axis=0)
  print(f'{regime}: odds {odds:.2e} logistic {logistic:.2e} presto {presto:.2e}', errors)
  expected = {
    'none': odds < presto < logistic,
    'few': presto < min(odds, logistic),
    'all': logistic < presto < odds,  # enough rare rows to learn from alone
  }
  assert expected[regime]


def test_a_level_of_weight_zero_is_none():
  """A fit without it would look converged, with all slopes at 0."""
  x, y = np.random.default_rng(0).normal(size=(6, 2)), np.array([0, 0, 1, 1, 2, 2])
  for weights, message in (
    ([1, 1, 0, 0, 1, 1], 'y has no row of level 1 with a weight above 0'),
    ([1, 1, -1, 1, 1, 1], 'weights must be at least 0 and finite'),
    ([0] * 6, 'y has no row of level 0'),
  ):
    with pytest.raises(ValueError, match=message):
      ordinal.presto_fit(x, y, 3, penalty=0.1, weights=np.array(weights, float))
