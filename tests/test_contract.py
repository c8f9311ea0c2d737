"""Every weighting x every promise."""

import jax.numpy as jnp
import pytest

import jaxrw
from jaxrw import testing, weights

SCHEDULE = jaxrw.temperature_schedule(float('inf'), 0.4, begin=2, steps=10)

# Each public weighting at the settings worth checking; a new one without an entry here fails below.
CASES = {
  'uniform': jaxrw.uniform(),
  'linupper': jaxrw.linupper(0.4),
  'linupper_schedule': jaxrw.linupper(SCHEDULE),
  'linupper_sharp': jaxrw.linupper(1e-3),
  'linupper_mask': jaxrw.linupper(0.4, nonfinite='mask'),
  'quadratic': jaxrw.quadratic(0.4),
  'quadratic_sharp': jaxrw.quadratic(1e-3),
  'extremes': jaxrw.extremes(0.4),
  'extremes_sharp': jaxrw.extremes(1e-3),
  'upper': jaxrw.upper(1.0),
  'upper_sharp': jaxrw.upper(1e-3),
  'kl_dro': jaxrw.kl_dro(1.0),
  'cap': jaxrw.cap(1.3),
  'unit_mean': jaxrw.unit_mean(),
  'row_shuffled': jaxrw.row_shuffled(jaxrw.linupper(0.4)),
  'after': jaxrw.after(5, jaxrw.linupper(0.4)),
  'after_not_yet': jaxrw.after(8, jaxrw.linupper(0.4)),
  'chain': jaxrw.chain(loss=jaxrw.after(3, jaxrw.linupper(0.4)), cap=jaxrw.cap(1.3)),
}
ENTRY_LEVEL = {'chain'}  # a cap acts on entries


def _claims(name):
  factory = getattr(weights, name, None) or getattr(weights, name.split('_')[0], None)
  declaration = getattr(factory, 'declaration', None)
  level = 'entry' if name in ENTRY_LEVEL else getattr(declaration, 'level', 'example')
  rtol = 1e-2 if name.endswith('sharp') else 2e-5
  nonfinite = 'mask' if name.endswith('mask') else 'propagate'
  return {
    'level': level,
    'equivariant': name != 'row_shuffled',
    'rtol': rtol,
    'nonfinite': nonfinite,
  }


@pytest.mark.parametrize('promise', testing.PROMISES)
@pytest.mark.parametrize('name', CASES)
def test_promise(name, promise):
  testing.check_weighting(CASES[name], promises=[promise], **_claims(name))


def _factories():
  return {
    name: getattr(weights, name)
    for name in weights.__all__
    if hasattr(getattr(weights, name), 'declaration')
  }


def test_every_public_weighting_is_checked_and_declares_itself():
  assert set(_factories()) <= set(CASES)
  for name, factory in _factories().items():
    declared = factory.declaration
    assert declared.scale in ('normalized', 'absolute', 'signed'), name
    assert declared.level in ('example', 'entry'), name
    assert declared.provenance in ('paper', 'official_code', 'reconstructed', 'ours'), name
    assert declared.source, name
    assert factory.__doc__, name


def test_every_public_name_is_a_weighting_its_plain_function_or_a_schedule():
  for name in set(weights.__all__) - set(_factories()):
    stem = name.removesuffix('_weights')
    assert stem in _factories() or name == 'temperature_schedule', name


@pytest.mark.parametrize(
  ('promise', 'broken'),
  [
    ('shape_dtype_and_sum', lambda w, losses, base: 2 * w),
    ('shape_dtype_and_sum', lambda w, losses, base: w.astype(jnp.bfloat16)),
    ('padding_is_ignored', lambda w, losses, base: w * jnp.max(losses) / jnp.max(losses + 1)),
    ('permutation_equivariant', lambda w, losses, base: (w.T * jnp.arange(w.shape[0])).T),
    ('example_level', lambda w, losses, base: w * losses),
    ('bfloat16_losses', lambda w, losses, base: w.astype(losses.dtype)),
    ('degenerate_batches', lambda w, losses, base: w * losses / losses),
    ('degenerate_batches', lambda w, losses, base: jnp.nan_to_num(w * 0 * losses)),
    ('degenerate_batches', lambda w, losses, base: jnp.where(jnp.isfinite(losses), w, 0)),
    ('mesh_parity', lambda w, losses, base: w * jnp.sort(w, axis=0)),
  ],
)  # fmt: skip
def test_a_broken_weighting_is_caught(promise, broken):
  weighting = jaxrw.Weighting(
    lambda: (), lambda w, state, *, losses, base, **_: (broken(w, losses, base), state)
  )
  with pytest.raises(AssertionError, match=f'^{promise}: '):
    testing.check_weighting(weighting, promises=[promise])
