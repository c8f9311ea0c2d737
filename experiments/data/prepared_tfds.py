"""Reads datasets that TFDS has prepared, by name, without TensorFlow or the builder's code."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data import text_files
from experiments.errors import UserError

_CHUNK = 256  # records read at a time


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
  """The text of a prepared dataset, by domain."""

  builder: Any
  text_key: str
  domain_key: str | None  # None: the dataset is one domain
  weight_key: str | None

  @property
  def label(self) -> str:
    return self.builder.name

  @property
  def splits(self) -> tuple[str, ...]:
    return tuple(self.builder.info.splits)

  @functools.cached_property
  def domains(self) -> tuple[str, ...]:
    """Names in sorted order."""
    if self.domain_key is None:
      return (self.builder.name,)
    return tuple(sorted({domain for split in self.splits for domain in self._index[split]}))

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of every file of the dataset, with its name."""
    digest = hashlib.sha256()
    for path in sorted(self.builder.data_path.iterdir()):
      if path.is_file():
        digest.update(f'{path.name} {text_files.digest(path)}\n'.encode())
    return digest.hexdigest()

  def records(self, domain: str, split: str) -> Iterator[tuple[str, str, Any]]:
    """The (id, text, weight) triples of a domain."""
    if self.domain_key is None:
      numbers: Any = range(self.builder.info.splits[split].num_examples)
    else:
      numbers = self._index[split].get(domain, ())
    for number, record in self._read(split, numbers):
      where = f'{self.builder.data_path}, {split} record {number}'
      name = _text(record['id'], where) if 'id' in record else f'{split}-{number}'
      text = _text(record[self.text_key], f"{where}, feature '{self.text_key}'")
      yield name, text, self._weight(record, where)

  @functools.cached_property
  def _index(self) -> dict[str, dict[str, list[int]]]:
    """Record numbers by split and domain, from one pass over the dataset."""
    index: dict[str, dict[str, list[int]]] = {}
    feature = self.builder.info.features[self.domain_key]
    for split in self.splits:
      found = index.setdefault(split, {})
      for number, record in self._read(split, range(self.builder.info.splits[split].num_examples)):
        value = record[self.domain_key]
        name = feature.int2str(value) if hasattr(feature, 'int2str') else _text(value, split)
        found.setdefault(name, []).append(number)
    return index

  def _read(self, split: str, numbers: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
      source = self.builder.as_data_source(split=split)
      for start in range(0, len(numbers), _CHUNK):
        chunk = list(numbers[start : start + _CHUNK])
        yield from zip(chunk, source.__getitems__(chunk))
    except NotImplementedError as error:
      raise UserError(
        f"data.name='{self.builder.name}' is not stored as array_record; prepare it again with "
        "file_format='array_record'"
      ) from error
    except UserError:
      raise
    except Exception as error:  # for bad bytes, TFDS raises anything
      reason = next(iter(str(error).splitlines()), type(error).__name__)
      raise UserError(
        f'{self.builder.data_path} cannot be read ({reason}); prepare the dataset again'
      ) from error

  def _weight(self, record: dict[str, Any], where: str) -> float | np.ndarray | None:
    if self.weight_key is None:
      return None
    weight = np.asarray(record[self.weight_key], np.float32)
    if not np.all(np.isfinite(weight)) or np.any(weight < 0):
      raise UserError(f'{where}: weight {weight} must be finite and not negative; fix or drop it')
    return weight if weight.ndim else float(weight)


def open_dataset(data_config: Any) -> PreparedDataset:
  """Finds the dataset `data_config.name`: 'name', 'name/config' or 'name:1.0.0'.

  Raises:
    UserError: if it is not there, lacks the text feature, or its weight feature is not floating.
  """
  builder = _builder(data_config)
  features = builder.info.features
  if data_config.text_key not in features:
    raise UserError(
      f"data.text_key='{data_config.text_key}' is not a feature of '{data_config.name}'; "
      f'set it to one of: {", ".join(sorted(features))}'
    )
  if 'train' not in builder.info.splits:
    raise UserError(
      f"data.name='{data_config.name}' has no train split, only {list(builder.info.splits)}; "
      'prepare one'
    )
  return PreparedDataset(
    builder,
    data_config.text_key,
    data_config.domain_key if data_config.domain_key in features else None,
    _weight_key(features, data_config),
  )


def _builder(data_config: Any) -> Any:
  from tensorflow_datasets.core import read_only_builder

  if not data_config.name:
    raise UserError("data.name='' with data.source='tfds'; give the name of a prepared dataset")
  directory = data_config.tfds_dir or None
  try:
    return read_only_builder.builder_from_files(data_config.name, data_dir=directory)
  except ValueError as error:  # DatasetNotFoundError, or a name that does not parse
    raise UserError(
      f"data.name='{data_config.name}' is not a prepared dataset in "
      f"{directory or 'the default TFDS folder'}; prepare it with file_format='array_record' "
      '(a few need tensorflow-cpu to prepare, none to read) or set data.tfds_dir'
    ) from error


def _weight_key(features: Any, data_config: Any) -> str | None:
  key = data_config.weight_key
  if key not in features:
    return None
  dtype, shape = features[key].np_dtype, features[key].shape
  if not _is_floating(dtype) or len(shape) > 1:
    raise UserError(
      f"data.weight_key='{key}': feature {features[key]} must be float32, one number or one per "
      'token; convert it, or set data.weight_key to another feature or to none'
    )
  return key


def _is_floating(dtype: Any) -> bool:
  try:
    return np.issubdtype(np.dtype(dtype), np.floating) or 'bfloat16' in str(dtype)
  except TypeError:
    return False


def _text(value: Any, where: str) -> str:
  if not isinstance(value, (bytes, str)):
    raise UserError(f'{where}: {type(value).__name__} is not text; name a Text feature')
  try:
    return value if isinstance(value, str) else value.decode('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'{where}: not UTF-8 at byte {error.start}; convert the dataset') from error
