"""Every weighting x every promise."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxrw
from jaxrw import masked, testing, weights

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
  'linupper_stale': jaxrw.linupper_stale(0.4),
  'trimmed': jaxrw.trimmed(0.6),
  'trimmed_low': jaxrw.trimmed(0.6, side='low'),
  'tilted': jaxrw.tilted(1.5),
  'tilted_negative': jaxrw.tilted(-1.5),
  'tilted_groups': jaxrw.tilted_groups(3, 0.8, -0.5),
  'tilted_stream': jaxrw.tilted_stream(0.5, 0.3),
  'cvar': jaxrw.cvar(0.4),
  'chi_square_dro': jaxrw.chi_square_dro(0.4),
  'self_paced': weights.self_paced(4.0),
  'generalized_cross_entropy': weights.generalized_cross_entropy(0.7, truncation=0.05),
  'rho_loss': jaxrw.rho_loss(0.4),
  'co_teaching': jaxrw.co_teaching(0.6),
  'selective_backprop': jaxrw.selective_backprop(2.0, history=24),
  'grad_norm_sampling': jaxrw.grad_norm_sampling(8, threshold=0.0),
  'jtt': jaxrw.jtt(16, 5.0, until=5),
  'jtt_finding': jaxrw.jtt(16, 5.0, until=9),
  'group_dro': jaxrw.group_dro(3, 0.1),
  'group_dro_soft': jaxrw.group_dro(3, 0.1),
  'group_cvar': jaxrw.group_cvar((1 / 3, 1 / 3, 1 / 3), share=0.5),
  'fair_error_bound': jaxrw.fair_error_bound(3),
  'vertex_class_balance': jaxrw.vertex_class_balance([0.05, 0.5, 0.2, 0.1, 0.0, 1.0]),
  'shrinkmatch': jaxrw.shrinkmatch(0.8, 0.9),
  'inverse_frequency': jaxrw.inverse_frequency([6, 3, 1]),
  'effective_number': jaxrw.effective_number([600, 30, 1]),
  'hedge': jaxrw.hedge(16, 6, 0.3),
  'hedge_smaller': jaxrw.hedge(24, 6, -0.3),
  'adawac': jaxrw.adawac(16, 0.5),
  'importance': jaxrw.importance(),
  'token_topk': jaxrw.token_topk(0.6),
  'token_topk_schedule': jaxrw.token_topk(lambda step: 1 - 0.1 * step),
  'token_topk_all': jaxrw.token_topk(1.0),
  'learning_to_reweight': jaxrw.learning_to_reweight(),
  'meta_weight_net': jaxrw.meta_weight_net(optax.adam(1e-3), hidden=8),
  'adapt': weights.adapt(0.5),
  'group_advantage': weights.group_advantage(3),
  'cap': jaxrw.cap(1.3),
  'unit_mean': jaxrw.unit_mean(),
  'row_shuffled': jaxrw.row_shuffled(jaxrw.linupper(0.4)),
  'after': jaxrw.after(5, jaxrw.linupper(0.4)),
  'after_not_yet': jaxrw.after(8, jaxrw.linupper(0.4)),
  'chain': jaxrw.chain(loss=jaxrw.after(3, jaxrw.linupper(0.4)), cap=jaxrw.cap(1.3)),
}


def _reference(signals):
  losses = signals['losses'].astype(jnp.float32)
  return {'ref_losses': 1 / (1 + losses**2)}


def _of_examples(signals):
  return masked.example_level(signals['losses'].astype(jnp.float32), signals['base'])[0]


def _alignment(signals):
  return {'alignment': _of_examples(signals) - 1}


def _representation(signals):
  losses = _of_examples(signals)
  features = jnp.stack([losses, jnp.ones_like(losses), losses**2], axis=1)
  return {'representation': features, 'anchor': jnp.array([1.0, -2.0, 0.3])}


def _rewards(signals):
  return {'extra': {'rewards': _of_examples(signals)}}


def _norms(signals):
  return {'grad_norms': jnp.abs(_of_examples(signals) - 1)}


def _predictions(signals):
  losses = _of_examples(signals)
  return {'logits': jnp.stack([3 - losses, losses], axis=1), 'labels': signals['group_ids'] % 2}


def _labels(signals):
  return {'labels': signals['group_ids']}


def _binary_labels(signals):
  return {'labels': (signals['losses'].astype(jnp.float32) > 2).astype(jnp.int32)}


def _weak_views(signals):
  losses = _of_examples(signals)
  return {'logits': jnp.stack([losses, 2 - losses, 0 * losses, losses / 3], axis=1)}


def _memberships(signals):
  ids, losses = signals['group_ids'], _of_examples(signals)
  certain = jnp.exp(-jnp.abs(losses))
  return {'group_ids': certain[:, None] * (ids[:, None] == jnp.arange(3))}


def _sampling(signals):
  losses = _of_examples(signals)
  return {
    'sampling_prob': 1 / (1 + losses**2),
    'objective_prob': jnp.array([0.5, 0.3, 0.2]),
  }


# What the promises need to know beside the declaration: by the name of the factory or of the case.
CLAIMS = {
  'chain': {'level': 'entry'},  # a cap acts on entries
  'row_shuffled': {'equivariant': False},
  'linupper_mask': {'nonfinite': 'mask'},
  'group_dro': {'ids': 'group_ids'},
  'hedge': {'ids': 'example_ids', 'table': True},
  'adawac': {'ids': 'example_ids', 'table': True, 'terms': 2},
  'learning_to_reweight': {'extra_signals': _alignment},
  'adapt': {'extra_signals': _representation},
  'group_advantage': {'extra_signals': _rewards, 'ids': 'group_ids'},
  'token_topk': {'extra_signals': _reference},
  'rho_loss': {'extra_signals': _reference},
  'co_teaching': {'extra_signals': _reference},
  'grad_norm_sampling': {'extra_signals': _norms, 'equivariant': False},
  'jtt': {'extra_signals': _predictions, 'ids': 'example_ids', 'table': True},
  'group_dro_soft': {'extra_signals': _memberships, 'ids': None},
  'tilted_groups': {'ids': 'group_ids'},
  'group_cvar': {'ids': 'group_ids'},
  'fair_error_bound': {'ids': 'group_ids'},
  'vertex_class_balance': {'extra_signals': _binary_labels, 'terms': 6},
  'shrinkmatch': {'extra_signals': _weak_views, 'terms': 2},
  'inverse_frequency': {'extra_signals': _labels, 'ids': 'labels'},
  'effective_number': {'extra_signals': _labels, 'ids': 'labels'},
  'importance': {'extra_signals': _sampling, 'ids': 'group_ids'},
}


def _factory_of(name):
  """The name of the factory of a case: `token_topk` for `token_topk_all`."""
  while name and not hasattr(weights, name):
    name = name.rpartition('_')[0]
  return name


def claims(name):
  factory = _factory_of(name)
  declaration = getattr(getattr(weights, factory, None), 'declaration', None)
  promised = {key: getattr(declaration, key) for key in ('scale', 'level') if declaration}
  rtol = 1e-2 if name.endswith('sharp') else 2e-5
  return promised | {'rtol': rtol} | CLAIMS.get(factory, {}) | CLAIMS.get(name, {})


# The same code paths at other settings; `pytest -m slow` runs them.
VARIANTS = (
  *('linupper_schedule', 'linupper_sharp', 'quadratic_sharp', 'extremes_sharp', 'upper_sharp'),
  *('token_topk_schedule', 'token_topk_all', 'trimmed_low', 'hedge_smaller', 'after_not_yet'),
)


@pytest.mark.parametrize(
  'promise',
  # The step itself is tested with a few weightings in test_steps.py and test_accumulation.py.
  [pytest.param(p, marks=[pytest.mark.slow] if p == 'trains' else []) for p in testing.PROMISES],
)
@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=[pytest.mark.slow] if n in VARIANTS else []) for n in CASES]
)
def test_promise(name, promise):
  testing.check_weighting(CASES[name], promises=[promise], **claims(name))


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
    assert declared.level in ('example', 'entry', 'token'), name
    assert declared.provenance in ('paper', 'official_code', 'reconstructed', 'ours'), name
    assert declared.source, name
    assert factory.__doc__, name


def test_every_public_name_is_a_weighting_its_plain_function_or_a_helper():
  for name in set(weights.__all__) - set(_factories()):
    stem = name.removesuffix('_weights')
    helpers = {'temperature_schedule', 'anchor_mean', 'pool_positions'} | {
      'fair_error_bound_dice',
      'balanced_bins',
      'shrink_mask',
      'error_log',
      'class_weights',
      'growing_threshold',
      'co_teaching_share',
    }
    assert stem in _factories() or name in helpers, name


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


def _mesh_axes():
  return float(len(jax.sharding.get_abstract_mesh().axis_names))


@pytest.mark.parametrize(
  ('promise', 'broken'),
  [
    ('state_is_stable', lambda state, losses, base: state.astype(jnp.bfloat16)),
    ('padding_is_ignored', lambda state, losses, base: state + losses.sum()),
    ('jit_and_scan', lambda state, losses, base: state + isinstance(losses, jax.core.Tracer)),
    ('mesh_parity', lambda state, losses, base: state + _mesh_axes()),
    ('mesh_parity', lambda state, losses, base: state + base.reshape(16, -1).mean(1)),  # sharded
  ],
)
def test_a_broken_state_is_caught(promise, broken):
  weighting = jaxrw.Weighting(
    lambda: jnp.zeros(16), lambda w, state, *, losses, base, **_: (w, broken(state, losses, base))
  )
  with pytest.raises(AssertionError, match=f'^{promise}: '):
    testing.check_weighting(weighting, promises=[promise])


@pytest.mark.parametrize(
  'broken',
  [
    lambda w, ids: (w, ids[0]),  # unknown rows move the state
    lambda w, ids: (2 * w, 0),  # ... do not keep their weight
    lambda w, ids: (jnp.where(ids < 0, w, w * jnp.sum(ids < 0)), 0),  # ... change those of others
    lambda w, ids: (w, 0),  # an id out of range goes unnoticed
    lambda w, ids: (jnp.where((ids < -1) | (ids > 99), jnp.nan, w), 0),  # ... if it is concrete
  ],
)
def test_a_careless_table_is_caught(broken):
  def update(w, state, *, group_ids, base, **_):
    out, moved = broken(w, group_ids if w.ndim == 1 else group_ids[:, None])
    return jnp.where(base > 0, out, 0), state + moved

  weighting = jaxrw.Weighting(lambda: jnp.zeros(()), update)
  with pytest.raises(AssertionError, match=r'^unknown_ids: '):
    testing.check_weighting(weighting, ids='group_ids', promises=['unknown_ids'])


def test_a_weighting_of_tokens_that_takes_losses_of_examples_is_caught():
  with pytest.raises(AssertionError, match=r'^token_level: '):
    testing.check_weighting(jaxrw.uniform(), level='token', promises=['token_level'])


def test_a_table_that_leaves_its_layout_is_caught():
  def update(w, state, **_):
    return w, jax.lax.with_sharding_constraint(state, jax.P()) if _mesh_axes() else state

  gathered = jaxrw.Weighting(lambda: jnp.zeros(16), update)
  with pytest.raises(AssertionError, match=r'(?s)^mesh_parity: .*the state left'):
    testing.check_weighting(gathered, table=True, promises=['mesh_parity'])
