"""SHA-256 of many short strings at once, modulo a number: the hashes of n-grams, several times
faster than one call for each.

FIPS 180-4, for messages of one block (at most 55 bytes). The constants are the fractional parts of
roots of the first primes.
"""

from __future__ import annotations

import functools
from math import isqrt

import jax
import jax.numpy as jnp
import numpy as np

LONGEST = 55  # bytes
_USUAL = 24  # bytes, less than which most n-grams have: a third of the work for them
_BLOCK = 2048  # messages of one call


def buckets(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
  """int(sha256(parts joined by blanks), 16) mod size, for N messages of n parts each.

  Args:
    data: uint8[D], the bytes that the parts are slices of.
    starts, ends: int[n, N]; a message must have at most 55 bytes, blanks included.
    size: in [1, 65536].

  Returns:
    int64[N].
  """
  room = max(1 << 19, 1 << len(data).bit_length())
  padded = np.zeros(room, np.uint8)
  padded[: len(data)] = data
  found = np.empty(starts.shape[1], np.int64)
  length = (ends - starts).sum(axis=0) + len(starts) - 1
  for least, most in ((0, _USUAL), (_USUAL, 64)):
    rows = np.flatnonzero((length >= least) & (length < most))
    out = []
    for first in range(0, len(rows), _BLOCK):
      cut = [a[:, rows[first : first + _BLOCK]].astype(np.int32) for a in (starts, ends)]
      short = ((0, 0), (0, _BLOCK - cut[0].shape[1]))
      out.append(_hashed(padded, *(np.pad(a, short) for a in cut), size, most))
    if out:  # computed on their own time
      found[rows] = np.concatenate([np.asarray(x) for x in out])[: len(rows)]
  return found


@functools.partial(jax.jit, static_argnums=(3, 4))
def _hashed(
  data: jax.Array, starts: jax.Array, ends: jax.Array, size: int, width: int
) -> jax.Array:
  column = jnp.arange(width, dtype=jnp.int32)[:, None]
  at = jnp.zeros(starts.shape[1], jnp.int32)
  message = jnp.zeros((width, starts.shape[1]), jnp.uint32)
  for part in range(len(starts)):
    if part:
      message = jnp.where(column == at, ord(' '), message)
      at += 1
    start, length = starts[part], ends[part] - starts[part]
    inside = (column >= at) & (column < at + length)
    byte = data.at[start + column - at].get(mode='clip').astype(jnp.uint32)
    message = jnp.where(inside, byte, message)
    at += length
  message = jnp.where(column == at, 0x80, message)
  b = message.reshape(width // 4, 4, -1)
  words = b[:, 0] << 24 | b[:, 1] << 16 | b[:, 2] << 8 | b[:, 3]
  words = jnp.pad(words, ((0, 16 - width // 4), (0, 0)))
  words = words.at[15].set(8 * at.astype(jnp.uint32))
  rest = jnp.zeros(words.shape[1], jnp.uint32)
  for word in _compressed(words):
    for digit in (word >> 16, word & 0xFFFF):
      rest = ((rest << 16) + digit) % size
  return rest


def _compressed(words: jax.Array) -> list[jax.Array]:
  """The eight words of the digest of a block uint32[16, N]."""

  def step(carry, constant):
    (a, b, c, d, e, f, g, h), w = carry
    one = h + (_turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)) + ((e & f) ^ (~e & g))
    one += constant + w[0]
    two = (_turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))
    x, y = w[1], w[14]
    new = w[0] + (_turned(x, 7) ^ _turned(x, 18) ^ (x >> 3))
    new += w[9] + (_turned(y, 17) ^ _turned(y, 19) ^ (y >> 10))
    return ((one + two, a, b, c, d + one, e, f, g), (*w[1:], new)), None

  primes = [n for n in range(2, 312) if all(n % k for k in range(2, isqrt(n) + 1))]
  roots = jnp.array([_cube_root(p << 96) & 0xFFFFFFFF for p in primes], jnp.uint32)
  start = [isqrt(p << 64) & 0xFFFFFFFF for p in primes[:8]]
  state = tuple(jnp.full_like(words[0], s) for s in start)
  # Fewer rounds in a loop's body compile faster and leave more in memory between them.
  (state, _), _ = jax.lax.scan(step, (state, tuple(words)), roots, unroll=8)
  return [x + jnp.uint32(s) for x, s in zip(state, start)]


def _turned(x: jax.Array, n: int) -> jax.Array:
  return (x >> n) | (x << (32 - n))


def _cube_root(n: int) -> int:
  """The largest integer whose cube is at most n."""
  low, high = 0, 1 << (n.bit_length() // 3 + 1)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if middle**3 <= n else (low, middle)
  return low
