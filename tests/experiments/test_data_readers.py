"""Sources of text: what is read, what is held out, and what is said about bad data."""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest
import zstandard

from experiments.data.readers import open_source
from experiments.data.text import pieces
from experiments.errors import UserError
from tests.experiments.fake_data import data_config, words, write_jsonl


def read_all(config, split='train'):
  source = open_source(config)
  return {domain: list(source.documents(domain, split)) for domain in source.domains}


def read_everything(config):
  return [read_all(config, split) for split in ('train', 'validation')]


def fails(config, *parts):
  """Opening and reading must end in a one-line UserError that mentions every part."""
  with pytest.raises(UserError) as caught:
    read_everything(config)
  message = str(caught.value)
  assert '\n' not in message
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_jsonl_is_read_plain_or_compressed(tmp_path, suffix):
  records = [{'text': words(i, 5), 'id': f'doc{i}', 'weight': i / 2} for i in range(4)]
  write_jsonl(tmp_path / f'web.train.jsonl{suffix}', records)
  write_jsonl(tmp_path / f'web.validation.jsonl{suffix}', [{'text': 'held out'}])
  config = data_config(path=str(tmp_path))
  documents = read_all(config)['web']
  assert [d.text for d in documents] == [r['text'] for r in records]
  assert [d.id for d in documents] == ['doc0', 'doc1', 'doc2', 'doc3']
  assert [d.weight for d in documents] == [0.0, 0.5, 1.0, 1.5]
  (held_out,) = read_all(config, 'validation')['web']
  assert held_out.text == 'held out'
  assert held_out.weight is None
  assert held_out.id  # made up from file and line


def test_zst_of_several_frames_and_awkward_line_ends(tmp_path):
  lines = [json.dumps({'text': words(i, 400)}) for i in range(50)]
  frames = ['\n'.join(lines[:20])[:-7], '\n'.join(lines[:20])[-7:] + '\n\n' + '\n'.join(lines[20:])]
  data = b''.join(zstandard.ZstdCompressor().compress(frame.encode()) for frame in frames)
  (tmp_path / 'web.train.jsonl.zst').write_bytes(data)
  write_jsonl(tmp_path / 'web.validation.jsonl', [{'text': 'v'}])
  documents = read_all(data_config(path=str(tmp_path)))['web']
  assert [d.text for d in documents] == [json.loads(line)['text'] for line in lines]


def test_plain_text_files_and_folders(tmp_path):
  book = '\n\n'.join(words(i, 300) for i in range(60))
  (tmp_path / 'books.train.txt').write_text(book, encoding='utf-8')
  (tmp_path / 'notes').mkdir()
  for i in range(30):
    (tmp_path / 'notes' / f'{i}.txt').write_text(words(i, 50), encoding='utf-8')
  config = data_config(path=str(tmp_path))
  train, validation = read_all(config), read_all(config, 'validation')
  assert sorted(train) == ['books', 'notes']
  assert sorted(d.text for d in train['books'] + validation['books']) == sorted(pieces(book))
  assert len(train['notes']) + len(validation['notes']) == 30
  assert 1 <= len(validation['notes']) <= 4


def test_pieces_join_to_the_text_and_end_at_paragraphs():
  text = '\n\n'.join(words(i, 40) for i in range(100))
  cut = list(pieces(text, 1000))
  assert ''.join(cut) == text
  assert all(len(piece) <= 1000 for piece in cut)
  assert all(piece.endswith('\n\n') for piece in cut[:-1])
  assert ''.join(pieces('x' * 2500, 1000)) == 'x' * 2500


def test_mini_and_stats_are_left_alone_and_domains_selected(tmp_path):
  for domain in ('web', 'code'):
    write_jsonl(tmp_path / f'{domain}.train.jsonl', [{'text': domain}])
    write_jsonl(tmp_path / f'{domain}.validation.jsonl', [{'text': domain}])
  for other in ('mini.jsonl', 'mini.train.jsonl', 'stats.json', 'README.md'):
    (tmp_path / other).write_text('not a domain')
  assert open_source(data_config(path=str(tmp_path))).domains == ('code', 'web')
  chosen = open_source(data_config(path=str(tmp_path), domains=('web',)))
  assert chosen.domains == ('web',)
  ordered = open_source(data_config(path=str(tmp_path), domains=('web', 'code')))
  assert ordered.domains == ('web', 'code')


def test_validation_is_held_out_by_parent(tmp_path):
  records = [{'text': words(i, 20), 'id': str(i), 'parent': f'work{i // 5}'} for i in range(1000)]
  write_jsonl(tmp_path / 'web.train.jsonl', records)
  config = data_config(path=str(tmp_path))
  train, validation = read_all(config)['web'], read_all(config, 'validation')['web']
  assert sorted(int(d.id) for d in train + validation) == list(range(1000))
  assert not {d.parent for d in train} & {d.parent for d in validation}
  assert 0.04 < sum(len(d.text) for d in validation) / sum(len(r['text']) for r in records) < 0.07
  write_jsonl(tmp_path / 'web.train.jsonl', records[::-1])  # order does not matter
  again = read_all(config, 'validation')['web']
  assert {d.id for d in again} == {d.id for d in validation}


def test_two_documents_are_enough_to_hold_one_out(tmp_path):
  write_jsonl(tmp_path / 'web.train.jsonl', [{'text': 'long text'}, {'text': 'short'}])
  config = data_config(path=str(tmp_path))
  assert [d.text for d in read_all(config)['web']] == ['long text']
  assert [d.text for d in read_all(config, 'validation')['web']] == ['short']


def test_fingerprint_follows_the_content(tmp_path):
  path = tmp_path / 'web.train.jsonl'
  write_jsonl(path, [{'text': 'a'}, {'text': 'b'}])
  config = data_config(path=str(tmp_path))
  first = open_source(config).fingerprint
  os.utime(path, (1, 1))
  assert open_source(config).fingerprint == first
  write_jsonl(path, [{'text': 'a'}, {'text': 'c'}])
  assert open_source(config).fingerprint != first


def test_missing_folder(tmp_path):
  fails(data_config(path=str(tmp_path / 'nowhere')), 'data.path', 'nowhere', '--config.data.path')
  fails(data_config(path=''), "data.path=''")


def test_folder_without_a_corpus(tmp_path):
  (tmp_path / 'mini.jsonl.gz').write_bytes(b'')
  fails(data_config(path=str(tmp_path)), '{domain}', 'found mini.jsonl.gz')


def test_domain_without_training_file(tmp_path):
  write_jsonl(tmp_path / 'web.validation.jsonl', [{'text': 'v'}])
  fails(data_config(path=str(tmp_path)), "domain 'web'", 'web.train.jsonl')


def test_a_file_and_its_compressed_copy(tmp_path):
  for suffix in ('', '.gz'):
    write_jsonl(tmp_path / f'web.train.jsonl{suffix}', [{'text': 'a'}])
  fails(data_config(path=str(tmp_path)), 'web.train.jsonl.gz', 'keep one')


def test_unknown_source_and_domain(tmp_path):
  fails(data_config(source='web'), "data.source='web'", 'embedded')
  write_jsonl(tmp_path / 'encyclopedia.train.jsonl', [{'text': 'a'}])
  config = data_config(path=str(tmp_path), domains=('encyclopaedia',))
  fails(config, "no domain 'encyclopaedia'", "did you mean 'encyclopedia'")
  fails(data_config(path=str(tmp_path), domains=('encyclopedia',) * 2), 'twice')


@pytest.mark.parametrize('damage', ['cut', 'flip', 'not gzip'])
def test_corrupt_gzip(tmp_path, damage):
  path = tmp_path / 'web.train.jsonl.gz'
  data = bytearray(gzip.compress(json.dumps({'text': words(0, 5000)}).encode() + b'\n'))
  if damage == 'cut':
    data = data[: len(data) // 2]
  elif damage == 'flip':
    for i in range(len(data) // 2, len(data) // 2 + 40):
      data[i] ^= 0xFF
  else:
    data = bytearray(b'plain text\n')
  path.write_bytes(data)
  fails(data_config(path=str(tmp_path)), str(path), 'again')


@pytest.mark.parametrize('damage', ['cut', 'not zstd'])
def test_corrupt_zst(tmp_path, damage):
  path = tmp_path / 'web.train.jsonl.zst'
  data = zstandard.ZstdCompressor().compress(json.dumps({'text': words(0, 5000)}).encode())
  path.write_bytes(data[:-30] if damage == 'cut' else b'plain text\n')
  fails(data_config(path=str(tmp_path)), str(path), 'again')


@pytest.mark.parametrize(
  ('line', 'parts'),
  [
    (b'{"text": "caf\xe9"}', ['line 2', 'not UTF-8', '0xe9', 'iconv']),
    (b'{"text": "cut', ['line 2', 'not JSON']),
    (b'["text"]', ['line 2', "no text under 'text'", 'data.text_key']),
    (b'{"content": "a"}', ['line 2', "no text under 'text'"]),
    (b'{"text": null}', ['line 2', "no text under 'text'"]),
    (b'{"text": "\\ud800"}', ['line 2', 'surrogate']),
    (b'{"text": "a", "weight": "2"}', ['line 2', "weight '2'", 'not a number']),
    (b'{"text": "a", "weight": true}', ['line 2', 'weight True', 'not a number']),
    (b'{"text": "a", "weight": NaN}', ['line 2', 'finite']),
    (b'{"text": "a", "weight": -0.5}', ['line 2', '-0.5', 'not negative']),
    (b'{"text": "a", "weight": [1.0, "b"]}', ['line 2', "weight 'b'"]),
  ],
)
def test_bad_lines_are_named(tmp_path, line, parts):
  (tmp_path / 'web.train.jsonl').write_bytes(b'{"text": "fine"}\n' + line + b'\n')
  fails(data_config(path=str(tmp_path)), 'web.train.jsonl', *parts)


def test_plain_text_that_is_not_utf8(tmp_path):
  (tmp_path / 'web.train.txt').write_bytes('Grüße\n'.encode('latin-1'))
  fails(data_config(path=str(tmp_path)), 'web.train.txt', 'line 1', 'not UTF-8')


def test_weight_key_can_be_renamed_or_switched_off(tmp_path):
  write_jsonl(tmp_path / 'web.train.jsonl', [{'text': 'a', 'weight': 'high', 'w': 2}] * 2)
  write_jsonl(tmp_path / 'web.validation.jsonl', [{'text': 'a'}])
  renamed = read_all(data_config(path=str(tmp_path), weight_key='w'))
  assert renamed['web'][0].weight == 2.0
  none = read_all(data_config(path=str(tmp_path), weight_key=''))
  assert none['web'][0].weight is None


def test_weights_can_be_one_per_token(tmp_path):
  write_jsonl(tmp_path / 'web.train.jsonl', [{'text': 'abc', 'weight': [0, 0.5, 2]}])
  write_jsonl(tmp_path / 'web.validation.jsonl', [{'text': 'a'}])
  (document,) = read_all(data_config(path=str(tmp_path)))['web']
  np.testing.assert_array_equal(document.weight, np.float32([0, 0.5, 2]))


def shared_text():
  """The folder of the project's text corpus, if this machine has one."""
  default = pathlib.Path(__file__).parents[3] / 'shared/data/text'
  path = pathlib.Path(os.environ.get('JAXRW_TEXT_DIR') or default)
  if not path.is_dir():
    pytest.skip('no text corpus here; set JAXRW_TEXT_DIR to its folder')
  return path


def test_real_text(tmp_path):
  from experiments.data.corpus import open_corpus

  config = data_config(
    path=str(shared_text()), root=str(tmp_path), seq_len=128, max_bytes_per_domain=20_000
  )
  corpus = open_corpus(config)
  assert {'web', 'code', 'books', 'law'} <= set(corpus.domains)
  assert not {'mini', 'stats'} & set(corpus.domains)
  assert np.all(corpus.sizes('train') >= 20_000 // 128)
  assert all(3 < floor < 6.5 for floor in corpus.meta['bigram_floor'].values())
