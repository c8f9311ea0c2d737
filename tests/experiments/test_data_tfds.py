"""Datasets prepared by TFDS are read by name, without their code and without TensorFlow."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.corpus import open_corpus
from experiments.data.readers import open_source
from experiments.errors import UserError
from tests.experiments.fake_data import data_config, words

TEXT = tfds.features.Text()


def prepare(folder, features, splits):
  """Prepares a dataset from lists of examples, as a user's own builder would."""

  class MyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    code_path = None

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(examples) for split, examples in splits.items()}

    def _generate_examples(self, examples):
      yield from enumerate(examples)

  tfds.disable_progress_bar()
  with redirect_stdout(io.StringIO()):
    MyTexts(data_dir=folder, file_format='array_record').download_and_prepare()


def examples(n):
  return [{'text': words(i, 12), 'domain': ['web', 'code'][i % 2]} for i in range(n)]


def config_for(tmp_path, **overrides):
  defaults = dict(source='tfds', name='my_texts', tfds_dir=str(tmp_path), root=str(tmp_path / 'p'))
  return data_config(**{**defaults, **overrides})


def test_domains_by_feature(tmp_path):
  splits = {'train': examples(20), 'validation': examples(4)}
  prepare(tmp_path, {'text': TEXT, 'domain': TEXT}, splits)
  source = open_source(config_for(tmp_path))
  assert source.domains == ('code', 'web')
  web = [document.text for document in source.documents('web', 'train')]
  assert web == [e['text'] for e in splits['train'] if e['domain'] == 'web']
  assert len(list(source.documents('code', 'validation'))) == 2


def test_class_labels_name_domains_and_version_may_be_given(tmp_path):
  label = tfds.features.ClassLabel(names=['web', 'code'])
  prepare(tmp_path, {'text': TEXT, 'domain': label}, {'train': examples(20)})
  source = open_source(config_for(tmp_path, name='my_texts:1.0.0'))
  assert source.domains == ('code', 'web')
  train, validation = (
    {d.id for d in source.documents('web', split)} for split in ('train', 'validation')
  )
  assert len(train) + len(validation) == 10  # held out, as there is no validation split
  assert validation
  assert not train & validation


def test_without_domains_the_dataset_is_one_and_prepares(tmp_path):
  features = {'content': TEXT, 'id': TEXT, 'weight': np.float32}
  train = [{'content': words(i, 12), 'id': f'n{i}', 'weight': i / 4} for i in range(8)]
  prepare(tmp_path, features, {'train': train, 'validation': train[:2], 'test': train[2:4]})
  config = config_for(tmp_path, text_key='content')
  source = open_source(config)
  assert source.domains == ('my_texts',)
  assert source.splits == ('train', 'validation', 'test')
  documents = list(source.documents('my_texts', 'train'))
  assert [(d.id, d.text, d.weight) for d in documents] == [
    (e['id'], e['content'], e['weight']) for e in train
  ]
  corpus = open_corpus(config)
  assert corpus.meta['weights']
  assert corpus.sizes('test').sum() > 0


def test_weights_may_be_one_per_token(tmp_path):
  feature = tfds.features.Tensor(shape=(None,), dtype=np.float32)
  rows = [
    {'text': 'abc', 'weight': np.float32([0, 1, 2])},
    {'text': 'de', 'weight': np.float32([3, 4])},
  ]
  prepare(tmp_path, {'text': TEXT, 'weight': feature}, {'train': rows, 'validation': rows})
  block = open_corpus(config_for(tmp_path, seq_len=7)).read('train', 0, 0)
  assert block['weights'].tolist() == [0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
  ('feature', 'value'),
  [(np.int32, 1), (np.bool_, True), (TEXT, 'high'), (tfds.features.ClassLabel(num_classes=3), 2)],
)
def test_weights_must_be_floating(tmp_path, feature, value):
  prepare(tmp_path, {'text': TEXT, 'weight': feature}, {'train': [{'text': 'a', 'weight': value}]})
  with pytest.raises(UserError, match=r"data.weight_key='weight'.*float32") as error:
    open_source(config_for(tmp_path))
  assert '\n' not in str(error.value)
  assert open_source(config_for(tmp_path, weight_key='')).domains == ('my_texts',)


@pytest.mark.parametrize('value', [np.nan, -1.0])
def test_weights_must_be_finite_and_not_negative(tmp_path, value):
  rows = [{'text': 'a', 'weight': 1.0}, {'text': 'b', 'weight': value}]
  prepare(tmp_path, {'text': TEXT, 'weight': np.float32}, {'train': rows, 'validation': rows[:1]})
  with pytest.raises(UserError, match=r'train record 1: weight'):
    list(open_source(config_for(tmp_path)).documents('my_texts', 'train'))


def test_dataset_that_is_not_prepared(tmp_path):
  with pytest.raises(UserError, match=r"data.name='wikipedia' is not a prepared dataset") as error:
    open_source(config_for(tmp_path, name='wikipedia'))
  assert "file_format='array_record'" in str(error.value)
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match=r"data.name=''"):
    open_source(config_for(tmp_path, name=''))


def test_other_file_formats_need_preparing_again(tmp_path):
  prepare(tmp_path, {'text': TEXT}, {'train': [{'text': words(0, 9)}]})
  info = tmp_path / 'my_texts/1.0.0/dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(UserError, match=r'is not stored as array_record; prepare it again') as error:
    list(open_source(config_for(tmp_path)).documents('my_texts', 'train'))
  assert '\n' not in str(error.value)


def test_unknown_text_feature_and_domain(tmp_path):
  prepare(tmp_path, {'text': TEXT, 'domain': TEXT}, {'train': examples(4)})
  with pytest.raises(UserError, match=r"data.text_key='body' is not a feature.*domain, text"):
    open_source(config_for(tmp_path, text_key='body'))
  with pytest.raises(UserError, match=r"no domain 'wen'; did you mean 'web'"):
    open_source(config_for(tmp_path, domains=('wen',)))


def test_text_that_is_not_text(tmp_path):
  prepare(tmp_path, {'text': np.int32}, {'train': [{'text': 3}]})
  with pytest.raises(UserError, match=r'int is not text'):
    list(open_source(config_for(tmp_path)).documents('my_texts', 'train'))


def test_corrupt_shard(tmp_path):
  rows = [{'text': words(i, 300)} for i in range(40)]
  prepare(tmp_path, {'text': TEXT}, {'train': rows, 'validation': rows[:3]})
  (shard,) = (tmp_path / 'my_texts').glob('**/*train.array_record*')
  data = bytearray(shard.read_bytes())
  data[65536:70000] = bytes(b ^ 0xFF for b in data[65536:70000])
  shard.write_bytes(data)
  with pytest.raises(UserError, match=r'prepare the dataset again') as error:
    open_corpus(config_for(tmp_path))
  assert '\n' not in str(error.value)
