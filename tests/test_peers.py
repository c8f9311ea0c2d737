"""The same weights from another package: `pip install -e '.[peers]'` (it brings torch)."""

import numpy as np
import pytest

import jaxrw
from tests import oracles

pytestmark = pytest.mark.peers
torch = pytest.importorskip('torch')
pytest.importorskip('dataflex')


def _peer_weights(strategy, losses):
  """The peer's weights [B] of sum 1: it returns sum(w l) with w constant, so w is its gradient."""
  from dataflex.train.weighter import loss_weighter

  leaf = torch.tensor(losses, requires_grad=True)
  loss_weighter.LossWeighter(strategy=strategy).get_weighted_loss(leaf).backward()
  return leaf.grad.numpy()


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('strategy', ['linupper', 'quadratic', 'extremes'])
def test_weights_equal_those_of_dataflex(strategy, seed):
  """Its temperature is fixed at 1."""
  losses = np.random.default_rng(seed).gamma(4.0, 0.7, 48).astype(np.float32)
  ours = np.asarray(getattr(jaxrw, f'{strategy}_weights')(losses, 1.0)) / losses.size
  np.testing.assert_allclose(ours, _peer_weights(strategy, losses), rtol=2e-5, atol=1e-6)


def test_its_uniform_is_not_uniform():
  """The entry of that name is softmax(h): why ours has its own."""
  losses = np.arange(1, 6, dtype=np.float32)
  h = np.linspace(-1, 1, 5)
  theirs = _peer_weights('uniform', losses)
  np.testing.assert_allclose(theirs, np.exp(h) / np.exp(h).sum(), rtol=1e-5)
  assert np.ptp(theirs) > 0.3


def test_our_transcription_of_the_published_formula_equals_it_too():
  losses = np.random.default_rng(9).gamma(4.0, 0.7, 48).astype(np.float32)
  for strategy in ('linupper', 'quadratic', 'extremes'):
    official = oracles.official_sum_one(strategy, losses, 1.0)
    np.testing.assert_allclose(official, _peer_weights(strategy, losses), rtol=2e-5, atol=1e-6)
