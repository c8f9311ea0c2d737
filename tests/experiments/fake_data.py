"""Small corpora on disk and data configurations for tests."""

import gzip
import json
import random
import types


def data_config(**overrides):
  """What `configs.common.base_config().data` holds, as a plain namespace."""
  values = dict(
    source='folder',
    path='',
    name='',
    tfds_dir='',
    text_key='text',
    domain_key='domain',
    weight_key='weight',
    domains=(),
    mixture='uniform',
    tokenizer='byte',
    seq_len=16,
    root='',
    max_bytes_per_domain=0,
    prefetch=2,
  )
  assert not set(overrides) - set(values)
  return types.SimpleNamespace(**{**values, **overrides})


def words(seed, n):
  """Deterministic text with some structure and a few characters of several bytes."""
  rng = random.Random(seed)
  return ' '.join(
    rng.choice(['the', 'model', 'läuft', 'x=1;', '数据', 'loss', 'of']) for _ in range(n)
  )


def write_jsonl(path, records):
  """Writes records as JSON lines, compressed if the name says so."""
  data = ''.join(json.dumps(record) + '\n' for record in records).encode()
  if path.name.endswith('.gz'):
    data = gzip.compress(data)
  elif path.name.endswith('.zst'):
    import zstandard

    data = zstandard.ZstdCompressor().compress(data)
  path.write_bytes(data)


def write_corpus(root, domains=('alpha', 'beta', 'gamma'), documents=12):
  """A folder with a train and a validation file for each domain; later domains are larger."""
  root.mkdir(parents=True, exist_ok=True)
  for i, domain in enumerate(domains):
    for split, n in (('train', documents), ('validation', 3)):
      records = [
        {'id': f'{split}-{j}', 'text': words(f'{domain}{split}{j}', 5 + 7 * (i + 1) + j)}
        for j in range(n)
      ]
      write_jsonl(root / f'{domain}.{split}.jsonl.gz', records)
  return root
