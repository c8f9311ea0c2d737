"""Cosines between domains: against explicit gradients, through the program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from configs import common
from experiments import alignment, checkpoints, train
from experiments.errors import UserError
from experiments.models import lm
from tests.experiments import small


@pytest.mark.slow
def test_the_matrix_is_that_of_explicit_gradients(tmp_path):
  config = small.config(small.write_corpus(tmp_path / 'corpus'), tmp_path / 'root', steps=2)
  config.model.update(n_layer=1, scan=False)
  common.set_weighting(config, 'uniform')
  train.train(config, tmp_path / 'run', devices=jax.devices()[:1])
  found = alignment.read_alignment(tmp_path / 'run', 3, jax.devices()[:1])
  assert found['domains'] == ['easy', 'hard']
  assert found['step'] == 2
  inner, cosines = np.array(found['inner']), np.array(found['cosines'])
  np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-5)
  np.testing.assert_allclose(inner, inner.T, rtol=1e-3)

  run = train.build(config, jax.devices()[:1])
  params = checkpoints.restore_params(tmp_path / 'run', run.abstract_state.params)
  # The blocks are those of an order that depends on the domain and the seed alone.
  from jaxrw.mixtures import shuffled_index

  gradients = []
  for domain, size in enumerate(run.corpus.sizes('train')):
    ids = run.corpus.offsets('train')[domain] + shuffled_index(np.arange(3), size, 0, domain, 0)
    rows = run.corpus.rows('train', ids)

    def mean(params, rows=rows):
      losses, base = lm.token_losses(params, rows, run.model), rows['base']
      return jnp.mean(jnp.sum(losses * base, axis=1) / jnp.sum(base, axis=1))

    gradients.append(ravel_pytree(jax.grad(mean)(params))[0])
  explicit = np.array([[a @ b for b in gradients] for a in gradients])
  np.testing.assert_allclose(inner, explicit, rtol=1e-3)


def test_the_table():
  lines = alignment.matrix_text(['web', 'encyclopedia'], [[1, 0.5], [0.5, 1]]).splitlines()
  assert len({len(line) for line in lines}) == 1
  assert lines[1].split() == ['web', '1.00', '0.50']


def test_not_a_run(tmp_path):
  with pytest.raises(UserError, match='not a run directory'):
    alignment.read_alignment(tmp_path, 2)
