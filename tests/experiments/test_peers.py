"""Comparisons with other packages: our sides against libraries, and how a peer is called."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.peers import cases


def test_the_game_is_scikit_learns_logistic_regression():
  linear_model = pytest.importorskip('sklearn.linear_model')
  a = cases.points_input(None)
  rng = np.random.default_rng(0)
  game = cases._game()
  for share in (0.1, 0.5, 1.0):
    present = rng.random(80) < share
    model = linear_model.LogisticRegression(tol=1e-8).fit(a['x'][present], a['y'][present])
    expected = model.score(a['test_x'], a['test_y'])
    assert abs(float(game(present.astype(np.float32))) - expected) <= 1 / 200
  assert game(np.zeros(80, np.float32)) == 0
  assert game((a['y'] == 1).astype(np.float32)) == 0


def test_our_sides_of_small_cases():
  found = cases.neighbors_ours(cases.neighbors_input(None, 30, 8))
  assert np.isfinite(found['values']).all()
  text = cases.corpus_input(None, megabytes=0.05)
  assert cases.corpus_ours(text)['values'].shape == text['sizes'].shape
  lists = cases.lists_input(None, 50, 40)
  values = cases.lists_ours(lists)['values']
  assert values.shape == (40,)
  assert np.ptp(values) > 0


WORKER = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
name, given, taken = sys.argv[1:]
with np.load(given, allow_pickle=False) as a:
  np.savez(taken, values=a['x'] + 1, seconds=0.25)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
  """A peer in this environment."""
  monkeypatch.setattr(cases, 'WORKERS', tmp_path)
  monkeypatch.setattr(cases, 'environment', lambda *_: sys.executable)
  return lambda script: (tmp_path / 'peer.py').write_text(script)


def test_a_peer_gets_arrays_and_gives_arrays_and_its_time(peer, tmp_path):
  peer(WORKER)
  found, seconds = cases.run_peer('peer', 'case', {'x': np.arange(3)}, tmp_path)
  np.testing.assert_array_equal(found['values'], [1, 2, 3])
  assert seconds == 0.25
  assert not list(tmp_path.glob('*.npz'))


def test_a_peer_that_fails_says_why(peer, tmp_path):
  peer('raise RuntimeError("no such model")')
  with pytest.raises(UserError, match=r'(?s)peer failed on case:.*no such model'):
    cases.run_peer('peer', 'case', {'x': np.arange(3)}, tmp_path)


def test_an_environment_that_cannot_be_installed_is_not_taken_for_one(tmp_path, monkeypatch):
  monkeypatch.setitem(cases.REQUIREMENTS, 'peer', ['--no-index', 'no-such-package-at-all==1'])
  with pytest.raises(UserError, match='cannot install --no-index no-such-package-at-all==1'):
    cases.environment('peer', tmp_path / 'environment')
  assert not (tmp_path / 'environment' / 'complete').exists()


def test_a_folder_without_documents(tmp_path):
  with pytest.raises(UserError, match=r'has no \.jsonl or \.jsonl\.gz files'):
    cases.corpus_input(tmp_path)


@pytest.mark.slow  # most of it compiles
def test_influence_on_a_small_gpt_is_a_product_of_gradients(monkeypatch):
  """<g_query, solved g_i> from explicit gradients, and the arrays that the peer's worker reads."""
  from experiments.value import text
  from jaxrw import attribution

  tiny = text.Settings(
    domains=2, examples=16, length=8, width=8, layers=1, heads=2, targets=1, target_size=2, steps=4,
    batch=8,
  )  # fmt: skip
  monkeypatch.setattr(cases, '_GPT', tiny)
  given = cases.gpt_input(None, queries=2)
  assert {'tokens', 'places', 'head/kernel', 'head/bias', 'blocks/0/qkv/kernel'} <= set(given)
  assert given['train'].shape == (16, 9)
  assert given['queries'].shape == (2, 9)
  found = np.asarray(cases.gpt_ours(given)['values'])
  assert found.shape == (2, 16)
  params = {
    'tokens': given['tokens'], 'places': given['places'],
    'head': {k: given[f'head/{k}'] for k in ('kernel', 'bias')},
    'blocks': {'0': {
      part: {k: given[f'blocks/0/{part}/{k}'] for k in ('kernel', 'bias')}
      for part in ('qkv', 'out', 'up', 'down')
    }},
  }  # fmt: skip
  params = jax.tree.map(jnp.asarray, params)
  tokens = jnp.asarray(given['train'])
  batches = [{'tokens': t, 'labels': t[:, 1:]} for t in jnp.split(tokens, 2)]
  factors = attribution.ekfac(jax.random.key(0), cases.gpt_forward, params, batches, labels='given')
  slope = jax.jit(jax.grad(lambda p, t: 8 * text.example_losses(tiny, p, t[None])[0]))
  query = attribution.ekfac_solve(factors, slope(params, jnp.asarray(given['queries'][1])))
  for i in (0, 7):
    parts = zip(jax.tree.leaves(query), jax.tree.leaves(slope(params, tokens[i])))
    product = sum(float(jnp.vdot(a, b)) for a, b in parts)
    assert found[1, i] == pytest.approx(product, rel=1e-3, abs=1e-4 * float(np.abs(found).max()))
  note = cases.gpt_note(given, {'values': found, 'peer': {'values': found}}, 1.0)
  assert '1.00000 or more' in note
