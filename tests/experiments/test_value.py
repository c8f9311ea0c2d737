"""The value study: what it measures with, against plain loops and finite differences."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm
from experiments import plots, stats
from experiments.data import readers
from experiments.errors import UserError
from experiments.value import __main__ as program
from experiments.value import label_errors, players, text, unlearn
from jaxrw import attribution

pytest.importorskip('sklearn')

TINY = text.Settings(
  domains=2, examples=16, length=10, width=8, layers=1, targets=1, target_size=3, steps=8, batch=8,
  left_out=(0.125, 0.25), subsets=4, sketch=4,
)  # fmt: skip


@pytest.fixture(scope='module')
def trainer():
  source = readers.open_source(lm.get_config().data)
  return text.Trainer(TINY, text.read(source, TINY))


# Text ---------------------------------------------------------------------------------------------


def test_pieces_come_from_their_split_and_domain(trainer):
  source, data = readers.open_source(lm.get_config().data), trainer.data
  assert data.train.shape == (16, 11)
  assert data.targets.shape == (2, 3, 11)
  for d, name in enumerate(data.names):
    for split, pieces in (
      ('train', data.train[data.domain == d]),
      ('validation', data.targets[data.target_domain == d].reshape(-1, 11)),
    ):
      texts = [doc.text.encode('utf-8', 'replace') for doc in source.documents(name, split)]
      assert all(any(bytes(p.tolist()) in t for t in texts) for p in pieces)


def test_the_model_is_causal_and_its_losses_are_those_of_a_loop(trainer):
  params, tokens = text.initial(jax.random.key(0), TINY), trainer.tokens[:2]
  run = lambda tokens: text.forward(TINY, params, attribution.layers(params), {'tokens': tokens})
  logits = np.asarray(run(tokens), np.float64)
  other = np.asarray(run(tokens.at[:, 6:].set(7)))
  np.testing.assert_allclose(other[:, :6], logits[:, :6], rtol=1e-5, atol=1e-6)
  assert np.abs(other[:, 6:] - logits[:, 6:]).max() > 1e-3
  expected = []
  for z, t in zip(logits, np.asarray(tokens)):
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    expected.append(np.mean([-np.log(p[i, t[i + 1]]) for i in range(TINY.length)]))
  found = jax.jit(lambda p: text.example_losses(TINY, p, tokens))(params)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow  # a minute of compilation
def test_metagradients_are_derivatives_of_the_training_run(trainer):
  values, cost = text.scored(trainer, 0, 'metagradient')
  rows, step = trainer.rows(0), 0.05

  def reached(weights):
    path = trainer.run(0, rows, jnp.asarray(weights, jnp.float32))
    return np.asarray(trainer.target_losses(jax.tree.map(lambda p: p[-1], path)), np.float64)

  for i in (0, 5, 11):
    moved = step * np.eye(16)[i]
    slope = (reached(1 + moved) - reached(1 - moved)) / (2 * step)
    np.testing.assert_allclose(-values[:, i], slope, rtol=0.02, atol=3e-5)
  assert cost > 2  # at least forwards and backwards of a run


def test_a_row_of_weight_zero_has_no_part_in_training(trainer):
  weights, rows = jnp.ones(16).at[3].set(0), trainer.rows(1)
  kept = trainer.run(1, rows, weights)
  other = text.Trainer(TINY, trainer.data._replace(train=np.where(
    np.arange(16)[:, None] == 3, 9, trainer.data.train)))  # fmt: skip
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(other.run(1, rows, weights))):
    np.testing.assert_array_equal(a, b)


_LONG = ('metagradient', 'trak', 'tracin')  # to compile


@pytest.mark.parametrize(
  'method',
  [pytest.param(m, marks=pytest.mark.slow) if m in _LONG else m for m in text.METHODS],
)
def test_scores_are_finite_and_cost_something(trainer, method):
  values, cost = text.scored(trainer, 0, method)
  assert values.shape == (2, 16)
  assert np.isfinite(values).all()
  assert (cost == 0) == (method in ('overlap', 'same domain'))


def test_ekfac_falls_back_to_gradients_when_damped_away(trainer):
  """Scores along a solution with a huge damping are the products of gradients, in that order."""
  path = trainer.run(0, trainer.rows(0), jnp.ones(16))
  last = jax.tree.map(lambda p: p[-1], path)
  factors = attribution.ekfac(
    jax.random.key(0), lambda *a: text.forward(TINY, *a), last, [{'tokens': trainer.tokens}]
  )
  assert set(factors) == {'blocks/0/qkv', 'blocks/0/out', 'blocks/0/up', 'blocks/0/down', 'head'}
  solve = lambda u: attribution.ekfac_solve(factors, u, damping=1e6)
  ours = np.asarray(jax.jit(text._solved(trainer, last, solve))(trainer.targets[0]))
  linear = lambda u: {**jax.tree.map(jnp.zeros_like, u), 'blocks': u['blocks'], 'head': u['head']}
  plain = np.asarray(jax.jit(text._solved(trainer, last, linear))(trainer.targets[0]))
  np.testing.assert_allclose(1e6 * ours, plain, rtol=1e-3, atol=1e-5)


def test_overlap_is_highest_with_itself():
  rng = np.random.default_rng(0)
  train = rng.integers(0, 256, (6, 20)).astype(np.int32)
  data = text.Data(train, train[[4, 1]][:, None], np.zeros(6), np.zeros(2), ('a',))
  found = text.overlap(data)
  np.testing.assert_array_equal(found.argmax(axis=1), [4, 1])
  np.testing.assert_allclose(found.max(axis=1), 1)


def truth_of(values, noise=0.0):
  masks, shares = text.left_out(TINY)
  rise = masks @ values.T + noise * np.random.default_rng(0).normal(size=(len(masks), len(values)))
  return text.Truth(masks, shares, rise, np.zeros(len(values)))


def test_agreement_is_the_rank_correlation_of_sums():
  values = np.random.default_rng(1).normal(size=(2, 16))
  for share in TINY.left_out:
    assert text.agreement(values, truth_of(values), share) == pytest.approx(1)
    assert text.agreement(-values, truth_of(values), share) == pytest.approx(-1)
    assert text.agreement(np.zeros((2, 16)), truth_of(values), share) == 0
  masks, shares = text.left_out(TINY)
  assert [masks[shares == share].sum(1).tolist() for share in TINY.left_out] == [[2] * 4, [4] * 4]


def test_other_runs_leave_the_own_one_out():
  truths = [truth_of(np.full((2, 16), float(i))) for i in range(3)]
  np.testing.assert_allclose(text.others(truths, 0).rise, truth_of(np.full((2, 16), 1.5)).rise)


def test_rank_correlation_has_mean_ranks_at_ties():
  a, b = np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])
  ranks_a, ranks_b = np.array([1, 2.5, 2.5, 4]), np.array([1, 2, 3, 4.0])
  assert stats.rank_correlation(a, b) == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])
  assert stats.rank_correlation(a, np.ones(4)) == 0


def test_too_few_domains():
  source = readers.open_source(lm.get_config().data)
  with pytest.raises(UserError, match='domains; 50 are needed'):
    text.read(source, TINY._replace(domains=50))


# Players ------------------------------------------------------------------------------------------

SMALL = players.Settings(players=40, held=100, orders=2, taken=(0.2,))


@pytest.fixture(scope='module')
def source():
  from experiments.classify import sources

  return sources.digits()


@pytest.fixture(scope='module')
def game(source):
  return players.game(players.problem(source, SMALL, 0))


def test_a_fifth_of_the_labels_is_wrong(source):
  p = players.problem(source, SMALL, 0)
  order = np.random.default_rng([0, 31]).permutation(len(source.pool.y))[:40]
  np.testing.assert_array_equal(np.asarray(p.y) != source.pool.y[order], p.wrong)
  assert p.wrong.sum() == 8


def test_the_fit_is_softmax_regression(game):
  """The penalized loss is nearly that of scikit-learn's minimum; 60 steps stop a little short."""
  from sklearn.linear_model import LogisticRegression

  p, present = game.problem, np.arange(40) % 2 == 0
  w = np.asarray(players.fit(p.x, p.y, jnp.asarray(present, float)), np.float64)
  x, y = np.asarray(p.x, np.float64)[present], np.asarray(p.y)[present]
  model = LogisticRegression(C=1 / (2 * players._PENALTY * len(x)), max_iter=2000).fit(x, y)

  def objective(z, w):
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -z[np.arange(len(y)), y].mean() + players._PENALTY * (w**2).sum()

  ours = objective(np.concatenate([x, np.ones((len(x), 1))], axis=1) @ w, w)
  logits = np.full((len(x), 10), -1e9)
  logits[:, model.classes_] = model.decision_function(x)
  least = objective(logits, model.coef_)
  assert least - 1e-3 <= ours <= least + 0.05
  nobody = float(game.utility(jnp.zeros(40)))
  assert nobody == pytest.approx(float(np.mean(game.problem.held_y == 0)))


def test_perfect_values_find_the_wrong_labels(source, monkeypatch):
  knows = lambda g, s, seed: (-g.problem.wrong.astype(float), 0)
  monkeypatch.setitem(players.METHODS, 'knows', knows)
  found = players.measure(source, SMALL, [0, 1], 'knows')
  assert found.auc == [1.0, 1.0]
  everything = players.everything(source, SMALL, [0, 1])
  assert all(after[0] > before for (after, before) in zip(found.lowest_taken, everything))
  assert all(after[0] < before for (after, before) in zip(found.highest_taken, everything))


def test_in_run_values_add_up_to_what_the_run_gained(game):
  """Second order, small steps: the sum is the drop of the validation loss, to a few percent."""
  settings = SMALL._replace(rate=0.02, epochs=2)
  p, seed = game.problem, 3
  values, _ = players._in_run(2)(game, settings, seed)
  rng = np.random.default_rng([seed, 41])
  rows = np.concatenate([rng.permutation(40) for _ in range(2)]).reshape(-1, settings.batch)
  design = np.concatenate([np.asarray(p.x, float), np.ones((40, 1))], axis=1)
  held = np.concatenate([np.asarray(p.held_x, float), np.ones((100, 1))], axis=1)

  def soft(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  w, y = np.zeros((design.shape[1], 10)), np.asarray(p.y)
  loss = lambda w: -np.log(soft(held @ w)[np.arange(100), np.asarray(p.held_y)]).mean()
  before = loss(w)
  for batch in rows:
    error = soft(design[batch] @ w) - np.eye(10)[y[batch]]
    w = w - settings.rate / settings.batch * design[batch].T @ error
  assert values.sum() == pytest.approx(before - loss(w), rel=0.02)


@pytest.mark.parametrize('method', ['leave-one-out', 'knn-shapley', 'training loss', 'g-shapley'])
def test_methods_give_every_player_a_value(game, method):
  values, fits = players.METHODS[method](game, SMALL, 0)
  assert values.shape == (40,)
  assert np.isfinite(values).all()
  assert fits >= 0


# Unlearning ---------------------------------------------------------------------------------------

FEW = unlearn.Settings(
  train=120, forget=10, models=3, hidden=4, steps=20, batch=20, points=15, curve=120,
  solver_steps=60, oracles=2, rates=(1e-3,), steps_after=(3,), dampings=(1e-2,),
  match_rates=(1e-3,),
)  # fmt: skip


@pytest.fixture(scope='module')
def forgetting(source):
  return unlearn.problem(source, FEW, 'random', 0)


@pytest.mark.parametrize('kind', unlearn.KINDS)
def test_what_is_forgotten_and_what_is_kept(source, kind):
  p = unlearn.problem(source, FEW, kind, 1)
  forget, kept, match = (np.asarray(a) for a in (p.forget, p.kept, p.match))
  assert sorted([*forget, *kept]) == list(range(120))
  np.testing.assert_array_equal(match[:10], forget)
  assert set(match[10:]) <= set(kept)
  assert len(set(match)) == 40
  x = np.asarray(p.x)
  np.testing.assert_array_equal(p.points_x[:10], x[forget])
  rows = {row.tobytes() for row in x[kept]}
  assert all(np.asarray(row).tobytes() in rows for row in p.points_x[10:25])
  assert not any(np.asarray(row).tobytes() in rows for row in p.points_x[25:])
  other = unlearn.problem(source, FEW, kind, 2)
  np.testing.assert_array_equal(p.x, other.x)
  assert set(forget) != set(np.asarray(other.forget))
  if kind == 'neighbors':
    centers = [((x - x[c]) ** 2).sum(1) for c in forget]
    assert any(set(np.argsort(d)[:10]) == set(forget) for d in centers)


def test_weight_zero_is_as_if_it_were_not_there(forgetting):
  """Other labels of what has weight 0 change no model."""
  keys = jax.random.split(jax.random.key(0), 2)
  weights = jnp.ones(120).at[forgetting.forget].set(0)
  other = forgetting._replace(y=forgetting.y.at[forgetting.forget].set(0))
  ours, same = (unlearn.trained(keys, p, weights, FEW) for p in (forgetting, other))
  jax.tree.map(np.testing.assert_array_equal, ours, same)
  assert float(jnp.abs(ours['out'][0] - ours['out'][1]).max()) > 0


def test_outputs_foretold_are_those_of_a_dense_solution(forgetting):
  """A linear model: the Gauss-Newton matrix is the Hessian, written out."""
  p, damping = forgetting, 0.02
  w = 0.3 * np.random.default_rng(0).normal(size=(64, 10))
  crowd = {'out': jnp.asarray(w, jnp.float32)[None], 'out_bias': jnp.zeros((1, 10))}
  x = np.concatenate([np.asarray(p.x, np.float64), np.ones((120, 1))], axis=1)
  z = x[:, :64] @ w
  soft = np.exp(z) / np.exp(z).sum(1, keepdims=True)
  curve = np.asarray(p.curve)
  matrix = damping * np.eye(650)
  for i in curve:
    matrix += np.kron(np.outer(x[i], x[i]), np.diag(soft[i]) - np.outer(soft[i], soft[i])) / len(
      curve
    )
  forget = np.asarray(p.forget)
  slope = x[forget].T @ (soft - np.eye(10)[np.asarray(p.y)])[forget]
  moved = (np.linalg.solve(matrix, slope.reshape(-1)) / 120).reshape(65, 10)
  found = unlearn.foretold(crowd, p, p.x[:5], damping, FEW)
  np.testing.assert_allclose(found[0], z[:5] + x[:5] @ moved, rtol=2e-3, atol=2e-3)


def test_arms_forget(source):
  """Each arm gives one divergence for each kind of point, and its price."""
  found = dict(unlearn.study(source, FEW._replace(train=100, curve=20), 'random', 2))
  assert list(found) == list(unlearn.ARMS)
  for name, r in found.items():
    assert np.shape(r.mean) == np.shape(r.high) == (2, 3)
    assert np.isfinite(r.mean).all()
    assert (r.cost == 0) == (name == 'nothing done')
  assert found['retrained'].cost == 1
  assert found['gradient ascent'].cost == pytest.approx(3 * 10 / (20 * 20))


def test_arms_choose_among_as_many_settings():
  numbers = {name: len(unlearn.settings_of(name, unlearn.Settings())) for name in unlearn.ARMS}
  assert set(numbers.values()) == {1, 5, 10}
  assert [name for name, n in numbers.items() if n == 1] == ['retrained', 'nothing done']


# Label errors -------------------------------------------------------------------------------------


def write_labels(folder, *, given=5, ids=(0, 1, 2, 3), votes=(0, 5, 1, 4)):
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  probs = rng.dirichlet(np.ones(3), 50).astype(np.float32)
  np.savez(folder / 'mnist_test.npz', probs=probs, given_label=rng.integers(0, 3, 50))
  with gzip.open(folder / 'mnist_mturk.json.gz', 'wt') as out:
    json.dump([{'id': i, 'mturk': {'given': v}} for i, v in zip(ids, votes)], out)
  return folder


def test_errors_are_those_that_most_people_call_wrong(tmp_path):
  labels = label_errors.read(write_labels(tmp_path), 'mnist')
  np.testing.assert_array_equal(labels.suspects[labels.wrong], [0, 2])


def test_label_error_auc_is_that_of_all_pairs(tmp_path):
  labels = label_errors.read(write_labels(tmp_path), 'mnist')
  found = label_errors.measure(labels, 'loss')
  loss = -np.log(labels.probabilities[np.arange(50), labels.given])
  wrong = [0, 2]
  pairs = [loss[i] > loss[j] for i in wrong for j in range(50) if j not in wrong]
  assert found.everywhere[0] == pytest.approx(np.mean(pairs))
  among = [loss[i] > loss[j] for i in wrong for j in (1, 3)]
  assert found.suspects[0] == pytest.approx(np.mean(among))
  assert found.everywhere[1] <= found.everywhere[0] <= found.everywhere[2]
  assert found.first_hundred == 2  # all there are


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda f: (f / 'mnist_test.npz').unlink(), 'mnist_test.npz cannot be read'),
    (lambda f: (f / 'mnist_test.npz').write_bytes(b'no'), 'mnist_test.npz cannot be read'),
    (lambda f: (f / 'mnist_mturk.json.gz').write_bytes(b'no'), 'it needs id'),
    (lambda f: write_labels(f, ids=(0, 1, 2, 50)), 'ids must be places'),
    (lambda f: write_labels(f, votes=(5, 5, 5, 5)), 'same verdict'),
    (lambda f: write_labels(f, ids=(), votes=()), 'ids must be places'),
  ],
)
def test_damaged_label_files(tmp_path, damage, message):
  damage(write_labels(tmp_path))
  with pytest.raises(UserError, match=message):
    label_errors.read(tmp_path, 'mnist')


# The program --------------------------------------------------------------------------------------


def test_tables_and_pictures():
  by = {'0.1': [0.5, 0.7], '0.2': [0.4, 0.6]}
  found = {
    'settings': {'left_out': [0.1, 0.2]}, 'targets': 8,
    'methods': {'ekfac': {'cost_in_runs': 1.26, 'same_run': by, 'other_runs': by}},
  }  # fmt: skip
  table = program.describe_text(found)
  assert 'ekfac' in table
  assert '1.3' in table
  assert '0.60 ±1.27' in table
  assert plots.draw_png(lambda: program.draw_foretold(found, plots.LIGHT), plots.LIGHT)
  result = players.Result([0.9, 0.8], [10, 12], [[0.5, 0.6]] * 2, [[0.4, 0.3]] * 2)
  found = {'settings': {'taken': [0.1, 0.2]}, 'all': [0.7, 0.7], 'methods': {'x': result._asdict()}}
  assert '0.850 ±0.635' in program.describe_shapley(found)
  assert plots.draw_png(lambda: program.draw_removal(found, plots.LIGHT), plots.LIGHT)
  result = unlearn.Result(
    {'rate': 0.001, 'steps': 0}, 0.25, [[0.5, 0.4, 0.3], [0.6, 0.4, 0.3]], [[1.0, 1.0, 1.0]] * 2
  )
  found = {'kinds': {kind: {'influence, as it is': result._asdict()} for kind in unlearn.KINDS}}
  table = program.describe_unlearn(found)
  assert '0.55 ±0.64' in table
  assert '0.00 ±0.00' in table
  assert 'rate 0.001  ' in table
  assert plots.draw_png(lambda: program.draw_forgotten(found, plots.LIGHT), plots.LIGHT)


@pytest.mark.slow  # two minutes, nearly all of them compilation
def test_program(tmp_path):
  from tests.experiments.forked import run

  done = run(
    'experiments.value', '--workdir=out', '--parts=shapley,text,unlearn', '--quick', '--seeds=2',
    folder=tmp_path,
  )  # fmt: skip
  assert done.status == 0, done.stderr
  assert {'result.json', 'removal.png', 'foretold.png', 'forgotten.png'} <= {
    p.name for p in (tmp_path / 'out').iterdir()
  }


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--workdir is missing'),
    (['--workdir=x', '--seeds=1'], '--seeds=1'),
    (['--workdir=x', '--parts=labels'], 'has no folder label_errors'),
    (['--workdir=x', '--parts=prose'], 'prose'),
  ],
)
def test_bad_flags(tmp_path, flags, message):
  from tests.experiments.forked import run

  done = run('experiments.value', *flags, folder=tmp_path)
  assert done.status == 2
  assert message in done.stderr
