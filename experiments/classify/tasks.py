"""The tasks: what is drawn for a seed, what is measured, and how the models are trained.

Every seed has sets of its own: train, validation (which chooses the learning rate), test, and
`trusted`, a small clean set that only the arms marked `trusted` see. Sizes and counts are the same
in every seed, so that the sets of all seeds stack into one array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.classify import sources
from experiments.classify.sources import Examples, Source
from experiments.errors import UserError


class Problem(NamedTuple):
  """What one seed trains and is measured on.

  Attributes:
    clean: bool[n], whether a training label is the true one; for reports and tests only.
  """

  train: Examples
  validation: Examples
  test: Examples
  trusted: Examples
  clean: np.ndarray


class Task(NamedTuple):
  """One kind of trouble with data.

  Attributes:
    draw: (source, rng, settings) -> Problem.
    measure: (logits [n, C], examples, threshold) -> {metric: value}.
    metric: the one that the learning rate is chosen by, on the validation set.
    classes, groups: numbers of them.
    hidden: units of the one hidden layer; 0 is a linear model.
    decay: decoupled weight decay.
    steps: of training.
  """

  name: str
  draw: Callable[[Source, np.random.Generator], Problem]
  measure: Callable[[np.ndarray, Examples, float], dict[str, float]]
  metric: str
  classes: int
  groups: int = 1
  hidden: int = 64
  decay: float = 1e-4
  steps: int = 500
  batch: int = 64
  rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def problem(task: Task, source: Source, seed: int) -> Problem:
  """The sets of one seed, features standardized by the training set's mean and deviation."""
  drawn = task.draw(source, np.random.default_rng([seed, len(task.name)]))
  mean, sd = drawn.train.x.mean(0), drawn.train.x.std(0) + 1e-2
  scaled = lambda e: e._replace(x=(e.x - mean) / sd)
  return Problem(*map(scaled, drawn[:4]), drawn.clean)


# What is drawn ------------------------------------------------------------------------------------


def profile(most: int, ratio: float, classes: int) -> np.ndarray:
  """Examples of each class: `most`, falling exponentially to most / ratio."""
  return np.floor(most * ratio ** (-np.arange(classes) / (classes - 1)) + 1e-9).astype(int)


def draw_long_tail(
  source: Source, rng: np.random.Generator, *, most: int, ratio: float, held: int
) -> Problem:
  """Class c has most * ratio^(-c / (C - 1)) training examples; validation and test are balanced.

  Which of the source's classes comes first is drawn anew for every seed.
  """
  classes = int(source.pool.y.max()) + 1
  rank = rng.permutation(classes)  # of a class
  relabel = lambda e: e._replace(y=rank[e.y].astype(np.int32))
  pool = relabel(source.pool)
  counts = profile(most, ratio, classes)
  by_class = [rng.permutation(np.flatnonzero(pool.y == c)) for c in range(classes)]
  if min(map(len, by_class)) < most + 2 * held + held * (source.test is None):
    raise UserError(f'{source.name} has too few examples of a class for a long tail from {most}')
  cut = lambda a, b: pool.take(np.concatenate([rows[a:b] for rows in by_class]))
  train = pool.take(np.concatenate([rows[:n] for rows, n in zip(by_class, counts)]))
  validation, trusted = cut(most, most + held), cut(most + held, most + 2 * held)
  test = relabel(source.test) if source.test else cut(most + 2 * held, most + 5 * held)
  return Problem(train, validation, test, trusted, np.ones(len(train.y), bool))


def draw_noisy(
  source: Source, rng: np.random.Generator, *, size: int, held: int, trusted: int, noise: float
) -> Problem:
  """A share `noise` of the labels of train AND validation are replaced by another class, any of
  them alike; test and trusted are clean."""
  train, validation, trusted_set, test = split(source, rng, size, held, trusted)
  classes = int(source.pool.y.max()) + 1

  def spoil(e: Examples) -> tuple[Examples, np.ndarray]:
    wrong = rng.permutation(len(e.y)) < round(noise * len(e.y))
    moved = (e.y + rng.integers(1, classes, len(e.y))) % classes
    return e._replace(y=np.where(wrong, moved, e.y).astype(np.int32)), ~wrong

  train, clean = spoil(train)
  return Problem(train, spoil(validation)[0], test, trusted_set, clean)


def draw_birds(source: Source, rng: np.random.Generator, *, size: int, agree: float) -> Problem:
  """Class and place agree in a share of the training examples; elsewhere groups are equal."""
  del source  # drawn afresh
  major, minor = round(size * agree / 2), round(size * (1 - agree) / 2)
  train = sources.birds(rng, (major, minor, minor, major))
  validation, test, trusted = (sources.birds(rng, [n] * 4) for n in (50, 1000, 25))
  return Problem(train, validation, test, trusted, np.ones(len(train.y), bool))


def draw_plain(source: Source, rng: np.random.Generator, *, size: int, held: int) -> Problem:
  """All sets as they come."""
  train, validation, trusted, test = split(source, rng, size, held, held // 4)
  return Problem(train, validation, test, trusted, np.ones(len(train.y), bool))


def draw_few_labels(
  source: Source, rng: np.random.Generator, *, per_class: int, size: int, held: int
) -> Problem:
  """`per_class` labels of each class; the other training labels are -1."""
  train, validation, trusted, test = split(source, rng, size, held, held)
  classes = int(source.pool.y.max()) + 1
  shown = [np.flatnonzero(train.y == c)[:per_class] for c in range(classes)]
  shown = np.isin(np.arange(size), np.concatenate(shown))
  hidden = train._replace(y=np.where(shown, train.y, -1).astype(np.int32))
  return Problem(hidden, validation, test, trusted, shown)


def split(
  source: Source, rng: np.random.Generator, size: int, held: int, trusted: int
) -> tuple[Examples, ...]:
  """(train, validation, trusted, test), disjoint; the test set is the source's, or what is left."""
  ends = np.cumsum([size, held, trusted])
  order = rng.permutation(len(source.pool.y))
  if len(order) - ends[-1] < (1 if source.test is None else 0):
    raise UserError(f'{source.name} has {len(order)} examples; this task needs over {ends[-1]}')
  parts = [source.pool.take(rows) for rows in np.split(order, ends)]
  return (*parts[:3], source.test or parts[3])


# What is measured ---------------------------------------------------------------------------------


def accuracy(logits: np.ndarray, e: Examples, _: float) -> dict[str, float]:
  return {'accuracy': np.mean(logits.argmax(-1) == e.y)}


def by_class(logits: np.ndarray, e: Examples, _: float) -> dict[str, float]:
  """Mean accuracy of the classes, and of the third with the fewest training examples."""
  right = logits.argmax(-1) == e.y
  recalls = [np.mean(right[e.y == c]) for c in range(logits.shape[-1])]
  return {
    'balanced accuracy': np.mean(recalls),
    'tail accuracy': np.mean(recalls[-(len(recalls) // 3) :]),
  }


def by_group(
  logits: np.ndarray, e: Examples, _: float, *, shares: tuple[float, ...] | None = None
) -> dict[str, float]:
  """Accuracy (of groups in the given shares, if any), of the worst group, and equity-scaled:
  accuracy / (1 + sum over groups of |accuracy of the group - accuracy|)."""
  right = logits.argmax(-1) == e.y
  groups = np.array([np.mean(right[e.group == g]) for g in range(4)])
  mean = np.mean(right) if shares is None else groups @ np.array(shares)
  return {
    'worst group': groups.min(),
    'accuracy': mean,
    'equity-scaled': mean / (1 + np.abs(groups - mean).sum()),
  }


def rare(logits: np.ndarray, e: Examples, threshold: float) -> dict[str, float]:
  """Average precision; recall and F1 at even odds; F1 at the threshold of the validation set."""
  score = logits[:, 1] - logits[:, 0]
  precision, recall = precision_recall(score, e.y)
  at = lambda limit: f1((score > limit).astype(int), e.y)
  return {
    'average precision': np.sum(precision * np.diff(recall, prepend=0)),
    'recall': np.mean(score[e.y == 1] > 0),
    'F1': at(0.0),
    'F1, tuned threshold': at(threshold),
  }


def precision_recall(score: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Precision and recall of the k highest scores, for k = 1 .. n."""
  hits = np.cumsum(y[np.argsort(-score, kind='stable')])
  return hits / np.arange(1, len(y) + 1), hits / max(1, hits[-1])


def f1(predicted: np.ndarray, y: np.ndarray) -> float:
  return float(2 * np.sum(predicted * y) / max(1, np.sum(predicted) + np.sum(y)))


def best_threshold(logits: np.ndarray, e: Examples) -> float:
  """The difference of logits above which F1 is largest on these examples."""
  score = logits[:, 1] - logits[:, 0]
  precision, recall = precision_recall(score, e.y)
  best = np.argmax(precision * recall / np.maximum(precision + recall, 1e-12))
  ordered = np.append(-np.sort(-score), -np.inf)
  return float(ordered[best] / 2 + ordered[best + 1] / 2) if best + 1 < len(score) else -np.inf


# The list -----------------------------------------------------------------------------------------

Opened = dict[str, tuple[Task, Callable[[], Source]]]  # by name: the task, and how to read its data


def offline() -> Opened:
  """Tasks that need no files: digits and generated data."""
  part = functools.partial
  digits = functools.cache(sources.digits)
  drawn = lambda name, draw, size: part(sources.generated, name, draw, size)
  return _by_name(
    (long_tail(most=90, ratio=30, held=15), digits),
    (noisy_labels(size=800, held=250, trusted=100), digits),
    (
      Task(
        'worst_group',
        part(draw_birds, size=1200, agree=0.95),
        part(by_group, shares=(0.475, 0.025, 0.025, 0.475)),
        'worst group',
        classes=2,
        groups=4,
        decay=1.0,
      ),
      lambda: Source('generated', sources.examples(np.zeros((1, 1)), [0])),
    ),
    (fairness(size=3000, held=2000), drawn('incomes', sources.incomes, 20_000)),
    (few_labels(size=1000, held=250), digits),
    (rare_events(size=4000, held=4000, levels=4), drawn('funnel', sources.funnel, 40_000)),
  )


def of_images(source: Callable[[], Source]) -> Opened:
  """Tasks on thousands of images."""
  source = functools.cache(source)
  return _by_name(
    (long_tail(most=1000, ratio=100, held=50)._replace(steps=1000), source),
    (noisy_labels(size=5000, held=1000, trusted=300)._replace(steps=1000), source),
    (few_labels(size=5000, held=500), source),
  )


def of_tables(folder: Path) -> Opened:
  """Tasks on Adult and on wines."""
  return _by_name(
    (fairness(size=4000, held=4000), lambda: sources.adult(folder)),
    (rare_events(size=3500, held=1200, levels=6), lambda: sources.wine(folder)),
  )


def _by_name(*pairs: tuple[Task, Callable[[], Source]]) -> Opened:
  return {pair[0].name: pair for pair in pairs}


def long_tail(**sizes: Any) -> Task:
  draw, rates = functools.partial(draw_long_tail, **sizes), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
  return Task('long_tail', draw, by_class, 'balanced accuracy', classes=10, rates=rates)


def noisy_labels(**sizes: Any) -> Task:
  draw = functools.partial(draw_noisy, noise=0.4, **sizes)
  return Task('noisy_labels', draw, accuracy, 'accuracy', classes=10)


def fairness(**sizes: Any) -> Task:
  draw = functools.partial(draw_plain, **sizes)
  return Task('fairness', draw, by_group, 'worst group', classes=2, groups=4, hidden=32)


def few_labels(**sizes: Any) -> Task:
  draw = functools.partial(draw_few_labels, per_class=4, **sizes)
  rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
  return Task('semi_supervised', draw, accuracy, 'accuracy', classes=10, batch=192, rates=rates)


def rare_events(levels: int, **sizes: Any) -> Task:
  """`group` is the level, of which the last is the event."""
  draw = functools.partial(draw_plain, **sizes)
  return Task(
    'rare_events', draw, rare, 'average precision', classes=2, groups=levels, hidden=0, steps=1000,
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
  )  # fmt: skip
