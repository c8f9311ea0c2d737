"""The fit of a swarm as a user meets it, on planted laws, and on RegMix's released runs if here."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.data import mixture
from experiments.errors import UserError
from experiments.regmix import fit
from jaxrw.mixtures.regression import sample_mixtures

ROOT = pathlib.Path(__file__).parents[2]
DOMAINS = ('web', 'code', 'books')
LOSSES = ('val_web', 'val_code')
SLOPES = np.array([[-1.5, -0.2, 0.3], [0.2, -2.0, 0.1]])


@pytest.fixture(scope='module', autouse=True)
def defined_flags():
  fit.define_flags()
  yield
  for name in flags.FLAGS.flags_by_module_dict().get(fit.__name__, []):
    delattr(flags.FLAGS, name.name)


def table(names, rows, index=None):
  index = range(1, len(rows) + 1) if index is None else index
  lines = [['index', *names], *([i, *map(repr, map(float, row))] for i, row in zip(index, rows))]
  return '\n'.join(','.join(map(str, line)) for line in lines) + '\n'


def planted(count=80, seed=0, noise=0.002):
  import jax

  p = sample_mixtures(jax.random.key(seed), [0.5, 0.3, 0.2], count, max_ratio=4)
  rng = np.random.default_rng(seed)
  return p, 2 + np.exp(p @ SLOPES.T) + rng.normal(0, noise, (count, 2))


@pytest.fixture
def run(tmp_path, capsys):
  """Runs the program on the planted swarm, or on other content of its files."""

  def runs(mixtures=None, losses=None, **options):
    p, y = planted()
    if options.get('regressor') == 'log_linear':  # its fit is compiled for each number of runs
      files = (('test_mixtures', 'm.csv'), ('test_losses', 'l.csv'))
      options = {**{flag: str(tmp_path / name) for flag, name in files}, **options}
    for name, content in (
      ('m.csv', table(DOMAINS, p) if mixtures is None else mixtures),
      ('l.csv', table(LOSSES, y) if losses is None else losses),
    ):
      (tmp_path / name).write_text(content)
    files = {name: str(tmp_path / name) for name in ('m.csv', 'l.csv', 'out.json')}
    given = {'mixtures': files['m.csv'], 'losses': files['l.csv'], 'out': files['out.json']}
    with flagsaver.flagsaver(**{**given, **options}):
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      fit.main([])
    return json.loads((tmp_path / 'out.json').read_text()), capsys.readouterr().out

  return runs


@pytest.mark.parametrize('regressor', list(fit.REGRESSORS))
def test_every_regressor_ranks_and_proposes(run, regressor):
  if regressor == 'lightgbm':
    pytest.importorskip('lightgbm')
  stored, out = run(regressor=regressor, target='val_code', draws=2000, best=16, max_ratio=3.0)
  share = stored['weights']
  assert list(share) == list(DOMAINS)
  assert sum(share.values()) == pytest.approx(1, abs=1e-6)
  assert share['code'] == max(share.values())
  assert stored['made_by']['spearman'] > 0.9
  fitted = '80 runs, on 80 others' if regressor == 'log_linear' else '64 runs, on the other 16'
  assert f'{regressor} fitted to {fitted}' in out
  for word in ('val_web', 'val_code', 'mean', 'Spearman', 'MSE', 'proposed', 'wrote'):
    assert word in out


def test_the_exact_answer_is_that_of_the_planted_law(run):
  from jaxrw.mixtures.regression import MixingLaw, best_mixture

  prior = planted()[0].mean(axis=0)
  law = MixingLaw(np.zeros(2), SLOPES)
  for target, weights in (('mean', [0.5, 0.5]), ('val_web', [1.0, 0.0])):
    stored, _ = run(regressor='log_linear', target=target, strength=0.1)
    answer = best_mixture(law, weights, prior, 0.1)
    np.testing.assert_allclose(list(stored['weights'].values()), answer, atol=0.03)
  stored, _ = run(regressor='log_linear', target='val_web', strength=0.0, max_ratio=1.5)
  assert stored['weights']['web'] == pytest.approx(1.5 * prior[0], abs=1e-4)


def test_a_run_of_the_trainer_can_read_the_file(run, tmp_path):
  from types import SimpleNamespace

  stored, _ = run(regressor='ridge', draws=1000, best=10)
  sizes = lambda split: np.array([10, 10, 10])
  corpus = SimpleNamespace(domains=DOMAINS[::-1], sizes=sizes, meta={'tokenizer': {'sha256': 'x'}})
  parsed = mixture.parse(str(tmp_path / 'out.json'), corpus)
  np.testing.assert_allclose(parsed, [stored['weights'][name] for name in DOMAINS[::-1]])


def test_the_prior_from_a_file_by_name(run, tmp_path):
  path = tmp_path / 'prior.json'
  path.write_text(json.dumps({'weights': {'books': 2, 'web': 1, 'code': 1}}))
  stored, _ = run(regressor='log_linear', strength=float('inf'), prior=str(path))
  assert stored['weights'] == pytest.approx({'web': 0.25, 'code': 0.25, 'books': 0.5}, abs=1e-6)
  stored, _ = run(regressor='log_linear', strength=float('inf'), prior='uniform')
  assert stored['weights'] == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3), abs=1e-6)


def test_rows_and_columns_join_by_name(run, tmp_path):
  """Shuffled rows, test columns in another order, gzip: all the same numbers."""
  _, y = planted()
  first = run(regressor='ridge', draws=1000, best=10)[0]
  order = np.random.default_rng(3).permutation(80)
  shuffled = run(losses=table(LOSSES, y[order], order + 1), regressor='ridge', draws=1000, best=10)[
    0
  ]
  assert shuffled['weights'] == first['weights']

  q, z = planted(30, seed=5)
  (tmp_path / 'q.csv.gz').write_bytes(gzip.compress(table(DOMAINS[::-1], q[:, ::-1]).encode()))
  (tmp_path / 'z.csv.gz').write_bytes(gzip.compress(table(LOSSES[::-1], z[:, ::-1]).encode()))
  paths = {'test_mixtures': str(tmp_path / 'q.csv.gz'), 'test_losses': str(tmp_path / 'z.csv.gz')}
  stored, out = run(regressor='quadratic', draws=1000, best=10, target='val_web', **paths)
  assert 'fitted to 80 runs, on 30 others' in out
  assert stored['made_by']['spearman'] > 0.97


def test_held_out_runs_change_nothing_but_their_judgement():
  """Another loss in the test runs may not change a prediction: no early stopping on them."""
  pytest.importorskip('lightgbm')
  p, y = planted()
  runs = fit.Runs(DOMAINS, LOSSES, p.astype(np.float64), y)
  rest, held_out = fit._split(80, 0)
  assert sorted([*rest, *held_out]) == list(range(80))
  assert len(held_out) == 16
  predictions = []
  for shift in (0, 100):
    values = y.copy()
    values[held_out] += shift
    some = runs._replace(values=values).at(rest)
    predictions.append(fit.fit_lightgbm(some.mixtures, some.values, 0).predict(p, [0, 1]))
  np.testing.assert_array_equal(*predictions)


def test_ridge_is_the_closed_form_at_the_strength_of_leave_one_out():
  p, y = planted(40, noise=0.1)
  weights, offset = fit._ridge(p.astype(np.float64), y)
  scaled = (p - p.mean(0, dtype=np.float64)) / p.std(0, dtype=np.float64)

  def solved(x, target, strength):
    center, mean = x.mean(0), target.mean()
    z = x - center
    found = np.linalg.solve(z.T @ z + strength * np.eye(3), z.T @ (target - mean))
    return found, mean - center @ found

  for i in range(2):
    best = np.inf, None
    for strength in 40 * np.geomspace(1e-8, 1e2, 41):
      errors = []
      for k in range(40):
        keep = np.arange(40) != k
        # The shrinking of the full fit's features, as the shortcut has it.
        found, constant = solved(scaled[keep], y[keep, i], strength)
        errors.append((scaled[k] @ found + constant - y[k, i]) ** 2)
      best = min(best, (np.mean(errors), strength), key=lambda pair: pair[0])
    found, constant = solved(scaled, y[:, i], best[1])
    np.testing.assert_allclose(p @ weights[:, i] + offset[i], scaled @ found + constant, atol=1e-6)


def test_a_fit_that_extrapolates_says_so(run):
  p, y = planted()
  narrow = 0.9 / 3 + 0.1 * p
  for shares, noted in ((p, False), (narrow, True)):  # some runs of the first are nearly pure
    falling = np.column_stack([5 - shares[:, 1], y[:, 1]])
    _, out = run(
      table(DOMAINS, shares), table(LOSSES, falling), regressor='ridge', target='val_web',
      draws=1000, best=1,
    )  # fmt: skip
    assert ('note: far below what any run had' in out) == noted


P, Y = planted()
SHORT = table(DOMAINS, P[:10]), table(LOSSES, Y[:10])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'out': ''}, '--out is missing'),
    ({'out': 'a.csv'}, '--out=a.csv: must end in .json'),
    ({'mixtures': ''}, 'needs a header'),
    ({'mixtures': 'index,web\n'}, 'has no rows'),
    ({'mixtures': 'a,b\n1,2\n'}, "needs a header with different names, 'index'"),
    ({'mixtures': 'index,a,a\n1,1,0\n'}, 'different names'),
    ({'mixtures': 'index,a,b\n1,1\n'}, 'line 2: 2 cells, but the header has 3'),
    ({'mixtures': 'index,a,b\n1,1,0\n1,1,0\n'}, 'line 3: index=1 is there twice'),
    ({'mixtures': 'index,a,b\n1,1,x\n'}, "line 2: b='x' is not a finite number"),
    ({'losses': 'index,a\n1,nan\n'}, "line 2: a='nan' is not a finite number"),
    ({'losses': table(LOSSES, Y[:79])}, 'l.csv does not have, the first with index=80'),
    ({'mixtures': table(DOMAINS, P[:79])}, 'm.csv does not have, the first with index=80'),
    ({'mixtures': table(DOMAINS, P * 1.1)}, 'shares of index=1 sum to 1.1'),
    ({'mixtures': table(DOMAINS, P - [0.5, 0, -0.5])}, 'they must be at least 0'),
    ({'mixtures': SHORT[0], 'losses': SHORT[1]}, 'has 10 runs; at least 20'),
    ({'target': 'val_cod'}, 'no such column of --losses; did you mean val_code'),
    ({'prior': 'web'}, "--prior=web: must be 'mean', 'uniform'"),
    ({'prior': 'no.json'}, 'cannot read no.json'),
    ({'max_ratio': 0.5}, '--max_ratio=0.5: must be above 1'),
    ({'max_ratio': 1.0001}, 'fewer than --best=128'),
    ({'test_mixtures': 'a.csv'}, 'belong together'),
    ({'test_mixtures': 'a.csv', 'test_losses': 'b.csv'}, 'cannot read a.csv'),
    ({'losses': table(LOSSES, Y - 9), 'regressor': 'log_linear'}, 'log_linear: losses holds -'),
  ],
)  # fmt: skip
def test_bad_input_is_one_line(run, options, message):
  with pytest.raises(UserError, match=message) as caught:
    run(**{'regressor': 'ridge', 'draws': 1000, **options})
  assert '\n' not in str(caught.value)


def test_test_files_need_the_same_columns(run, tmp_path):
  (tmp_path / 'q.csv').write_text(table(('web', 'code', 'law'), P))
  (tmp_path / 'z.csv').write_text(table(LOSSES, Y))
  paths = {'test_mixtures': str(tmp_path / 'q.csv'), 'test_losses': str(tmp_path / 'z.csv')}
  with pytest.raises(UserError, match="--test_mixtures: the column 'books'"):
    run(regressor='ridge', **paths)


@pytest.mark.parametrize(
  'weights', [None, {'web': 1}, {'web': 1, 'code': -1, 'books': 1}, dict.fromkeys(DOMAINS, 0),
              dict.fromkeys(DOMAINS, 'x')]
)  # fmt: skip
def test_a_prior_file_needs_every_domain(run, tmp_path, weights):
  path = tmp_path / 'prior.json'
  path.write_text(json.dumps({'weights': weights}))
  with pytest.raises(UserError, match='weight'):
    run(regressor='ridge', prior=str(path))


def test_without_lightgbm_the_error_says_what_to_do(run, monkeypatch):
  monkeypatch.setitem(sys.modules, 'lightgbm', None)
  with pytest.raises(UserError, match='pip install lightgbm, or choose'):
    run()


def test_broken_gzip(run, tmp_path):
  path = tmp_path / 'm.csv.gz'
  for content in (b'index,a\n', gzip.compress(table(DOMAINS, P).encode())[:-20]):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'm\.csv\.gz'):
      fit.read_table(str(path))


def test_the_command_line():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.regmix.fit', '--mixtures=no.csv', '--losses=no.csv',
     '--out=a.json', '--regressor=ridge'],
    capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
  )  # fmt: skip
  assert done.returncode == UserError.exit_status
  assert done.stderr == 'error: cannot read no.csv: No such file or directory\n'


# RegMix's released runs ---------------------------------------------------------------------------

# Held-out rank correlations of the released notebook, in percent. Its trees are stopped on the test
# runs; ours never see them.
PUBLISHED = {
  'arxiv': 99.60, 'freelaw': 99.71, 'pubmed_central': 99.08, 'wikipedia_en': 99.45,
  'dm_mathematics': 97.20, 'github': 99.77, 'stackexchange': 99.73, 'gutenberg_pg_19': 99.18,
  'pile_cc': 98.92, 'ubuntu_irc': 96.87, 'hackernews': 98.51, 'pubmed_abstracts': 99.19,
  'uspto_backgrounds': 99.12,
}  # fmt: skip
# Shares of tokens in the Pile that RegMix drew its swarm around, in the order of its columns.
PILE = (
  0.113285, 0.079609, 0.003913, 0.185376, 0.051081, 0.015963, 0.101751, 0.003708, 0.066529,
  0.001751, 0.027085, 0.236869, 0.011843, 0.007930, 0.008033, 0.038826, 0.046447,
)  # fmt: skip


@pytest.fixture(scope='module')
def released():
  """kind -> Runs: 'train_1m', 'test_1m', 'test_60m'."""
  default = pathlib.Path(__file__).parents[3] / 'shared/data/reference/regmix'
  folder = pathlib.Path(os.environ.get('JAXRW_REGMIX_DIR') or default)
  if not folder.is_dir():
    pytest.skip("RegMix's runs are not here; set JAXRW_REGMIX_DIR to their folder")
  paths = lambda kind, split, size: str(folder / f'{split}_{kind}_{size}.csv.gz')
  return {
    f'{split}_{size}': fit.read_runs(*(paths(k, split, size) for k in ('mixture', 'pile_loss')))
    for split, size in (('train', '1m'), ('test', '1m'), ('test', '60m'))
  }


@pytest.fixture(scope='module')
def trees(released):
  pytest.importorskip('lightgbm')
  train = released['train_1m']
  return fit.fit_lightgbm(train.mixtures, train.values, 0)


def test_published_rank_correlations(released, trees):
  quality = fit.judge(trees, released['test_1m'])
  assert released['train_1m'].mixtures.shape == (512, 17)
  for name, rank in zip(quality.names, 100 * quality.spearman):
    short = name.removeprefix('metric/the_pile_').removesuffix('_val_loss')
    if short != 'mean':
      # Measured: from 0.12 below (hackernews) to 0.08 above (ubuntu_irc).
      assert rank > PUBLISHED[short] - 0.4, name
  assert quality.spearman[-1] > 0.98  # measured 0.9911


def test_ranks_of_models_60_times_as_large(released, trees):
  quality = fit.judge(trees, released['test_60m'])
  # Measured: 0.9564 (ubuntu_irc) to 0.9960 (freelaw), the mean of losses 0.9589.
  assert quality.spearman.min() > 0.94
  assert np.median(quality.spearman) > 0.98


def test_the_published_answer_is_mostly_web_text(released, trees):
  """Published: 0.891 Pile-CC in the notebook, 0.870 in the configuration that was trained."""
  domains = released['train_1m'].domains
  column = released['train_1m'].losses.index('metric/the_pile_pile_cc_val_loss')
  prior = np.array(PILE) / sum(PILE)
  target = lambda p: trees.predict(p, [column])[:, 0]
  answer = fit.propose_by_simulation(target, prior, max_ratio=0, draws=10_000, best=128, seed=0)
  assert domains[answer.argmax()] == 'train_the_pile_pile_cc'
  # Measured 0.882 to 0.886 over seeds with 100 000 draws, 0.884 to 0.897 with 30 000.
  assert 0.84 < answer.max() < 0.92


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'least'), [(512, 0.95), (54, 0.85)])
def test_the_law_ranks_the_released_runs(released, count, least):
  """Measured for Pile-CC: 0.9625 of 512 runs; 54 = 3 (G + 1) are nearly enough."""
  train, test = released['train_1m'].at(np.arange(count)), released['test_1m']
  column = train.losses.index('metric/the_pile_pile_cc_val_loss')
  model = fit.fit_log_linear(train.mixtures, train.values, 0)
  assert fit.judge(model, test).spearman[column] > least
