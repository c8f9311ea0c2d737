"""The board's data, readers, learner and verdicts. What the methods do on it is in docs/results."""

import gzip
import io
import json
import os
import struct
from contextlib import redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.classify import board, consistency, learner, model, sources, tasks
from experiments.classify.arms import ARMS
from experiments.classify.board import Claim, Result
from experiments.errors import UserError
from jaxrw import weights
from tests.experiments import forked

metrics = pytest.importorskip('sklearn.metrics', reason='the digits come with scikit-learn')
REAL = Path(os.environ.get('JAXRW_DATA', Path(__file__).parents[3] / 'shared' / 'data'))
real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no data in {REAL}; name it in JAXRW_DATA')
OFFLINE = tasks.offline()


def problem(name, seed=0):
  task, source = OFFLINE[name]
  return tasks.problem(task, source(), seed)


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', OFFLINE)
def test_sets_are_disjoint_and_a_seed_repeats_itself(name):
  first, again, other = problem(name), problem(name), problem(name, 1)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert first.train.x.shape == other.train.x.shape
  assert not np.array_equal(first.train.x, other.train.x)
  rows = np.concatenate([e.x for e in first[:4]])
  assert len(np.unique(rows, axis=0)) == len(rows) == sum(len(e.y) for e in first[:4])
  np.testing.assert_allclose(first.train.x.mean(0), 0, atol=1e-4)


def test_the_long_tail_falls_exponentially():
  np.testing.assert_array_equal(tasks.profile(100, 100, 3), [100, 10, 1])
  drawn = problem('long_tail')
  counts = np.bincount(drawn.train.y)
  np.testing.assert_array_equal(counts, [90, 61, 42, 28, 19, 13, 9, 6, 4, 3])
  for balanced in (drawn.validation, drawn.test, drawn.trusted):
    assert len(set(np.bincount(balanced.y))) == 1


def test_another_class_is_rare_in_another_seed():
  """The label 9 is the rarest class, whatever digit that is: the images differ."""
  images = [problem('long_tail', seed).test for seed in range(2)]
  means = [e.x[e.y == 9].mean(0) for e in images]
  assert np.abs(means[0] - means[1]).max() > 0.5


def test_two_fifths_of_the_labels_are_wrong_and_the_test_is_clean():
  drawn = problem('noisy_labels')
  assert np.mean(drawn.clean) == 0.6
  source = OFFLINE['noisy_labels'][1]()
  truth = {row.tobytes(): y for row, y in zip(source.pool.x, source.pool.y)}
  plain = tasks.draw_noisy(
    source, np.random.default_rng(5), size=800, held=250, trusted=100, noise=0.4
  )
  right = [np.array([truth[row.tobytes()] == y for row, y in zip(e.x, e.y)]) for e in plain[:4]]
  np.testing.assert_array_equal(right[0], plain.clean)
  assert right[1].mean() == 0.6
  assert right[2].all()
  assert right[3].all()


def test_the_place_agrees_with_the_class_in_19_of_20():
  drawn = problem('worst_group')
  np.testing.assert_array_equal(np.bincount(drawn.train.group), [570, 30, 30, 570])
  np.testing.assert_array_equal(drawn.train.group // 2, drawn.train.y)
  assert len(set(np.bincount(drawn.test.group))) == 1
  place = drawn.train.group % 2
  assert np.mean((drawn.train.x[:, 1] > 0) == place) > 0.99


def test_four_labels_a_class_are_shown():
  drawn = problem('semi_supervised')
  np.testing.assert_array_equal(drawn.train.y >= 0, drawn.clean)
  np.testing.assert_array_equal(np.bincount(drawn.train.y[drawn.clean]), [4] * 10)
  assert drawn.test.y.min() == 0


def test_rare_events_are_rare_and_incomes_differ_by_sex():
  funnel = OFFLINE['rare_events'][1]().pool
  assert 0.003 < funnel.y.mean() < 0.03
  np.testing.assert_array_equal(funnel.y, funnel.group == 3)
  assert np.all(np.diff(np.bincount(funnel.group)) < 0)
  people = OFFLINE['fairness'][1]().pool
  high = [people.y[people.group % 2 == woman].mean() for woman in (0, 1)]
  np.testing.assert_allclose(high, [0.30, 0.11], atol=0.01)


def test_too_few_examples():
  small = sources.Source('small', sources.examples(np.zeros((10, 2)), np.arange(10) % 2))
  rng = np.random.default_rng(0)
  with pytest.raises(UserError, match='small has 10 examples; this task needs over 10'):
    tasks.split(small, rng, 6, 2, 2)
  with pytest.raises(UserError, match='too few examples of a class'):
    tasks.draw_long_tail(small, rng, most=5, ratio=2, held=1)


# Files --------------------------------------------------------------------------------------------


def idx(array):
  header = b'\0\0\x08' + bytes([array.ndim]) + struct.pack(f'>{array.ndim}i', *array.shape)
  return gzip.compress(header + array.astype(np.uint8).tobytes())


def table(rows):
  return gzip.compress('\n'.join(rows).encode())


def test_idx_files(tmp_path):
  folder = tmp_path / 'images' / 'mnist'
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  images = {'train': rng.integers(0, 256, (5, 28, 28)), 't10k': rng.integers(0, 256, (3, 28, 28))}
  for part, array in images.items():
    (folder / f'{part}-images-idx3-ubyte.gz').write_bytes(idx(array))
    (folder / f'{part}-labels-idx1-ubyte.gz').write_bytes(idx(np.arange(len(array))))
  source = sources.images(tmp_path, 'mnist')
  assert source.pool.x.shape == (5, 14 * 14)
  np.testing.assert_array_equal(source.test.y, [0, 1, 2])
  expected = images['train'][1, 2:4, 4:6].mean() / 255  # row 1, column 2 of the small image
  assert source.pool.x[1, 14 + 2] == pytest.approx(expected, rel=1e-6)
  (folder / 'train-images-idx3-ubyte.gz').write_bytes(gzip.compress(b'text'))
  with pytest.raises(UserError, match='is not an idx file'):
    sources.images(tmp_path, 'mnist')


def test_jpeg_streams(tmp_path):
  folder = tmp_path / 'images' / 'cifar10'
  folder.mkdir(parents=True)
  streams = []
  for gray in (0, 255, 128):
    Image.new('RGB', (32, 32), (gray,) * 3).save(buffer := io.BytesIO(), 'jpeg')
    streams.append(buffer.getvalue())
  ends = np.cumsum([0, *map(len, streams)])
  for part in ('train', 'test'):
    np.savez(
      folder / f'cifar10_jpeg75_{part}.npz',
      jpeg=np.frombuffer(b''.join(streams), np.uint8), offsets=ends, label=[3, 1, 2],
    )  # fmt: skip
  source = sources.images(tmp_path, 'cifar10')
  assert source.pool.x.shape == (3, 8 * 8 * 3)
  np.testing.assert_allclose(source.pool.x.mean(1), [0, 1, 128 / 255], atol=0.01)
  np.testing.assert_array_equal(source.test.y, [3, 1, 2])


def test_tables(tmp_path):
  folder = tmp_path / 'tabular'
  folder.mkdir()
  head = 'age,fnlwgt,sex,income'
  (folder / 'adult.train.csv.gz').write_bytes(table([head, '30,1,Male,>50K', '40,2,Female,<=50K']))
  (folder / 'adult.test.csv.gz').write_bytes(table([head, '50,3,Female,>50K']))
  source = sources.adult(tmp_path)
  np.testing.assert_array_equal(source.pool.x, [[30, 0, 1], [40, 1, 0]])  # age, Female, Male
  np.testing.assert_array_equal(source.pool.group, [2, 1])
  np.testing.assert_array_equal(source.test.group, [3])
  rows = ['alcohol,quality,color', '9,7,red', '10,8,white', '11,9,red']
  (folder / 'wine_quality.csv.gz').write_bytes(table(rows))
  wine = sources.wine(tmp_path)
  np.testing.assert_array_equal(wine.pool.y, [0, 1, 1])
  np.testing.assert_array_equal(wine.pool.group, [4, 5, 5])
  np.testing.assert_array_equal(wine.pool.x, [[9, 1, 0], [10, 0, 1], [11, 1, 0]])
  assert wine.test is None


def test_a_missing_file_says_what_the_folder_should_hold(tmp_path):
  with pytest.raises(UserError, match=r'adult.*--data names a folder with images/ and tabular/'):
    sources.adult(tmp_path)


def test_a_tfds_image_set(tmp_path):
  class Blobs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    code_path = None

    def _info(self):
      features = {
        'image': tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
        'label': tfds.features.ClassLabel(num_classes=10),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(n) for split, n in (('train', 4), ('test', 2))}

    def _generate_examples(self, n):
      for i in range(n):
        yield i, {'image': np.full((28, 28, 1), 10 * i, np.uint8), 'label': i}

  tfds.disable_progress_bar()
  with redirect_stdout(io.StringIO()):
    Blobs(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  source = sources.tfds_images('blobs', str(tmp_path))
  order = np.argsort(source.pool.y)
  np.testing.assert_allclose(source.pool.x[order, 7], np.arange(4) * 10 / 255, rtol=1e-6)
  assert len(source.test.y) == 2
  with pytest.raises(UserError, match=r"--tfds='blops' cannot be read"):
    sources.tfds_images('blops', str(tmp_path))


@real
def test_the_real_files():
  fashion = sources.images(REAL, 'fashion_mnist')
  assert [e.x.shape for e in fashion[1:]] == [(60_000, 196), (10_000, 196)]
  np.testing.assert_array_equal(np.bincount(fashion.pool.y), [6000] * 10)
  adult = sources.adult(REAL)
  assert (len(adult.pool.y), len(adult.test.y)) == (32_561, 16_281)
  assert adult.pool.y.mean() == pytest.approx(0.241, abs=0.001)
  assert sources.wine(REAL).pool.y.sum() == 198


# Metrics ------------------------------------------------------------------------------------------


def test_metrics_of_rare_events_are_those_of_scikit_learn():
  rng = np.random.default_rng(0)
  y = (rng.random(400) < 0.1).astype(np.int32)
  score = rng.normal(size=400) + 1.5 * y - 1
  logits = np.stack([np.zeros(400), score], axis=1)
  e = sources.examples(score[:, None], y)
  threshold = tasks.best_threshold(logits, e)
  found = tasks.rare(logits, e, threshold)
  assert found['average precision'] == pytest.approx(metrics.average_precision_score(y, score))
  assert found['recall'] == pytest.approx(metrics.recall_score(y, score > 0))
  assert found['F1'] == pytest.approx(metrics.f1_score(y, score > 0))
  every = [metrics.f1_score(y, score >= limit) for limit in score]
  assert found['F1, tuned threshold'] == pytest.approx(max(every))


def test_metrics_by_class_and_group():
  logits = np.eye(3)[[0, 0, 1, 2, 2, 0]]
  found = tasks.by_class(logits, sources.examples(logits, [0, 0, 1, 1, 2, 2]), 0)
  assert found == {'balanced accuracy': pytest.approx(2 / 3), 'tail accuracy': 0.5}
  logits = np.eye(2)[[0, 0, 1, 1, 0, 1]]
  e = sources.examples(logits, [0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 3, 3])
  found = tasks.by_group(logits, e, 0)
  accuracy = 4 / 6  # by group 1, 0, 1, 1/2
  gaps = (1 - accuracy) + accuracy + (1 - accuracy) + (accuracy - 0.5)
  assert found == {
    'worst group': 0,
    'accuracy': pytest.approx(accuracy),
    'equity-scaled': pytest.approx(accuracy / (1 + gaps)),
  }
  shares = tasks.by_group(logits, e, 0, shares=(0.0, 0.0, 0.0, 1.0))
  assert shares['accuracy'] == 0.5


# Learning -----------------------------------------------------------------------------------------

TINY = OFFLINE['noisy_labels'][0]._replace(steps=4, batch=16, hidden=8, rates=(1e-3, 1e-2))


@pytest.fixture(scope='module')
def stacked():
  source = OFFLINE['noisy_labels'][1]()
  return learner.stack([tasks.problem(TINY, source, seed) for seed in range(2)])


@jax.jit
def slope(params, x, y, tilt):
  """Gradient of the tilted mean, its weights constant."""

  def objective(params):
    losses = optax.softmax_cross_entropy_with_integer_labels(model.forward(params, x), y)
    return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(tilt * losses)) * losses)

  return jax.grad(objective)(params)


def by_hand(sets, seed, rate, steps, tilt):
  """Test logits of the plain loop in Python, over the batches of these steps."""
  key = jax.random.key(seed)
  params = model.initial(key, 64, TINY.hidden, 10)
  optimizer = optax.adamw(rate, weight_decay=TINY.decay)
  state = optimizer.init(params)
  for t in steps:
    rows = jax.random.randint(jax.random.fold_in(key, t), (TINY.batch,), 0, 800)
    gradient = slope(params, sets.train.x[rows], sets.train.y[rows], tilt)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return model.forward(params, sets.test.x)


def test_many_runs_at_once_are_each_the_plain_loop(stacked):
  _, test = learner.train(TINY, ARMS['tilted t=-2'], stacked, [0, 1, 1], [1e-3, 1e-2, 1e-3])
  sets = jax.tree.map(lambda a: a[1], stacked)
  np.testing.assert_allclose(test[1], by_hand(sets, 1, 1e-2, range(4), -2.0), atol=1e-5)


def test_a_restart_trains_anew_on_the_batches_that_follow(stacked):
  """JTT with an upweighting of 1: its second run is plain training."""
  arm = ARMS['jtt']._replace(weighting=lambda f: weights.jtt(f.examples, 1.0, 2), restart=0.5)
  _, test = learner.train(TINY, arm, stacked, [0], [1e-2])
  sets = jax.tree.map(lambda a: a[0], stacked)
  np.testing.assert_allclose(test[0], by_hand(sets, 0, 1e-2, range(2, 6), 0.0), atol=1e-5)


def test_facts_are_counts(stacked):
  known = learner.facts(TINY, stacked)
  assert known.class_counts.sum() == known.examples == 800
  np.testing.assert_array_equal(known.group_counts, [800])
  labels = np.asarray(stacked.train.y).ravel()
  np.testing.assert_allclose(known.class_counts, np.bincount(labels) / 2)


def test_few_labels_train_without_the_hidden_ones():
  task = OFFLINE['semi_supervised'][0]._replace(steps=2, batch=80, hidden=8)
  drawn = learner.stack([problem('semi_supervised')])
  assert learner.facts(task, drawn).class_counts.sum() == 40
  _, logits = learner.train(task, ARMS['shrinkmatch'], drawn, [0], [1e-2])
  assert np.isfinite(logits).all()


def test_the_strong_view_hides_a_quarter_of_the_features():
  moved = consistency.disturbed(jax.random.key(0), jnp.ones((2000, 4)))
  assert np.mean(moved == 0) == pytest.approx(0.25, abs=0.03)


# Verdicts -----------------------------------------------------------------------------------------


def result(values, metric='accuracy'):
  return Result(1e-3, [(1e-4, 0.1), (1e-3, 0.2), (1e-2, 0.1)], {metric: values}, 1.0)


def test_verdicts_follow_the_side_of_the_interval():
  found = {
    'uniform': result([0.50, 0.60, 0.70]),
    'up': result([0.60, 0.71, 0.80]),
    'down': result([0.40, 0.51, 0.60]),
    'same': result([0.60, 0.50, 0.71]),
  }
  judged = lambda *args: board.judge(Claim('t', *args), found)[1]
  assert judged('up', 'accuracy') == 'reproduced'
  assert judged('up', 'accuracy', 'lower') == 'opposite'
  assert judged('down', 'accuracy', 'lower') == 'reproduced'
  assert judged('down', 'accuracy') == 'opposite'
  assert judged('same', 'accuracy') == 'not reproduced'
  assert judged('same', 'accuracy', 'lower') == 'not reproduced'
  claims = [Claim('t', 'up', 'accuracy'), Claim('t', 'up', 'accuracy', against='same'),
            Claim('t', 'down', 'accuracy'), Claim('t', 'absent', 'accuracy')]  # fmt: skip
  written = board.record({'t': found}, claims)
  assert [c['verdict'] for c in written['claims']] == ['reproduced', 'not reproduced', 'opposite']
  assert written['methods'] == {
    'up': 'not reproduced (1 of 2)',
    'down': 'not reproduced (0 of 1, 1 opposite)',
  }


def test_a_rate_at_the_end_of_the_grid_is_marked():
  arm = result([0.5])._asdict()
  assert board.edge(arm) == ''
  assert board.edge(arm | {'rate': 1e-4}) == board.edge(arm | {'rate': 1e-2}) == '!'


def test_every_claim_names_a_task_an_arm_and_a_metric():
  for claim in board.CLAIMS:
    task, _ = OFFLINE[claim.task]
    e = sources.examples(np.zeros((40, 1)), np.arange(40) % task.classes, np.arange(40) % 4)
    assert {claim.arm, claim.against} <= set(ARMS)
    assert claim.metric in task.measure(np.eye(task.classes)[e.y], e, 0.0)
    assert claim.expected in ('higher', 'lower')
  assert set(ARMS) == {name for c in board.CLAIMS for name in (c.arm, c.against)}


# The program --------------------------------------------------------------------------------------


def call(folder, *flags):
  return forked.run('experiments.classify', *flags, folder=folder, devices=1)


def test_two_arms_from_start_to_end_and_no_second_time(tmp_path):
  flags = '--workdir=out', '--tasks=worst_group', '--arms=group_dro', '--seeds=2'
  done = call(tmp_path, *flags, '--steps=3')
  assert done.status == 0, done.stderr
  found = json.loads((tmp_path / 'out' / 'result.json').read_text())
  assert list(found['tasks']) == ['worst_group']
  assert list(found['tasks']['worst_group']) == ['uniform', 'group_dro']
  assert len(found['tasks']['worst_group']['uniform']['values']['worst group']) == 2
  assert (tmp_path / 'out' / 'board.png').read_bytes().startswith(b'\x89PNG')
  assert 'worst_group: group_dro (' in done.stdout
  again = call(tmp_path, *flags, '--steps=3')
  assert again.stdout == done.stdout[done.stdout.index('\n\n') + 1 :]
  other = call(tmp_path, *flags, '--steps=2')
  assert 'result.json was made with another steps (3): choose another --workdir' in other.stderr


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--tasks=long_tial', "--tasks: 'long_tial' is not one of them; did you mean 'long_tail'?"),
    ('--arms=group_dr', "--arms: 'group_dr' is not one of them; did you mean 'group_dro'?"),
    ('--seeds=1', '--seeds=1 must be at least 2'),
    ('--data=nowhere', '--data=nowhere is not a folder'),
  ],
)
def test_mistakes_are_one_line(tmp_path, flag, message):
  done = call(tmp_path, '--workdir=out', flag)
  assert done.status == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_help_teaches(tmp_path):
  done = call(tmp_path, '--help')
  assert done.status == 0
  assert 'python -m experiments.classify --workdir=' in done.stdout
