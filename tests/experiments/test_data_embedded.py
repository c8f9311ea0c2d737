"""The embedded corpus is there in every installation, deterministic, and never needs TensorFlow."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from experiments.data import embedded
from experiments.data.corpus import open_corpus
from experiments.data.readers import open_source
from tests.experiments.fake_data import data_config


def test_domains_are_many_and_large_enough():
  sizes = {d: sum(len(text) for _, text in embedded.works(d)) for d in embedded.DOMAINS}
  large = [domain for domain, size in sizes.items() if size >= 500_000]
  assert len(large) >= 4, sizes
  for domain in embedded.DOMAINS:
    assert sum(len(text.encode()) for _, text in embedded.works(domain)) <= embedded.MAX_BYTES


def test_order_and_fingerprint_are_deterministic():
  config = data_config(source='embedded')
  one, two = open_source(config), open_source(config)
  assert one.fingerprint == two.fingerprint
  assert list(one.documents('docs', 'train')) == list(two.documents('docs', 'train'))
  assert open_source(data_config(source='embedded', domains=('docs',))).domains == ('docs',)


def test_train_and_validation_share_no_work():
  source = open_source(data_config(source='embedded'))
  for domain in source.domains:
    train = list(source.documents(domain, 'train'))
    validation = list(source.documents(domain, 'validation'))
    assert not {d.parent for d in train} & {d.parent for d in validation}
    share = sum(len(d.text) for d in validation) / sum(len(d.text) for d in train)
    assert 0.02 < share < 0.15, domain


def test_nothing_of_this_repository_is_in_it():
  texts = ''.join(text for domain in embedded.DOMAINS for _, text in embedded.works(domain))
  assert 'jaxrw' not in texts


def test_installations_without_test_sources_use_those_of_numpy(monkeypatch, tmp_path):
  (tmp_path / 'encodings').mkdir()
  monkeypatch.setattr(embedded, '_stdlib', lambda: tmp_path)
  assert embedded.works('code') == []  # too little: left out
  assert all(name.startswith('numpy/') for name, _ in embedded.works('tests'))
  assert sum(len(text) for _, text in embedded.works('tests')) > 500_000
  assert embedded.works('tables')  # the names of the characters are always there


def test_preparing_and_reading_never_import_tensorflow(tmp_path):
  """Not even where it is installed: a stand-in that cannot be imported takes its place."""
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow/__init__.py').write_text('raise RuntimeError("tensorflow was imported")')
  code = f"""
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    from tests.experiments.fake_data import data_config
    from experiments.data import corpus, mixture, pipeline
    config = data_config(
      source='embedded', root={str(tmp_path / 'p')!r}, seq_len=64, max_bytes_per_domain=20_000
    )
    opened = corpus.open_corpus(config)
    shares = mixture.proportions(config, opened)
    batches = pipeline.train_iterator(opened, batch_size=4, seed=0, proportions=shares)
    print(next(batches)['tokens'].shape, 'tensorflow' in sys.modules)
  """
  result = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=False
  )
  assert result.stdout.strip() == '(4, 65) False', result.stderr


def test_small_embedded_corpus(tmp_path):
  config = data_config(
    source='embedded', root=str(tmp_path), seq_len=128, max_bytes_per_domain=40_000
  )
  corpus = open_corpus(config)
  assert len(corpus.domains) >= 4
  assert np.all(corpus.sizes('train') >= 40_000 // 128)
  assert all(2 < floor < 7 for floor in corpus.meta['bigram_floor'].values())
  described = corpus.describe(corpus.example_id(corpus.domains.index('code'), 3))
  assert described['domain'] == 'code'
  assert described['doc'].startswith('python/')


@pytest.mark.slow
def test_whole_embedded_corpus_prepares_in_seconds(tmp_path):
  import time

  start = time.perf_counter()
  corpus = open_corpus(data_config(source='embedded', root=str(tmp_path), seq_len=128))
  assert time.perf_counter() - start < 30
  assert corpus.sizes('train').sum() > 40_000
