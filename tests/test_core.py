"""Chains, burn-in, configs and the checks of signals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw import core, weights

LOSSES = jnp.array([1.0, 2.0, 3.0, 4.0])


def _counter(start=0.0):
  """A stateful stage: counts its updates and multiplies by 2."""
  return jaxrw.Weighting(
    lambda: {'count': jnp.asarray(start)},
    lambda w, state, **_: (2 * w, {'count': state['count'] + 1}),
  )


def _update(rw, state=None, **signals):
  state = rw.init() if state is None else state
  return rw.update(jnp.ones(4), state, **{'losses': LOSSES, **signals})


# chain


def test_stages_run_in_the_order_given():
  plus, times = (core.stateless(f) for f in (lambda w, **_: w + 3, lambda w, **_: w * 5))
  np.testing.assert_array_equal(_update(jaxrw.chain(a=plus, b=times))[0], np.full(4, 20))
  np.testing.assert_array_equal(_update(jaxrw.chain(b=times, a=plus))[0], np.full(4, 8))


def test_a_chain_of_nothing_is_neutral():
  w, state = _update(jaxrw.chain())
  np.testing.assert_array_equal(w, np.ones(4))
  assert state == {}


def test_state_is_keyed_by_name_and_stateless_stages_leave_no_trace():
  rw = jaxrw.chain(loss=jaxrw.linupper(0.4), ema=_counter(), cap=jaxrw.cap(3.0), other=_counter(7))
  state = rw.init()
  assert list(state) == ['ema', 'other']
  _, state = _update(rw, state)
  assert (state['ema']['count'], state['other']['count']) == (1, 8)
  assert jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(2.0)).init() == {}
  nested = jaxrw.chain(inner=jaxrw.chain(loss=jaxrw.linupper(0.4)), count=_counter())
  assert list(nested.init()) == ['count'], 'an empty inner chain is stateless, too'
  assert list(_update(nested)[1]) == ['count']


def test_stateless_stages_may_come_and_go_between_restores():
  _, state = _update(jaxrw.chain(count=_counter()))
  more = jaxrw.chain(cap=jaxrw.cap(3.0), count=_counter(), loss=jaxrw.linupper(0.4))
  _, state = _update(more, state)
  less = jaxrw.chain(count=_counter())
  w, state = _update(less, state)
  assert state == {'count': {'count': 3}}
  np.testing.assert_array_equal(w, np.full(4, 2))


def test_a_stage_without_its_state_is_an_error_and_a_removed_one_is_dropped():
  with pytest.raises(KeyError, match="no state for stage 'new'"):
    _update(jaxrw.chain(old=_counter(), new=_counter()), {'old': {'count': jnp.ones(())}})
  _, state = _update(jaxrw.chain(loss=jaxrw.uniform()), {'gone': {'count': jnp.ones(())}})
  assert state == {}


def test_chains_nest_and_keep_their_inner_state():
  rw = jaxrw.chain(inner=jaxrw.chain(count=_counter(), cap=jaxrw.cap(9.0)), outer=_counter())
  _, state = _update(rw)
  assert state == {'inner': {'count': {'count': 1}}, 'outer': {'count': 1}}


# Signals


@pytest.mark.parametrize(
  ('name', 'hint'),
  [('loses', "did you mean 'losses'"), ('group_id', "did you mean 'group_ids'"), ('keys', "'key'")],
)
def test_unknown_signals_are_refused_with_the_nearest_name(name, hint):
  with pytest.raises(TypeError, match=hint) as error:
    _update(jaxrw.chain(loss=jaxrw.uniform()), **{name: LOSSES})
  assert f"extra={{'{name}': ...}}" in str(error.value)


def test_a_name_like_no_other_gets_no_hint():
  with pytest.raises(TypeError, match="unknown signal 'zzz': your own signals go in extra"):
    _update(jaxrw.chain(), zzz=1)


@pytest.mark.parametrize('name', ['linupper', 'quadratic', 'extremes', 'upper', 'kl_dro'])
def test_a_missing_required_signal_is_named(name):
  for rw in (getattr(jaxrw, name)(), jaxrw.chain(only=getattr(jaxrw, name)())):
    with pytest.raises(TypeError, match="'losses'"):
      rw.update(jnp.ones(4), rw.init())


def test_stages_swallow_every_known_signal():
  everything = {name: LOSSES for name in core.SIGNALS if name not in ('base', 'step', 'key')}
  everything |= {'base': jnp.ones(4), 'step': 0, 'key': jax.random.key(0), 'extra': {}}
  stages = {name: getattr(weights, name)() for name in ('linupper', 'trimmed', 'unit_mean')}
  for name, stage in {**stages, 'cap': weights.cap(2.0)}.items():
    assert jaxrw.chain(stage=stage).update(jnp.ones(4), {}, **everything)[0].shape == (4,), name


# after


def test_burn_in_holds_weights_and_state_still():
  rw = jaxrw.after(3, _counter(5.0))
  update = jax.jit(lambda step, state: rw.update(jnp.full(4, 1.5), state, step=step))
  state = rw.init()
  for step in range(5):
    w, state = update(step, state)
    acts = step >= 3
    np.testing.assert_array_equal(w, np.full(4, 3.0 if acts else 1.5))
    assert state['count'] == 5 + max(0, step - 2)


def test_burn_in_ignores_what_a_stage_makes_of_broken_losses():
  rw = jaxrw.after(2, jaxrw.linupper(0.4))
  broken = LOSSES.at[1].set(jnp.nan)
  np.testing.assert_array_equal(_update(rw, losses=broken, step=1)[0], np.ones(4))
  assert np.all(np.isnan(_update(rw, losses=broken, step=2)[0]))


def test_burn_in_from_step_0_is_the_stage_itself():
  stage = jaxrw.linupper(0.4)
  np.testing.assert_array_equal(
    _update(jaxrw.after(0, stage), step=0)[0], _update(stage, step=0)[0]
  )


def test_bad_burn_in_is_refused():
  with pytest.raises(ValueError, match='start=-1'):
    jaxrw.after(-1, jaxrw.uniform())
  with pytest.raises(TypeError, match="'step'"):
    _update(jaxrw.after(1, jaxrw.uniform()))
  summed = core.stateless(lambda w, **_: jnp.sum(w))
  with pytest.raises(ValueError, match=r'turned weights \(4,\) into \(\)'):
    _update(jaxrw.after(1, summed), step=0)


# from_config


def test_a_config_builds_the_chain_that_code_would():
  rw = jaxrw.from_config(
    ('loss', 'cap'),
    {
      'cap': {'fn': 'cap', 'limit': 1.2},
      'loss': {
        'fn': 'linupper',
        'temperature': {'init': float('inf'), 'end': 0.4, 'begin': 2, 'steps': 8},
        'start': 4,
      },
    },
  )
  schedule = jaxrw.temperature_schedule(float('inf'), 0.4, begin=2, steps=8)
  by_hand = jaxrw.chain(loss=jaxrw.after(4, jaxrw.linupper(schedule)), cap=jaxrw.cap(1.2))
  for step in (3, 4, 20):
    np.testing.assert_array_equal(_update(rw, step=step)[0], _update(by_hand, step=step)[0])
  np.testing.assert_array_equal(_update(rw, step=3)[0], np.ones(4))
  assert jnp.max(_update(rw, step=20)[0]) == jnp.float32(1.2)


def test_the_order_is_that_of_the_tuple():
  specs = {'a': {'fn': 'linupper', 'temperature': 0.2}, 'b': {'fn': 'cap', 'limit': 1.2}}
  assert jnp.max(_update(jaxrw.from_config(('a', 'b'), specs))[0]) == jnp.float32(1.2)
  assert jnp.max(_update(jaxrw.from_config(('b', 'a'), specs))[0]) > 1.25


def test_a_config_may_nest_a_stage():
  spec = {'fn': 'row_shuffled', 'stage': {'fn': 'linupper', 'temperature': 0.4}}
  rw = jaxrw.from_config(('loss',), {'loss': spec})
  w, _ = _update(rw, key=jax.random.key(0))
  np.testing.assert_allclose(np.sort(w), np.sort(jaxrw.linupper_weights(LOSSES, 0.4)), rtol=1e-6)


@pytest.mark.parametrize(
  ('order', 'specs', 'message'),
  [
    (('loss', 'loss'), {'loss': {'fn': 'uniform'}}, 'names a stage twice'),
    (('loss',), {}, r"names 'loss', but w\.loss is missing"),
    ((), {'cap': {'fn': 'cap', 'limit': 2.0}}, r'w\.cap is not in weighting=\(\)'),
    (('loss',), {'loss': {'fn': 'linuper'}}, r"w\.loss\.fn='linuper'.*did you mean 'linupper'"),
    (('loss',), {'loss': {'temperature': 1.0}}, r'w\.loss\.fn=None is not .* linupper,'),
    (('loss',), {'loss': {'fn': 'linupper_weights'}}, "did you mean 'linupper'"),
    (('loss',), {'loss': {'fn': 'linupper', 'temprature': 1.0}}, r'w\.loss: .*temprature'),
    (('loss',), {'loss': {'fn': 'linupper', 'temperature': -1}}, r'w\.loss: temperature=-1'),
    (('loss',), {'loss': {'fn': 'linupper', 'temperature': 'hot'}}, r"w\.loss: temperature='hot'"),
    (('loss',), {'loss': {'fn': 'linupper', 'temperature': {'init': 1}}}, r"w\.loss: .*'end'"),
    (('loss',), {'loss': {'fn': 'linupper', 'start': -5}}, r'w\.loss: start=-5'),
    (('loss',), {'loss': {'fn': 'linupper', 'start': 'soon'}}, r'w\.loss: '),
    (('cap',), {'cap': {'fn': 'cap'}}, r"w\.cap: .*'limit'"),
    (('loss',), {'loss': {'fn': 'row_shuffled'}}, r"w\.loss: .*'stage'"),
    (('loss',), {'loss': {'fn': 'row_shuffled', 'stage': 'upper'}}, r"w\.loss\.stage='upper'"),
    (
      ('policy', 'cap'),
      {'policy': {'fn': 'group_advantage', 'num_groups': 4}, 'cap': {'fn': 'cap', 'limit': 2.0}},
      r"w\.policy\.fn='group_advantage' gives signed weights.*put 'policy' last",
    ),
    (
      ('loss',),
      {'loss': {'fn': 'row_shuffled', 'stage': {'fn': 'linupper', 'r': 1}}},
      r"w\.loss\.stage: .*'r'",
    ),
  ],
)  # fmt: skip
def test_config_errors_name_the_field(order, specs, message):
  with pytest.raises(ValueError, match=message):
    jaxrw.from_config(order, specs)


def test_specs_are_not_changed():
  spec = {'fn': 'linupper', 'temperature': 0.4, 'start': 3}
  jaxrw.from_config(('loss',), {'loss': spec})
  assert spec == {'fn': 'linupper', 'temperature': 0.4, 'start': 3}


# Declarations


def test_declarations_say_what_the_stage_promises():
  assert jaxrw.linupper.declaration.provenance == 'paper'
  assert jaxrw.upper.declaration.provenance == 'official_code'
  assert jaxrw.row_shuffled.declaration.provenance == 'ours'
  assert jaxrw.cap.declaration.level == 'entry'


# check_range


def test_ids_on_the_host_are_checked_inside_jit_too():
  check = lambda *ids: jax.jit(
    lambda: core.check_range(np.array(ids), 3, 'group_ids') & jnp.ones((), bool)
  )
  assert check(0, 2, -1)().tolist() == [True, True, True]
  with pytest.raises(IndexError, match='group_ids holds 3, but there are 3 entries'):
    check(0, 3)()
