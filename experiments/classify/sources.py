"""Where examples come from: files as published, a prepared TFDS data set, scikit-learn's digits, or
a random generator.

A source is read once; a task draws its own sets from it for every seed. Images become vectors of at
most 256 averages over squares of pixels, so that a small perceptron trains on a CPU in seconds.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import UserError

IMAGE_SETS = ('fashion_mnist', 'mnist', 'cifar10')
MOST_FEATURES = 256


class Examples(NamedTuple):
  """n examples; `group` is 0 where a task has no groups."""

  x: np.ndarray  # float32[n, d]
  y: np.ndarray  # int32[n]
  group: np.ndarray  # int32[n]

  def take(self, rows: np.ndarray) -> Examples:
    return Examples(*(a[rows] for a in self))


class Source(NamedTuple):
  """`pool` to draw from; `test` where the publisher has set one apart, else None."""

  name: str
  pool: Examples
  test: Examples | None = None


def examples(x: Any, y: Any, group: Any = None) -> Examples:
  y = np.asarray(y, np.int32)
  group = np.zeros_like(y) if group is None else np.asarray(group, np.int32)
  return Examples(np.asarray(x, np.float32), y, group)


# Images -------------------------------------------------------------------------------------------


def digits() -> Source:
  """1,797 images of 8 x 8 pixels that come with scikit-learn."""
  try:
    from sklearn.datasets import load_digits
  except ImportError as e:
    raise UserError('this experiment needs scikit-learn: pip install scikit-learn') from e
  x, y = load_digits(return_X_y=True)
  return Source('digits', examples(x / 16, y))


def images(folder: Path, name: str) -> Source:
  """Fashion-MNIST or MNIST from idx files, CIFAR-10 from two npz of JPEG streams."""
  folder = Path(folder, 'images', name)
  if name == 'cifar10':
    parts = [read_jpegs(folder / f'cifar10_jpeg75_{part}.npz') for part in ('train', 'test')]
  else:
    parts = [
      (read_idx(folder / f'{part}-images-idx3-ubyte.gz'),
       read_idx(folder / f'{part}-labels-idx1-ubyte.gz'))
      for part in ('train', 't10k')
    ]  # fmt: skip
  return Source(name, *(examples(pooled(x), y) for x, y in parts))


def tfds_images(name: str, data_dir: str | None = None) -> Source:
  """A TFDS data set with the features `image` and `label` and the splits train and test.

  One that is not prepared yet is downloaded first.
  """
  import tensorflow_datasets as tfds

  try:
    parts = tfds.data_source(name, split=['train', 'test'], data_dir=data_dir or None)
  except Exception as e:  # unknown name, no network, no such split: TFDS raises many kinds
    first = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise UserError(
      f"--tfds='{name}' cannot be read ({first}); name an image set with the splits train and test "
      "that is prepared with file_format='array_record', or that TFDS can download"
    ) from e
  if missing := {'image', 'label'} - set(parts[0][0]):
    raise UserError(
      f"--tfds='{name}' has no feature {sorted(missing)[0]!r}: name a data set of labeled images"
    )
  return Source(name, *(_stacked(part) for part in parts))


def _stacked(part: Iterable[dict[str, Any]]) -> Examples:
  records = list(part)
  return examples(pooled(np.stack([r['image'] for r in records])), [r['label'] for r in records])


def read_idx(path: Path) -> np.ndarray:
  """uint8 array of an idx .gz file: 2 zero bytes, type 8, rank, then sizes as big-endian int32."""
  with _opened(path) as f:
    content = gzip.decompress(f.read())
  if content[:3] != b'\0\0\x08':
    raise UserError(f'{path} is not an idx file of bytes; copy it again')
  rank = content[3]
  shape = np.frombuffer(content, '>i4', rank, 4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_jpegs(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """(images uint8[n, h, w, c], labels) of an npz: image i is jpeg[offsets[i] : offsets[i + 1]]."""
  try:
    from PIL import Image
  except ImportError as e:
    raise UserError('CIFAR-10 needs Pillow: pip install pillow') from e
  with _opened(path) as f, np.load(f, allow_pickle=False) as arrays:
    stream, ends, labels = (arrays[key] for key in ('jpeg', 'offsets', 'label'))
  stream = stream.tobytes()
  decode = lambda a, b: np.asarray(Image.open(io.BytesIO(stream[a:b])))
  return np.stack([decode(a, b) for a, b in itertools.pairwise(ends)]), labels


def pooled(x: np.ndarray) -> np.ndarray:
  """Images [n, h, w] or [n, h, w, c] of bytes as float32[n, d] in [0, 1], d at most 256 if squares
  of pixels can do that."""
  x = x.reshape(*x.shape[:3], -1)
  n, height, width, channels = x.shape
  fits = lambda k: height % k == width % k == 0
  small = lambda k: height * width * channels <= MOST_FEATURES * k * k
  k = next((k for k in range(1, height + 1) if fits(k) and small(k)), 1)
  squares = x.reshape(n, height // k, k, width // k, k, channels)
  return (squares.mean((2, 4), dtype=np.float32) / 255).reshape(n, -1)


# Tables -------------------------------------------------------------------------------------------


def adult(folder: Path) -> Source:
  """Adult census income: y = 1 above 50K; group = 2 y + (1 for women)."""
  parts = [read_csv(Path(folder, 'tabular', f'adult.{part}.csv.gz')) for part in ('train', 'test')]
  rows = [row for part in parts for row in part]
  columns = [c for c in rows[0] if c not in ('income', 'fnlwgt')]
  x = np.concatenate([_column([row[c] for row in rows]) for c in columns], axis=1)
  y = np.array([row['income'].startswith('>') for row in rows], np.int32)
  woman = np.array([row['sex'] == 'Female' for row in rows])
  both, cut = examples(x, y, 2 * y + woman), len(parts[0])
  return Source('adult', both.take(np.arange(cut)), both.take(np.arange(cut, len(rows))))


def wine(folder: Path) -> Source:
  """Wines, red and white; y = 1 for a quality of 8 or 9, 3% of them; group = quality from 3 on."""
  rows = read_csv(Path(folder, 'tabular', 'wine_quality.csv.gz'))
  x = np.concatenate([_column([r[c] for r in rows]) for c in rows[0] if c != 'quality'], axis=1)
  level = np.minimum([int(row['quality']) for row in rows], 8) - 3
  return Source('wine_quality', examples(x, level == 5, level))


def read_csv(path: Path) -> list[dict[str, str]]:
  """The rows of a .csv.gz with a header line."""
  with _opened(path) as f:
    text = gzip.decompress(f.read()).decode()
  return list(csv.DictReader(io.StringIO(text)))


def _column(values: list[str]) -> np.ndarray:
  """Numbers as one column; words as one of 0 and 1 for each word."""
  try:
    return np.array(values, np.float32)[:, None]
  except ValueError:
    words = np.unique(values)
    return (np.array(values)[:, None] == words).astype(np.float32)


def _opened(path: Path):
  try:
    return Path(path).open('rb')
  except OSError as e:
    raise UserError(
      f'cannot read {path} ({e.strerror}): --data names a folder with images/ and tabular/ in it; '
      'leave it out for data that need no files'
    ) from e


# Generated ----------------------------------------------------------------------------------------


def generated(name: str, draw: Callable[[np.random.Generator, int], Examples], size: int) -> Source:
  """A source of `size` examples, the same in every program."""
  return Source(name, draw(np.random.default_rng(7), size))


def birds(rng: np.random.Generator, counts: Iterable[int]) -> Examples:
  """Two classes and a spurious feature, in the manner of waterbirds.

  Feature 0 says the class, with much noise; feature 1 says the place, with little; 40 more are
  noise, by which a model may remember single examples. group = 2 class + place; class and place
  agree in groups 0 and 3.

  Args:
    counts: examples of each of the four groups.
  """
  group = np.repeat(np.arange(4), tuple(counts))
  y, place = group // 2, group % 2
  noise = rng.normal(size=(group.size, 42))
  noise[:, 0] += 1.5 * (2 * y - 1)
  noise[:, 1] = 2 * (2 * place - 1) + 0.5 * noise[:, 1]
  return examples(noise, y, group)


def incomes(rng: np.random.Generator, size: int) -> Examples:
  """A table in the manner of Adult: a third are women, of whom 11% have the high income, and 30% of
  the men; what predicts it says less about women, and a proxy of sex is among the features."""
  woman = (rng.random(size) < 0.33).astype(int)
  y = (rng.random(size) < np.where(woman, 0.11, 0.30)).astype(int)
  strength = np.where(woman, 0.5, 1.0)[:, None] * np.array([1.0, 0.8, 0.6, 0.4, 0.3])
  x = rng.normal(size=(size, 12))
  x[:, :5] += strength * (2 * y - 1)[:, None]
  x[:, 5] = 1.5 * (2 * woman - 1) + 0.5 * x[:, 5]
  return examples(x, y, 2 * y + woman)


def funnel(rng: np.random.Generator, size: int) -> Examples:
  """Four ordered stages, in `group`; y = 1 in the last, which about 1% reach.

  P(stage <= k) = sigmoid(a_k + x b_k), where neighboring stages share most of their coefficients:
  the simulations of PRESTO with all coefficients doubled.
  """
  steps = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], (3, 10), p=[1 / 6, 2 / 3, 1 / 6])
  slopes = np.cumsum(np.concatenate([np.ones((1, 10)), steps[1:]]), axis=0)
  x = rng.uniform(-1, 1, (size, 10))
  lines = np.array([0.0, 4.0, 7.0]) + x @ slopes.T
  below = np.maximum.accumulate(1 / (1 + np.exp(-lines)), axis=1)  # lines may cross
  stage = np.sum(rng.random((size, 1)) > below, axis=1)
  return examples(x, stage == 3, stage)
