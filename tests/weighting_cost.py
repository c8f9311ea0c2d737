"""What each weighting costs on 8 devices next to a step of a 10M-parameter model: exact counts.

  python -m tests.weighting_cost > docs/weighting_cost.md

Each weighting of the contract tests, at its settings there, is compiled alone for 8 simulated
devices and counted from the compiled program, loop bodies times their trip counts.
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled
from experiments.verdict import format_table
from jaxrw import testing
from tests import test_contract

ROWS, TOKENS, WIDTH = 1024, 128, 2240


class Cost(NamedTuple):
  """Of one weighting, on one of the devices."""

  name: str
  stateless: bool
  operations: int
  bytes: int
  collectives: int
  collective_bytes: int


def mesh() -> tuple[NamedSharding, NamedSharding]:
  """(rows over all devices, everywhere)."""
  devices = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  return NamedSharding(devices, PartitionSpec('data')), NamedSharding(devices, PartitionSpec())


def cases() -> list[str]:
  """Those without a table by example id, whose layout is the user's."""
  return [name for name in test_contract.CASES if not test_contract.claims(name).get('table')]


def count(name: str) -> Cost:
  """The costs of a case of the contract tests."""
  claims = test_contract.claims(name)
  rw = test_contract.CASES[name]
  fields = {key: claims[key] for key in ('level', 'extra_signals', 'terms') if key in claims}
  subject = testing.Subject(rw, **fields)
  rows, everywhere = mesh()
  terms = fields.get('terms', TOKENS)
  shape = (ROWS, terms) if fields.get('level') == 'token' else (ROWS,)
  losses = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(rw.init)
  )
  ids = np.arange(ROWS)

  def update(losses, base, weights, state):
    return subject.apply(losses, base, weights, rows=ids, state=state, jit=False)

  def signals_alone(losses, base):  # which the contract makes from the losses: not to be counted
    given = {
      'losses': losses,
      'base': base,
      'group_ids': jnp.asarray(ids % 3, jnp.int32),
      'example_ids': jnp.asarray(ids, jnp.int32),
      'step': jnp.asarray(7, jnp.int32),
      'key': jax.random.key(3),
    }
    return {k: v for k, v in subject.extra_signals(given).items() if k != 'key'}

  out = jax.eval_shape(update, losses, losses, losses, state)
  places = (rows, jax.tree.map(lambda _: everywhere, out[1]))
  whole = jax.jit(update, out_shardings=places).lower(losses, losses, losses, state).compile()
  made = jax.jit(signals_alone).lower(losses, losses).compile()
  done, extra = compiled.work(whole), compiled.work(made)
  found = compiled.costs(whole).collectives
  return Cost(
    name,
    not jax.tree.leaves(state),
    max(0, done.operations - extra.operations),
    max(0, done.bytes - extra.bytes),
    sum(c.count for c in found),
    sum(c.count * c.bytes for c in found),
  )


def step(examples: int) -> Cost:
  """Those of the step with uniform weights on so many examples."""
  rows, everywhere = mesh()

  def loss(params, example):
    x = example['x']
    for layer in ('a', 'b'):
      x = jax.nn.relu(x @ params[layer])
    return optax.losses.squared_error(x @ params['c'], example['y'])[0]

  shapes = {'a': (WIDTH // 2, WIDTH), 'b': (WIDTH, 3 * WIDTH // 2), 'c': (3 * WIDTH // 2, 1)}
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
    for name, shape in shapes.items()
  }
  tx, rw = optax.adam(1e-3), jaxrw.uniform()
  state = jax.eval_shape(lambda p: jaxrw.TrainState.create(p, tx, rw), params)
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
  batch = {
    'x': jax.ShapeDtypeStruct((examples, WIDTH // 2), jnp.float32, sharding=rows),
    'y': jax.ShapeDtypeStruct((examples, 1), jnp.float32, sharding=rows),
  }
  program = jax.jit(jaxrw.make_train_step(loss, tx, rw)).lower(state, batch).compile()
  done, found = compiled.work(program), compiled.costs(program).collectives
  return Cost(
    f'step of {examples:,}',
    True,
    done.operations,
    done.bytes,
    sum(c.count for c in found),
    sum(c.count * c.bytes for c in found),
  )


def table(costs: list[Cost], whole: Cost) -> str:
  """Aligned, with the shares of the step."""
  header = ('weighting', 'operations', 'of step', 'bytes', 'of step', 'collectives', 'their bytes')
  share = lambda part, of: f'{100 * part / of:.4f}%'
  rows = [
    (
      c.name if c.stateless else f'{c.name} (state)',
      f'{c.operations:,}',
      share(c.operations, whole.operations),
      f'{c.bytes:,}',
      share(c.bytes, whole.bytes),
      f'{c.collectives}',
      f'{c.collective_bytes:,}',
    )
    for c in [*costs, whole]
  ]
  return format_table(header, rows, width=120)


PAGE = """# What a weighting costs

Counted by `python -m tests.weighting_cost` in programs compiled for 8 simulated CPU devices; all
numbers are those of one device. An operation is a multiplication, an addition, a logarithm, ... of
one element; bytes are read or written by instructions that are not fused into others.

## Weightings of examples: {rows:,} examples, one loss for each

The step is that of a network of three layers and {parameters:,} parameters, Adam, on the same
examples with one token each. That is the hardest case: a model of sequences computes as much
again for every further token, and its example weights cost no more.

```
{examples}
```

## Weightings of tokens and terms: {rows:,} sequences of {tokens} tokens

```
{entries}
```
"""


def main() -> None:
  costs = {name: count(name) for name in cases()}
  small = [c for name, c in costs.items() if test_contract.claims(name).get('level') != 'token']
  page = PAGE.format(
    rows=ROWS,
    tokens=TOKENS,
    parameters=WIDTH**2 // 2 + 3 * WIDTH**2 // 2 + 3 * WIDTH // 2,
    examples=table(small, step(ROWS)),
    entries=table([c for c in costs.values() if c not in small], step(ROWS * TOKENS)),
  )
  print(page, end='')


if __name__ == '__main__':
  main()
