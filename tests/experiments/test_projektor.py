"""The experiment on digits in small, and the transport library against finite differences."""

import importlib.util
import json

import numpy as np
import pytest

from experiments import files
from experiments.errors import UserError
from experiments.projektor import digits
from jaxrw.mixtures.projection import transport_mixture_gradient


def needs(*names):
  missing = [name for name in names if importlib.util.find_spec(name) is None]
  return pytest.mark.skipif(bool(missing), reason=f'not installed: {missing}')


TINY = digits.Settings(
  repetitions=2, sizes=(30, 45), target=90, grid=4, draws=1, held_out=3, target_draws=1,
  compared_draws=2, ascent=3, evaluated=60, steps=20,
)  # fmt: skip


@needs('ot')
@pytest.mark.parametrize('seed', range(3))
def test_potentials_give_the_change_of_the_distance(seed):
  """With p_i growing and the other sources giving way in proportion."""
  rng = np.random.default_rng(seed)
  ids = np.repeat(np.arange(3), (20, 12, 9))
  x, y = rng.normal(size=(41, 2)) + ids[:, None], rng.normal(size=(37, 2))
  cost = np.linalg.norm(x[:, None] - y[None], axis=-1)
  counts = np.bincount(ids)
  p = counts / counts.sum()

  def distance(mixture):
    return digits.transport(cost, (mixture / counts)[ids])[0]

  h, expected = 1e-5, []  # 41 and 37 share no factor, so that the potentials are unique
  for i in range(3):
    move = np.where(np.arange(3) == i, 1, -p / (1 - p[i]))
    expected.append((distance(p + h * move) - distance(p - h * move)) / (2 * h))
  potentials = digits.transport(cost)[1]
  np.testing.assert_allclose(
    transport_mixture_gradient(potentials, ids, 3), expected, rtol=1e-4, atol=1e-5
  )


@needs('ot')
def test_transport_on_a_line_is_that_of_sorted_points():
  x, y = np.random.default_rng(0).normal(size=(2, 30))
  expected = np.abs(np.sort(x) - np.sort(y)).mean()
  distance, potentials = digits.transport(np.abs(x[:, None] - y))
  assert distance == pytest.approx(expected, abs=1e-10)
  assert potentials.shape == (30,)


def test_grid_and_samples():
  grid = digits.grid_mixtures(10)
  assert grid.shape == (66, 3)
  np.testing.assert_allclose(grid.sum(1), 1)
  assert len(np.unique(grid, axis=0)) == 66
  shares = np.eye(3)  # source i draws example i only
  task = digits.Task(np.zeros((3, 64)), np.arange(3), shares, *(None,) * 3)
  for p in ([1, 0, 0], [0.335, 0.335, 0.33], [0, 0, 1]):
    rows, ids = digits.sample(task, np.float32(p), 200, np.random.default_rng(0))
    np.testing.assert_array_equal(rows, ids)
    assert abs(np.bincount(ids, minlength=3) - 200 * np.array(p)).max() <= 1
    assert len(ids) == 200


@needs('ot', 'sklearn', 'matplotlib')
def test_smoke(tmp_path):
  from experiments import plots

  record = digits.run(TINY)
  files.write_json(tmp_path / 'result.json', record)
  assert json.loads((tmp_path / 'result.json').read_text())['verdict'] == record['verdict']
  assert plots.draw_png(lambda: digits.draw(record, plots.LIGHT), plots.LIGHT)[:4] == b'\x89PNG'
  text = digits.describe(record)
  assert 'Verdict: ' in text
  for repetition in record['repetitions']:
    assert np.isfinite(repetition['predicted']['transport']).all()
    np.testing.assert_allclose(repetition['path'].sum(1), 1, atol=1e-5)
  again = digits.run(TINY._replace(repetitions=1))
  np.testing.assert_array_equal(
    again['repetitions'][0]['predicted']['transport'],
    record['repetitions'][0]['predicted']['transport'],
  )


@pytest.mark.parametrize(
  ('found', 'expected'),
  [
    (['higher', 'higher'], 'reproduced'),
    (['higher', 'unresolved'], 'undecided'),
    (['higher', 'lower'], 'not reproduced'),
    (['single', 'single'], 'undecided'),
  ],
)
def test_verdict(found, expected):
  assert digits.verdict_of({str(i): {'verdict': v} for i, v in enumerate(found)}) == expected


def test_a_missing_library_is_one_line(monkeypatch):
  def refuse(name):
    raise ImportError(name)

  monkeypatch.setattr(digits.importlib, 'import_module', refuse)
  with pytest.raises(UserError, match='needs POT: pip install POT') as error:
    digits.library('ot')
  assert '\n' not in str(error.value)
