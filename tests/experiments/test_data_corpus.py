"""A prepared corpus holds every token once, is there in full or not at all, and notices damage."""

import itertools
import json
import math
import multiprocessing
import shutil

import numpy as np
import pytest

from experiments.data import tokenizers
from experiments.data.corpus import Corpus, open_corpus
from experiments.data.readers import open_source
from experiments.errors import UserError
from tests.experiments.fake_data import data_config, words, write_corpus, write_jsonl


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  root = tmp_path_factory.mktemp('corpus')
  return data_config(path=str(write_corpus(root / 'text')), root=str(root / 'prepared'))


@pytest.fixture(scope='module')
def corpus(config):
  return open_corpus(config)


def all_blocks(corpus, split, domain_id):
  return [corpus.read(split, domain_id, i) for i in range(corpus.sizes(split)[domain_id])]


def expected_stream(config, tokenizer, domain, split):
  """EOT, then every document followed by EOT."""
  stream = [tokenizer.eot_id]
  for document in open_source(config).documents(domain, split):
    stream += [*tokenizer.encode(document.text).tolist(), tokenizer.eot_id]
  return stream


@pytest.mark.parametrize('tokenizer', ['byte', 'bpe:300'])
@pytest.mark.parametrize('seq_len', [7, 64])
def test_every_token_is_predicted_exactly_once(config, tokenizer, seq_len):
  config = data_config(
    **{**vars(config), 'tokenizer': tokenizer, 'seq_len': seq_len, 'domains': ('alpha', 'beta')}
  )
  corpus = open_corpus(config)
  for split in ('train', 'validation'):
    for k, domain in enumerate(corpus.domains):
      blocks = all_blocks(corpus, split, k)
      stream = expected_stream(config, corpus.tokenizer, domain, split)
      targets = np.concatenate([b['tokens'][1:][b['base'] > 0] for b in blocks])
      inputs = np.concatenate([b['tokens'][:-1][b['base'] > 0] for b in blocks])
      assert targets.tolist() == stream[1:]
      assert inputs.tolist() == stream[:-1]
      documents = open_source(config).documents(domain, split)
      text = ''.join(document.text for document in documents)
      assert corpus.tokenizer.decode(targets) == text
      assert sum(b['num_bytes'] for b in blocks) == len(text.encode())
      assert corpus.meta['splits'][split]['bytes'][domain] == len(text.encode())
      assert corpus.meta['splits'][split]['tokens'][domain] == targets.size


def test_blocks_have_the_promised_shapes(corpus):
  block = corpus.read('train', 1, 0)
  assert {key: (value.shape, value.dtype.name) for key, value in block.items()} == {
    'tokens': ((17,), 'int32'),
    'base': ((16,), 'float32'),
    'domain_id': ((), 'int32'),
    'example_id': ((), 'int32'),
    'num_bytes': ((), 'float32'),
  }
  last = corpus.read('train', 1, corpus.sizes('train')[1] - 1)
  padding = last['base'] == 0
  assert np.all(last['tokens'][1:][padding] == corpus.tokenizer.eot_id)
  assert np.all(np.diff(last['base']) <= 0)


def test_example_ids_number_all_blocks(corpus):
  sizes = corpus.sizes('train')
  ids = [corpus.example_id(k, i) for k in range(3) for i in range(sizes[k])]
  assert ids == list(range(sizes.sum()))
  assert [corpus.locate(e) for e in ids] == [(k, i) for k in range(3) for i in range(sizes[k])]
  rows = corpus.rows('train', ids[::-1])
  assert rows['example_id'].tolist() == ids[::-1]
  assert rows['domain_id'].tolist() == [corpus.locate(e)[0] for e in ids[::-1]]
  some = ids[len(ids) // 2]
  block = corpus.read('train', *corpus.locate(some))
  assert block['example_id'] == some
  np.testing.assert_array_equal(rows['tokens'][::-1][some], block['tokens'])


def test_describe_names_the_document(config, corpus):
  k = corpus.domains.index('beta')
  documents = list(open_source(config).documents('beta', 'train'))
  for index in range(corpus.sizes('train')[k]):
    described = corpus.describe(corpus.example_id(k, index))
    assert described['domain'] == 'beta'
    # Brute force: walk to the document that holds target number index * 16.
    position = index * 16
    for document in documents:
      if position < len(document.text.encode()) + 1:
        break
      position -= len(document.text.encode()) + 1
    assert described['doc'] == document.id
    text = document.text.encode()[position : position + 4].decode(errors='ignore')
    assert text in described['text']


def test_unknown_split(corpus):
  with pytest.raises(UserError, match=r"split 'test' is not in the corpus"):
    corpus.sizes('test')


def test_bigram_floor_equals_brute_force(config, corpus):
  for domain in corpus.domains:
    counts = {}
    for document in open_source(config).documents(domain, 'train'):
      data = document.text.encode()
      for a, b in itertools.pairwise(data):
        counts[a, b] = counts.get((a, b), 0) + 1
    bits, total = 0.0, 0
    for document in open_source(config).documents(domain, 'validation'):
      data = document.text.encode()
      for a, b in itertools.pairwise(data):
        row = sum(n for (first, _), n in counts.items() if first == a)
        bits -= math.log2((counts.get((a, b), 0) + 0.01) / (row + 2.56))
        total += 1
    assert corpus.meta['bigram_floor'][domain] == pytest.approx(bits / total, rel=1e-9)


def test_weights_travel_with_their_tokens(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  records = [
    {'text': 'abcd', 'weight': 2},
    {'text': 'efg'},
    {'text': 'hij', 'weight': [0.0, 0.5, 4.0]},
  ]
  write_jsonl(folder / 'web.train.jsonl', records)
  write_jsonl(folder / 'web.validation.jsonl', [{'text': 'xyz'}])
  write_jsonl(folder / 'zoo.train.jsonl', [{'text': 'no weights here'}])
  write_jsonl(folder / 'zoo.validation.jsonl', [{'text': 'none'}])
  corpus = open_corpus(data_config(path=str(folder), root=str(tmp_path / 'p'), seq_len=5))
  assert corpus.meta['weights']
  blocks = all_blocks(corpus, 'train', 0)
  weights = np.concatenate([b['weights'][b['base'] > 0] for b in blocks])
  assert weights.dtype == np.float32
  # Each closing EOT has the weight of its document's last token.
  assert weights.tolist() == [2, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0.5, 4, 4]
  assert all(np.all(b['weights'][b['base'] > 0] == 1) for b in all_blocks(corpus, 'train', 1))


def test_wrong_number_of_token_weights(tmp_path):
  write_jsonl(tmp_path / 'web.train.jsonl', [{'text': 'abcd', 'weight': [1.0, 2.0], 'id': 'doc7'}])
  write_jsonl(tmp_path / 'web.validation.jsonl', [{'text': 'xyz'}])
  with pytest.raises(UserError, match=r"'doc7'.* 2 weights for 4 tokens"):
    open_corpus(data_config(path=str(tmp_path), root=str(tmp_path / 'p')))


def test_limit_on_bytes(config):
  limited = data_config(**{**vars(config), 'max_bytes_per_domain': 300})
  sizes = open_corpus(limited).meta['splits']['train']['bytes']
  assert all(300 <= size < 700 for size in sizes.values())


def test_what_changes_the_data_changes_the_fingerprint(config, corpus):
  assert open_corpus(config).fingerprint == corpus.fingerprint
  for change in ({'seq_len': 8}, {'tokenizer': 'bpe:300'}, {'domains': ('beta',)}):
    other = open_corpus(data_config(**{**vars(config), **change}))
    assert other.fingerprint != corpus.fingerprint
    assert other.directory != corpus.directory


def test_fingerprint_does_not_depend_on_the_place(config, corpus, tmp_path):
  other = open_corpus(data_config(**{**vars(config), 'root': str(tmp_path)}))
  assert other.fingerprint == corpus.fingerprint


def test_several_shards_keep_the_order(config, monkeypatch, tmp_path):
  """TFDS divides large splits into files; example ids must survive it."""
  import tensorflow_datasets as tfds

  whole = tfds.core.GeneratorBasedBuilder.download_and_prepare

  def in_shards(self):
    return whole(self, download_config=tfds.download.DownloadConfig(num_shards=3))

  monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, 'download_and_prepare', in_shards)
  sharded = open_corpus(data_config(**{**vars(config), 'root': str(tmp_path)}))
  assert len(list(sharded.directory.glob('**/*train.array_record*'))) == 3
  monkeypatch.undo()
  ids = np.arange(sharded.sizes('train').sum())
  expected = open_corpus(config).rows('train', ids)
  np.testing.assert_array_equal(sharded.rows('train', ids)['tokens'], expected['tokens'])


def one_line(error):
  message = str(error.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('content', [[], [{'text': ''}]])
def test_empty_domain(tmp_path, split, content):
  write_corpus(tmp_path, ('alpha', 'beta'))
  write_jsonl(tmp_path / f'beta.{split}.jsonl.gz', content)
  with pytest.raises(UserError) as error:
    open_corpus(data_config(path=str(tmp_path), root=str(tmp_path / 'p')))
  message = one_line(error)
  assert "domain 'beta' has no" in message
  assert 'data.domains' in message
  assert not list((tmp_path / 'p').glob('[!.]*'))


def test_one_document_cannot_be_held_out(tmp_path):
  write_jsonl(tmp_path / 'web.train.jsonl', [{'text': 'all there is'}])
  with pytest.raises(UserError, match=r'no validation text; add web.validation.jsonl'):
    open_corpus(data_config(path=str(tmp_path), root=str(tmp_path / 'p')))


def test_lossy_tokenizer(tmp_path):
  vocab = {'the': 0, '[UNK]': 1}
  definition = {
    'version': '1.0',
    'pre_tokenizer': {'type': 'Whitespace'},
    'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '[UNK]'},
  }
  (tmp_path / 'tokenizer.json').write_text(json.dumps(definition))
  write_corpus(tmp_path / 'text')
  config = data_config(
    path=str(tmp_path / 'text'),
    root=str(tmp_path / 'p'),
    tokenizer=str(tmp_path / 'tokenizer.json'),
  )
  with pytest.raises(UserError, match=r'loses text') as error:
    open_corpus(config)
  one_line(error)


def test_other_tokenizer_in_the_prepared_data(corpus, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(corpus.directory, copy)
  other = tokenizers.load_tokenizer('bpe:300', lambda: [words(3, 900)])
  other.save(copy)
  with pytest.raises(
    UserError, match=r'not the tokenizer that the data were prepared with'
  ) as error:
    Corpus(copy)
  one_line(error)


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'missing'])
def test_corrupt_shard(corpus, tmp_path, damage):
  copy = tmp_path / 'copy'
  shutil.copytree(corpus.directory, copy)
  (shard,) = copy.glob('**/*train.array_record*')
  data = bytearray(shard.read_bytes())
  if damage == 'flip':
    start = 65536  # the records come after a header of this size
    data[start : start + 2000] = bytes(b ^ 0xFF for b in data[start : start + 2000])
  elif damage == 'cut':
    data = data[: len(data) // 2]
  elif damage == 'empty':
    data = bytearray()
  shard.write_bytes(data)
  if damage == 'missing':
    shard.unlink()
  with pytest.raises(UserError, match=r'are damaged') as error:
    Corpus(copy).rows('train', [0, 1, 2])
  assert str(copy) in one_line(error)
  Corpus(copy).rows('validation', [0, 1, 2])  # untouched


def test_interrupted_preparation_leaves_nothing_that_opens(config, monkeypatch, tmp_path):
  from experiments.data import builders

  config = data_config(**{**vars(config), 'root': str(tmp_path)})

  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(builders, '_meta', interrupted)  # the very last thing before the rename
  with pytest.raises(KeyboardInterrupt):
    open_corpus(config)
  assert not list(tmp_path.glob('[!.]*'))
  monkeypatch.undo()

  monkeypatch.setattr(
    shutil, 'rmtree', lambda *args, **kwargs: None
  )  # as if killed: no cleaning up
  monkeypatch.setattr(builders, '_meta', interrupted)
  with pytest.raises(KeyboardInterrupt):
    open_corpus(config)
  assert list(tmp_path.glob('.*.partial'))
  assert not list(tmp_path.glob('[!.]*'))
  monkeypatch.undo()
  assert open_corpus(config).sizes('train').sum() > 0
  assert not list(tmp_path.glob('.*.partial'))


def test_a_disk_that_takes_nothing(config, monkeypatch, tmp_path):
  from experiments.data import builders

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(builders, '_meta', full)
  with pytest.raises(UserError, match=r'No space left on device.*data.root') as error:
    open_corpus(data_config(**{**vars(config), 'root': str(tmp_path)}))
  one_line(error)
  assert not list(tmp_path.glob('[!.]*'))


def test_root_that_is_a_file(config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'data.root') as error:
    open_corpus(data_config(**{**vars(config), 'root': str(tmp_path / 'file')}))
  one_line(error)


def test_bad_seq_len(config):
  with pytest.raises(UserError, match=r'data.seq_len=0'):
    open_corpus(data_config(**{**vars(config), 'seq_len': 0}))


def _open(config):
  return open_corpus(config).fingerprint


def test_processes_that_start_together_prepare_once(config, capfd, tmp_path):
  config = data_config(**{**vars(config), 'root': str(tmp_path)})
  with multiprocessing.get_context('spawn').Pool(2) as pool:
    first, second = pool.map(_open, [config, config])
  assert first == second
  assert capfd.readouterr().err.count('preparing 3 domains') == 1
