"""Tokenizers lose nothing, know their bytes, and keep EOT out of text."""

import inspect
import json
import json.decoder
import json.encoder

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import tokenizers
from experiments.errors import UserError
from tests.experiments.fake_data import words

TEXTS = ['Grüße, 世界! 🙂\n\ttabs  and  spaces', '', 'def f(x):\n  return x\n', '<|endoftext|>']


SOURCES = [inspect.getsource(module) for module in (json.decoder, json.encoder)]


@pytest.fixture(scope='module')
def bpe():
  return tokenizers.load_tokenizer('bpe:400', lambda: SOURCES)


def check_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.eot_id not in ids
  assert ids.size == 0 or ids.max() < tokenizer.vocab_size
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == text
  assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_bytes_round_trip(text):
  check_round_trip(tokenizers.ByteTokenizer(), text)


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_bpe_round_trip(bpe, text):
  check_round_trip(bpe, text)


@pytest.mark.parametrize('text', TEXTS)
def test_awkward_texts(bpe, text):
  check_round_trip(bpe, text)
  check_round_trip(tokenizers.ByteTokenizer(), text)


def test_sizes(bpe):
  byte = tokenizers.ByteTokenizer()
  assert (byte.vocab_size, byte.eot_id) == (257, 256)
  assert byte.token_bytes.tolist() == [1] * 256 + [0]
  assert bpe.eot_id == bpe.vocab_size - 1
  assert bpe.vocab_size == 400
  assert bpe.token_bytes.shape == (400,)
  assert bpe.token_bytes[bpe.eot_id] == 0
  assert bpe.encode(SOURCES[0]).size < 0.6 * len(SOURCES[0])  # it did learn


def test_cut_characters_are_replaced():
  byte = tokenizers.ByteTokenizer()
  assert byte.decode(byte.encode('aé')[:-1]) == 'a�'


def test_save_and_load(tmp_path, bpe):
  for tokenizer in (bpe, tokenizers.ByteTokenizer()):
    tokenizer.save(tmp_path)
    loaded = tokenizers.load_saved(tmp_path, tokenizer.name)
    assert (loaded.fingerprint, loaded.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_training_is_deterministic(bpe):
  again = tokenizers.load_tokenizer('bpe:400', lambda: SOURCES)
  assert again.fingerprint == bpe.fingerprint


def test_any_tokenizer_json_with_its_own_end_of_text(tmp_path):
  """As released models have it: EOT is a special token inside the vocabulary, text may spell it."""
  import tokenizers as hf

  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=300,
    show_progress=False,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator([words(0, 500)], trainer)
  path = tmp_path / 'tokenizer.json'
  tokenizer.save(str(path))
  loaded = tokenizers.load_tokenizer(str(path))
  assert loaded.eot_id == 0
  assert loaded.vocab_size == tokenizer.get_vocab_size()
  for text in TEXTS:
    check_round_trip(loaded, text)
  assert tokenizers.identify(str(path)) != tokenizers.identify('byte')


def test_a_vocabulary_that_is_not_byte_level_counts_bytes(tmp_path):
  """Sentencepiece style: words with a space mark, bytes as a fallback."""
  vocab = {'<unk>': 0, '</s>': 1, '<0xC3>': 2, '▁the': 3, 'é': 4}
  definition = {
    'version': '1.0',
    'added_tokens': [
      {
        'id': 1,
        'content': '</s>',
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
      }
    ],
    'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unk>'},
  }
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(definition))
  loaded = tokenizers.load_tokenizer(str(path))
  assert loaded.eot_id == 1
  assert loaded.token_bytes[[1, 2, 3, 4]].tolist() == [0, 1, 4, 2]


@pytest.mark.parametrize(
  ('spec', 'part'),
  [
    ('words', "data.tokenizer='words'"),
    ('bpe:many', 'between 257'),
    ('bpe:12', 'between 257'),
    ('nowhere/tokenizer.json', 'cannot read'),
  ],
)
def test_unknown_specs(spec, part):
  with pytest.raises(UserError, match=part) as caught:
    tokenizers.load_tokenizer(spec)
  assert '\n' not in str(caught.value)


def test_malformed_file(tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text('{"not": "a tokenizer"}')
  with pytest.raises(UserError, match=r'cannot be loaded') as caught:
    tokenizers.load_tokenizer(str(path))
  assert '\n' not in str(caught.value)
