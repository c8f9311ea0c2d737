"""What is read is data: nothing unpickles, evaluates or leaves its folder; reading has bounds."""

from __future__ import annotations

import ast
import gzip
import io
import os
from pathlib import Path

import pytest
import zstandard

from experiments.carve import carve
from experiments.data import text_files
from experiments.data.corpus import open_corpus
from experiments.data.readers import open_source
from experiments.errors import UserError
from tests.experiments import small
from tests.experiments.fake_data import data_config, write_jsonl

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
  path for name in ('jaxrw', 'experiments', 'configs') for path in (ROOT / name).rglob('*.py')
)
MODULES = {'pickle', 'cPickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}
CALLS = {
  'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'yaml.load', 'yaml.unsafe_load',
  'torch.load', 'numpy.load', 'np.load', 'pandas.read_pickle', 'pd.read_pickle',
}  # fmt: skip
# A config file is code, as docs/errors.md says.
ALLOWED = {
  ('experiments/config.py', 'exec_module'),
  # Arrays only: allow_pickle=False.
  ('experiments/classify/sources.py', 'np.load'),
  ('experiments/files.py', 'np.load'),
  ('experiments/peers/cases.py', 'np.load'),
  ('experiments/peers/workers/data_selection.py', 'np.load'),
  ('experiments/peers/workers/dattri.py', 'np.load'),
  ('experiments/peers/workers/kronfluence.py', 'np.load'),
  ('experiments/peers/workers/pydvl.py', 'np.load'),
  ('experiments/peers/workers/ragbooster.py', 'np.load'),
  # The compiled module of an installed package, by itself.
  ('experiments/peers/workers/ragbooster.py', 'exec_module'),
}


def dangers(source: str) -> set[str]:
  """What a program does that turns what it reads into code."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names if alias.name.partition('.')[0] in MODULES}
    elif isinstance(node, ast.ImportFrom):
      names = {f'{node.module}.{alias.name}' for alias in node.names}
      found |= names & CALLS
      found |= {node.module} if (node.module or '').partition('.')[0] in MODULES else set()
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      found |= {name} & CALLS
      found |= {'exec_module'} if name.endswith('.exec_module') else set()
      found |= {f'{name}({k.arg}=True)' for k in node.keywords if _dangerous(k)}
  return found


def _dangerous(keyword: ast.keyword) -> bool:
  off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
  return keyword.arg in ('shell', 'allow_pickle') and not off


@pytest.mark.parametrize(
  'source',
  [
    'import pickle', 'import os, pickle as p', 'from pickle import loads', 'import marshal',
    'eval(text)', 'exec(text)', 'np.load(path)', 'np.load(path, allow_pickle=True)',
    'from numpy import load', 'yaml.load(text)', 'torch.load(path)', 'os.system(command)',
    'subprocess.run(command, shell=True)', 'subprocess.Popen(command, shell=flag)',
    'spec.loader.exec_module(module)', '__import__(name)',
  ],
)  # fmt: skip
def test_the_scan_finds(source):
  assert dangers(source)


@pytest.mark.parametrize(
  'source',
  ['import numpy', 'subprocess.run(command, shell=False)', 're.compile(x)', 'evaluate(x)', 'a.b()'],
)
def test_the_scan_leaves_alone(source):
  assert not dangers(source)


def test_nothing_that_is_read_becomes_code():
  assert len(SOURCES) > 60
  found = {(str(p.relative_to(ROOT)), d) for p in SOURCES for d in dangers(p.read_text())}
  assert found == ALLOWED


# Names


def files_below(folder: Path) -> set[Path]:
  return {path.relative_to(folder) for path in folder.rglob('*')}


def make_dataset(folder: Path, domains: list[str]) -> None:
  """A TFDS dataset whose records name their domains."""
  import tensorflow_datasets as tfds

  class Named(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    code_path = None

    def _info(self):
      text = tfds.features.Text()
      features = tfds.features.FeaturesDict({'text': text, 'domain': text, 'id': text})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(), 'validation': self._generate_examples()}

    def _generate_examples(self):
      for i, domain in enumerate(domains * 2):
        yield i, {'text': f'some text {i}', 'domain': domain, 'id': f'../../{i}'}

  Named(data_dir=folder, file_format='array_record').download_and_prepare()


@pytest.mark.parametrize('name', ['../../../escaped', '/escaped', '..', 'a/b', '~', 'x' * 200])
def test_a_domain_in_the_data_names_no_path(tmp_path, name):
  make_dataset(tmp_path / 'tfds', [name, 'plain'])
  before = files_below(tmp_path)
  root = tmp_path / 'deep' / 'er' / 'prepared'
  config = data_config(source='tfds', name='named', tfds_dir=str(tmp_path / 'tfds'), root=str(root))
  corpus = open_corpus(config)
  assert set(corpus.domains) == {name, 'plain'}
  assert corpus.directory.parent == root
  new = files_below(tmp_path) - before
  assert all(Path('deep') in (path, *path.parents) for path in new)
  assert not Path('/escaped').exists()


@pytest.mark.parametrize('name', ['', 'a\nb', 'a\0b', '\x1b[31mred', 'x' * 201])
def test_a_domain_that_cannot_be_printed_is_refused(tmp_path, name):
  make_dataset(tmp_path / 'tfds', [name, 'plain'])
  config = data_config(
    source='tfds', name='named', tfds_dir=str(tmp_path / 'tfds'), root=str(tmp_path / 'p')
  )
  with pytest.raises(UserError, match='1 to 200 printable characters; rename it') as error:
    open_corpus(config)
  assert str(error.value).isprintable()


@pytest.mark.parametrize('name', ['../named', '/named', 'named/../../x', 'na\0med', 'x' * 300, '.'])
def test_a_dataset_is_looked_for_in_its_folder_only(tmp_path, name):
  make_dataset(tmp_path, ['plain'])
  (tmp_path / 'inside').mkdir()
  config = data_config(source='tfds', name=name, tfds_dir=str(tmp_path / 'inside'))
  with pytest.raises(UserError, match=r'is not a prepared dataset|is not a feature'):
    open_source(config)


@pytest.mark.parametrize('value', ['../escaped', '/escaped', 'a\0b', 'a\nb', ''])
def test_values_that_become_files_stay_in_their_folder(tmp_path, value):
  (tmp_path / 'text').mkdir()
  write_jsonl(tmp_path / 'text/web.train.jsonl', [{'text': 'words', 'source': value}])
  with pytest.raises(UserError, match='needs a text that can name a file'):
    carve(tmp_path / 'text', tmp_path / 'deep/out', by='source')
  assert not list(tmp_path.rglob('*escaped*'))


def test_a_folder_with_a_very_long_name(tmp_path):
  folder = small.write_corpus(tmp_path / ('n' * 250), documents=6)
  config = small.config(folder, tmp_path / 'data').data
  assert open_corpus(config).directory.is_dir()


def test_links_are_followed(tmp_path):
  """A corpus of links into a shared folder; one that leads nowhere is left out."""
  folder = small.write_corpus(tmp_path / 'shared', documents=6)
  linked = tmp_path / 'linked'
  linked.mkdir()
  for path in folder.iterdir():
    os.symlink(path, linked / path.name)
  os.symlink(tmp_path / 'nowhere', linked / 'lost.train.jsonl')
  os.symlink('loop.train.jsonl', linked / 'loop.train.jsonl')
  direct, through_links = (open_source(data_config(path=str(p))) for p in (folder, linked))
  assert through_links.fingerprint == direct.fingerprint


# Bounds

PACK = {
  '': bytes,
  '.gz': gzip.compress,
  '.zst': zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize('suffix', PACK)
def test_a_line_that_is_too_long(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(text_files, 'MAX_LINE', 1000)
  path = tmp_path / f'web.train.jsonl{suffix}'
  line = f'{"x" * 999}\n'
  path.write_bytes(PACK[suffix](f'{line}{line}'.encode()))
  assert list(text_files.lines(path)) == [line, line]
  path.write_bytes(PACK[suffix](f'{line}x{line}'.encode()))
  with pytest.raises(UserError, match=r'jsonl.*, line 2: longer than 1,000 bytes; divide the text'):
    list(text_files.lines(path))


@pytest.mark.parametrize('suffix', PACK)
def test_a_text_that_is_too_long(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(text_files, 'MAX_TEXT', 1000)
  path = tmp_path / f'web.train.txt{suffix}'
  path.write_bytes(PACK[suffix](b'1234\n' * 200))
  assert len(text_files.whole(path)) == 1000
  path.write_bytes(PACK[suffix](b'1234\n' * 201))
  with pytest.raises(UserError, match=r'txt.*: longer than 1,000 characters; divide it'):
    text_files.whole(path)


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_bomb_is_unpacked_in_small_parts(tmp_path, monkeypatch, suffix):
  """512 MiB of one line in a small archive: refused after the bound, in a part of that memory."""
  import tracemalloc

  monkeypatch.setattr(text_files, 'MAX_LINE', 2**20)
  path = tmp_path / f'web.train.jsonl{suffix}'
  chunk, parts = b'\0' * 2**20, 512
  if suffix == '.gz':
    path.write_bytes(gzip.compress(chunk) * parts)
  else:
    with zstandard.ZstdCompressor().stream_writer(path.open('wb')) as file:
      for _ in range(parts):
        file.write(chunk)
  assert path.stat().st_size < 4 * 2**20
  tracemalloc.start()
  with pytest.raises(UserError, match='longer than'):
    list(text_files.lines(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 256 * 2**20


def test_frames_and_parts_of_any_size_join(tmp_path):
  """The reader of zstd against its input, cut into frames at every place."""
  data = ''.join(f'{"long " * (i % 50)}line {i}\n' for i in range(300)).encode()
  path = tmp_path / 'web.train.txt.zst'
  for at in (0, 1, 999, len(data) - 1):
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:at], data[at:])]
    path.write_bytes(b''.join(frames))
    assert ''.join(text_files.lines(path)).encode() == data
  assert io.BytesIO(data).readline().decode() == next(text_files.lines(path))
