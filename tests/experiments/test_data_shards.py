"""Shards whose lines name their domains: what is read, what is kept, and what is said of damage."""

import json
import os

import numpy as np
import pytest

from experiments.data import text_files
from experiments.data.corpus import open_corpus
from experiments.data.readers import open_source
from experiments.errors import UserError
from tests.experiments.fake_data import data_config, words, write_jsonl

KEY = 'meta.redpajama_set_name'
NAMES = ('RedPajamaC4', 'RedPajamaGithub', 'RedPajamaBook')


def record(i, name):
  return {'text': f'{name} {i} {words(i, 6)}', 'meta': {'redpajama_set_name': name}}


@pytest.fixture
def root(tmp_path):
  """Two chunks of training shards in every compression, and one shard of each other split.

  The first chunk holds no books, the validation split neither; files have the same names.
  """
  folder = tmp_path / 'pajama'
  for chunk, suffix, names in (('chunk1', '.zst', NAMES[:2]), ('chunk2', '.gz', NAMES)):
    for shard in range(2):
      path = folder / 'train' / chunk / f'example_{shard}.jsonl{suffix}'
      path.parent.mkdir(parents=True, exist_ok=True)
      numbers = range(30 * shard, 30 * shard + 30)
      write_jsonl(path, [record(f'{chunk} {i}', names[i % len(names)]) for i in numbers])
  for split in ('validation', 'test'):
    (folder / split / 'chunk1').mkdir(parents=True)
    records = [record(f'{split} {i}', NAMES[i % 2]) for i in range(6)]
    write_jsonl(folder / split / 'chunk1' / 'example_0.jsonl', records)
  return folder


def config(root, **changes):
  changes = {'domain_key': KEY, **changes}
  return data_config(path=str(root), root=str(root.parent / 'data'), **changes)


def texts(root, domain, split, **changes):
  return [d.text for d in open_source(config(root, **changes)).documents(domain, split)]


def all_records(root, split):
  """Every line below a split, by a plain loop over the files."""
  for path in sorted((root / split).rglob('*.jsonl*')):
    yield from map(json.loads, text_files.lines(path))


def test_each_line_goes_to_the_domain_it_names(root):
  source = open_source(config(root))
  assert source.domains == tuple(sorted(NAMES))
  assert source.splits == ('train', 'validation', 'test')
  for split, domains in (('train', NAMES[:2]), ('validation', NAMES[:2]), ('test', NAMES)):
    for domain in domains:
      mine = [
        line['text']
        for line in all_records(root, split)
        if line['meta']['redpajama_set_name'] == domain
      ]
      assert texts(root, domain, split) == mine
      assert mine or (domain, split) == ('RedPajamaBook', 'test')


def test_a_domain_without_validation_shards_is_held_out(root):
  train, held_out = (texts(root, 'RedPajamaBook', split) for split in ('train', 'validation'))
  names = [line['meta']['redpajama_set_name'] for line in all_records(root, 'train')]
  assert held_out
  assert not set(train) & set(held_out)
  assert len(train) + len(held_out) == names.count('RedPajamaBook')


def test_documents_of_equal_files_have_names_of_their_own(root):
  documents = list(open_source(config(root)).documents('RedPajamaC4', 'train'))
  assert len({d.id for d in documents}) == len(documents)
  assert documents[0].id == 'train/chunk1/example_0.jsonl.zst:1'


def test_a_corpus_of_some_domains(root):
  corpus = open_corpus(config(root, domains=NAMES[:2]))
  assert corpus.domains == NAMES[:2]
  assert np.all(corpus.sizes('train') > 0)
  first = corpus.describe(0)
  assert (first['domain'], first['text']) == ('RedPajamaC4', 'RedPajamaC4 chun')


def test_a_key_without_dots(root):
  path = root / 'train' / 'chunk3.jsonl'
  write_jsonl(path, [{'text': 'a'}])
  with pytest.raises(UserError, match="no domain under 'source'"):
    open_source(config(root, domain_key='source'))
  for split in ('train', 'validation', 'test'):
    for file in (root / split).rglob('*.jsonl*'):
      file.unlink()
  write_jsonl(path, [{'text': t, 'source': 'web'} for t in ('a', 'b')])
  assert open_source(config(root, domain_key='source')).domains == ('web',)


def test_files_named_by_domain_come_first(root):
  write_jsonl(root / 'web.train.jsonl', [{'text': 'a'}, {'text': 'b'}])
  assert open_source(config(root)).domains == ('web',)


# What is kept -----------------------------------------------------------------------------------


def test_shards_are_read_once_and_again_when_they_change(root, monkeypatch):
  first = open_source(config(root))
  opened, read = [], text_files.json_lines
  spy = lambda path: opened.append(path.relative_to(root).as_posix()) or read(path)
  monkeypatch.setattr(text_files, 'json_lines', spy)
  assert open_source(config(root)).fingerprint == first.fingerprint
  assert opened == []
  changed = root / 'train/chunk2/example_1.jsonl.gz'
  write_jsonl(changed, [record('new', 'RedPajamaArXiv')])
  second = open_source(config(root))
  assert opened == ['train/chunk2/example_1.jsonl.gz']
  assert 'RedPajamaArXiv' in second.domains
  assert second.fingerprint != first.fingerprint
  changed.unlink()
  assert 'RedPajamaArXiv' not in open_source(config(root)).domains


def test_fingerprint_follows_content_and_key_but_not_times(root):
  first = open_source(config(root)).fingerprint
  path = root / 'train/chunk1/example_0.jsonl.zst'
  os.utime(path, (1, 1))
  assert open_source(config(root)).fingerprint == first
  for file in root.rglob('*.jsonl*'):
    lines = list(map(json.loads, text_files.lines(file)))
    write_jsonl(file, [{**line, 'set': line['meta']['redpajama_set_name']} for line in lines])
  by_meta = open_source(config(root)).fingerprint
  assert by_meta not in (first, open_source(config(root, domain_key='set')).fingerprint)


# Damage -----------------------------------------------------------------------------------------


def fails(root, *words, **changes):
  with pytest.raises(UserError) as caught:
    open_source(config(root, **changes))
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


@pytest.mark.parametrize('name', ['chunk1/example_1.jsonl.zst', 'chunk2/example_0.jsonl.gz'])
def test_a_truncated_shard(root, name):
  path = root / 'train' / name
  path.write_bytes(path.read_bytes()[:-20])
  fails(root, str(path), 'again')


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ('{"text": "cut', 'not JSON'),
    ('{"text": "a"}', f"no domain under '{KEY}'"),
    ('{"text": "a", "meta": "C4"}', f"no domain under '{KEY}'"),
    ('{"text": "a", "meta": {"redpajama_set_name": null}}', f"no domain under '{KEY}'"),
    ('["text"]', f"no domain under '{KEY}'"),
  ],
)
def test_bad_lines_are_named(root, line, words):
  path = root / 'validation/chunk1/example_0.jsonl'
  path.write_text(path.read_text() + line + '\n')
  fails(root, f'{path}, line 7', words)


def test_a_line_without_text(root):
  path = root / 'train/chunk2/example_2.jsonl'
  write_jsonl(path, [{**record(0, NAMES[0]), 'text': None}])
  source = open_source(config(root))
  with pytest.raises(UserError, match=r"example_2.jsonl, line 1: no text under 'text'"):
    list(source.documents(NAMES[0], 'train'))


def test_domains_that_are_not_there(root):
  fails(root, 'RedPajamaC5', "did you mean 'RedPajamaC4'", domains=('RedPajamaC5',))
  write_jsonl(root / 'test/only.jsonl', [record(0, 'RedPajamaWikipedia')])
  fails(root, "domain 'RedPajamaWikipedia' has no training file")


def test_a_folder_without_training_shards(root):
  for path in (root / 'train').rglob('*.jsonl*'):
    path.rename(path.with_name(path.name + '.bak'))
  fails(root, 'no training file')
