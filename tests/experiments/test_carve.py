"""A part of a corpus: by field, by share, contained in larger parts, and never half-written."""

from __future__ import annotations

import gzip
import json

import pytest

from experiments import carve
from experiments.errors import UserError


@pytest.fixture
def source(tmp_path):
  """One domain of two languages, 40 pages each, and a second domain."""
  folder = tmp_path / 'text'
  folder.mkdir()
  page = lambda lang, i: {'id': f'{lang}{i}', 'lang': lang, 'text': f'{lang} page {i}. ' * 20}
  many = [page(lang, i) for lang in ('fr', 'pl') for i in range(40)]
  write = lambda name, records: (folder / name).write_text(
    ''.join(json.dumps(record) + '\n' for record in records)
  )
  write('talk.train.jsonl', many)
  write('talk.validation.jsonl', many[:3] + many[-3:])
  write('law.train.jsonl', [page('en', i) for i in range(20)])
  return folder


def read(path):
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


def test_a_domain_becomes_one_for_each_language(source, tmp_path):
  counts = carve.carve(source, tmp_path / 'out', domain='talk', by='lang', keep='pl=0.25')
  assert counts['fr'] == {'train': 40, 'validation': 3, 'test': 0}
  assert 3 <= counts['pl']['train'] <= 18
  assert counts['pl']['validation'] == 3  # never cut down
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
    f'{lang}.{split}.jsonl.gz' for lang in ('fr', 'pl') for split in ('train', 'validation')
  }
  polish = read(tmp_path / 'out' / 'pl.train.jsonl.gz')
  assert {r['lang'] for r in polish} == {'pl'}
  assert all(r['parent'] + '#0' == r['id'] for r in polish)


def test_a_smaller_part_is_contained_in_a_larger_one(source, tmp_path):
  kept = []
  for share in ('0.2', '0.6'):
    carve.carve(source, tmp_path / share, keep=share)
    kept.append({r['id'] for r in read(tmp_path / share / 'talk.train.jsonl.gz')})
  assert kept[0] < kept[1]
  other = tmp_path / 'seed'
  carve.carve(source, other, keep='0.2', seed=1)
  assert {r['id'] for r in read(other / 'talk.train.jsonl.gz')} != kept[0]


def test_long_documents_are_cut_and_join_to_the_text_again(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  text = '\n\n'.join(f'Paragraph {i} of a long work.' for i in range(400))
  (folder / 'a.train.jsonl').write_text(json.dumps({'text': text}) + '\n')
  carve.carve(folder, tmp_path / 'out')
  parts = read(tmp_path / 'out' / 'a.train.jsonl.gz')
  assert len(parts) > 3
  assert ''.join(p['text'] for p in parts) == text
  assert {p['parent'] for p in parts} == {'a.train.jsonl:1'}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'keep': 'pl=0'}, "'pl=0' needs a share above 0"),
    ({'keep': 'half'}, "'half' needs a share"),
    ({'keep': 'pt=0.5', 'by': 'lang'}, "no domain 'pt'"),
    ({'domain': 'talks'}, "holds no domain 'talks'"),
    ({'by': 'language'}, 'line 1: --by=language needs a text'),
    ({'keep': '0.00001'}, 'leaves no training document'),
  ],
)
def test_bad_input_writes_nothing(source, tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    carve.carve(source, tmp_path / 'out', **arguments)
  assert not list((tmp_path / 'out').glob('*.gz'))


def test_dots_become_underscores_unless_two_values_would_be_one_domain(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  lines = [json.dumps({'text': 'words', 'source': value}) for value in ('a.gov', 'b')]
  (folder / 'web.train.jsonl').write_text('\n'.join(lines) + '\n')
  assert set(carve.carve(folder, tmp_path / 'out', by='source')) == {'a_gov', 'b'}
  with (folder / 'web.train.jsonl').open('a') as file:
    file.write(json.dumps({'text': 'words', 'source': 'a_gov'}) + '\n')
  with pytest.raises(UserError, match=r"line 3: 'a\.gov' and 'a_gov' would both be .* 'a_gov'"):
    carve.carve(folder, tmp_path / 'again', by='source')


def test_a_folder_in_use_and_a_broken_line(source, tmp_path):
  with pytest.raises(UserError, match='already holds something'):
    carve.carve(source, source)
  (source / 'law.train.jsonl').write_text('{"text": \n')
  with pytest.raises(UserError, match=r'law\.train\.jsonl, line 1: not JSON'):
    carve.carve(source, tmp_path / 'out')
