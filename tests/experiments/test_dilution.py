"""Effective robustness against its definition, and the linear experiment on dilution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments import dilution, plots
from experiments.evaluators import robustness


def test_models_on_the_line_have_none_and_a_shift_is_what_they_have():
  accuracy = np.array([0.55, 0.7, 0.9])
  shifted = special.expit(0.8 * special.logit(accuracy) - 0.3)
  line = robustness.fit_logit_line(accuracy, shifted)
  np.testing.assert_allclose(line[:2], (0.8, -0.3), rtol=1e-9)
  assert (line.low, line.high) == (0.55, 0.9)
  np.testing.assert_allclose(robustness.effective_robustness(accuracy, shifted, line), 0, atol=1e-9)
  above = robustness.effective_robustness(accuracy, shifted + 0.03, line)
  np.testing.assert_allclose(above, 0.03, rtol=1e-6)


def test_accuracies_of_zero_and_one_are_finite():
  assert np.all(np.isfinite(robustness.logit(np.array([0.0, 1.0]))))


@pytest.mark.parametrize(
  ('accuracy', 'shifted', 'message'),
  [
    ([0.5], [0.5], 'at least 2'),
    ([0.5, 0.6], [0.5], 'at least 2'),
    ([0.5, 0.5], [0.4, 0.3], 'one'),
  ],
)
def test_lines_that_cannot_be(accuracy, shifted, message):
  with pytest.raises(ValueError, match=message):
    robustness.fit_logit_line(accuracy, shifted)


def test_the_drawn_feature_agrees_as_often_as_it_should():
  x, label = dilution.draw(jax.random.key(0), jnp.full(50_000, 0.8))
  assert float(jnp.mean(label)) == pytest.approx(0, abs=0.02)
  # The spurious feature has the sign of the label up to noise of 0.5: P(|noise| < 1) on one side.
  agrees = float(jnp.mean(jnp.sign(x[:, 1]) == label))
  flip = special.ndtr(-2.0)
  assert agrees == pytest.approx(0.8 * (1 - flip) + 0.2 * flip, abs=0.01)


@pytest.mark.slow
def test_dilution_and_what_weights_win_back():
  curves = dilution.run(3, 1000)
  under_shift = [curves.shifted[f'{share:.0%}'].mean() for share in dilution.SHARES]
  assert np.all(np.diff(under_shift) < 0)
  assert under_shift[0] - under_shift[-1] > 0.2
  lost = under_shift[0] - under_shift[3]
  for name in ('75%, Group DRO', '75%, first source only'):
    assert curves.shifted[name].mean() - under_shift[3] > 0.6 * lost
  text = dilution.table_text(curves).splitlines()
  assert len({len(line) for line in text}) == 1
  assert any('Group DRO' in line for line in dilution.claims(curves))
  figure = plots.draw_png(lambda: dilution.draw_curves(curves, plots.LIGHT), plots.LIGHT)
  assert figure.startswith(b'\x89PNG')


def test_weights_towards_one_source_are_training_on_it_alone():
  """Importance weights (1, 0) over q: the gradient of the first source's own mean, exactly."""
  key = jax.random.key(1)
  source = (jnp.arange(400) < 300).astype(jnp.int32)
  x, label = dilution.draw(key, jnp.asarray(dilution.AGREEMENT)[source])
  weighted = dilution.fit(x, label, source, 'first', (0.25, 0.75))
  own = source == 0
  alone = dilution.fit(x[own], label[own], jnp.zeros(100, jnp.int32), 'plain', (1.0, 0.0))
  np.testing.assert_allclose(weighted, alone, rtol=1e-4)
