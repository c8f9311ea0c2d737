"""Hugging Face folders against NumPy models that read them by their own names; damage; programs."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import export_hf, train
from experiments.data.tokenizers import load_tokenizer
from experiments.errors import UserError
from experiments.mesh import make_mesh
from experiments.models import gpt2, hf, llama, lm
from tests.experiments import small

GPT2 = gpt2.GPT2Config(vocab_size=40, max_len=12, n_layer=3, n_head=4, n_embd=16, d_ff=24)
LLAMA = llama.LlamaConfig(
  vocab_size=40, max_len=12, n_layer=3, n_head=4, n_embd=16, d_ff=24, n_kv_head=2,
  rope_theta=500.0, norm_eps=1e-3,
)  # fmt: skip
MODELS = {
  'gpt2': GPT2,
  'llama': LLAMA,
  'llama, a head each': dataclasses.replace(LLAMA, n_kv_head=0, d_ff=0),
}

# What the library of theirs stores, written by hand --------------------------------------------


def gpt2_folder():
  """(config.json, tensors) of a random GPT-2; matrices are [in, out]."""
  config = dict(
    model_type='gpt2', vocab_size=40, n_positions=12, n_layer=3, n_head=4, n_embd=16, n_inner=24
  )
  shapes = {
    'wte.weight': (40, 16),
    'wpe.weight': (12, 16),
    'ln_f.weight': (16,),
    'ln_f.bias': (16,),
  }
  for i in range(3):
    for name, shape in {
      'ln_1': (16,), 'attn.c_attn': (16, 48), 'attn.c_proj': (16, 16),
      'ln_2': (16,), 'mlp.c_fc': (16, 24), 'mlp.c_proj': (24, 16),
    }.items():  # fmt: skip
      shapes |= {f'h.{i}.{name}.weight': shape, f'h.{i}.{name}.bias': shape[-1:]}
  return config, draw({f'transformer.{name}': shape for name, shape in shapes.items()})


def llama_folder():
  """(config.json, tensors) of a random Llama with two heads of keys; matrices are [out, in]."""
  config = dict(
    model_type='llama', vocab_size=40, max_position_embeddings=12, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=24,
    rope_theta=500.0, rms_norm_eps=1e-3,
  )  # fmt: skip
  shapes = {
    'model.embed_tokens.weight': (40, 16), 'model.norm.weight': (16,), 'lm_head.weight': (40, 16)
  }  # fmt: skip
  for i in range(3):
    for name, shape in {
      'input_layernorm': (16,), 'post_attention_layernorm': (16,),
      'self_attn.q_proj': (16, 16), 'self_attn.k_proj': (8, 16), 'self_attn.v_proj': (8, 16),
      'self_attn.o_proj': (16, 16), 'mlp.gate_proj': (24, 16), 'mlp.up_proj': (24, 16),
      'mlp.down_proj': (16, 24),
    }.items():  # fmt: skip
      shapes[f'model.layers.{i}.{name}.weight'] = shape
  return config, draw(shapes)


def draw(shapes):
  rng = np.random.default_rng(0)
  return {
    name: (0.4 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
    for name, shape in shapes.items()
  }


FOLDERS = {'gpt2': (gpt2_folder, GPT2), 'llama': (llama_folder, LLAMA)}


def write(folder, config, tensors, shards=1):
  """The folder as theirs writes it, the tensors dealt to some shards."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  if shards == 1:
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    return folder
  names = {name: f'model-{i % shards}.safetensors' for i, name in enumerate(sorted(tensors))}
  for file in set(names.values()):
    mine = {name: tensors[name] for name in names if names[name] == file}
    safetensors.numpy.save_file(mine, folder / file)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
  return folder


@pytest.fixture(params=sorted(FOLDERS))
def stored(request, tmp_path):
  """(folder, its model)."""
  make, model = FOLDERS[request.param]
  return write(tmp_path / 'theirs', *make()), model


# Their forward passes in NumPy ------------------------------------------------------------------


def softmax_heads(q, k, v):
  """Causal attention of one row: q [T, H, d], k and v [T, K, d] -> [T, H d]."""
  group = q.shape[1] // k.shape[1]
  out = np.zeros_like(q)
  for t in range(len(q)):
    for h in range(q.shape[1]):
      scores = k[: t + 1, h // group] @ q[t, h] / np.sqrt(q.shape[2])
      weights = np.exp(scores - scores.max())
      out[t, h] = weights @ v[: t + 1, h // group] / weights.sum()
  return out.reshape(len(q), -1)


def theirs_gpt2(config, tensors, row):
  w = {name: x.astype(np.float64) for name, x in tensors.items()}
  conv1d = lambda x, name: x @ w[f'{name}.weight'] + w[f'{name}.bias']

  def norm(x, name):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * w[f'{name}.weight'] + w[f'{name}.bias']

  x = w['transformer.wte.weight'][row] + w['transformer.wpe.weight'][: len(row)]
  for i in range(config['n_layer']):
    h = f'transformer.h.{i}'
    qkv = conv1d(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn')
    heads = [part.reshape(len(row), config['n_head'], -1) for part in np.split(qkv, 3, axis=-1)]
    x = x + conv1d(softmax_heads(*heads), f'{h}.attn.c_proj')
    up = conv1d(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    x = x + conv1d(gelu, f'{h}.mlp.c_proj')
  return norm(x, 'transformer.ln_f') @ w['transformer.wte.weight'].T


def theirs_llama(config, tensors, row):
  w = {name: x.astype(np.float64) for name, x in tensors.items()}
  head = config['hidden_size'] // config['num_attention_heads']
  linear = lambda x, name: x @ w[f'{name}.weight'].T
  rms = lambda x: np.sqrt((x**2).mean(-1, keepdims=True) + config['rms_norm_eps'])
  norm = lambda x, name: x / rms(x) * w[f'{name}.weight']
  rate = 1.0 / config['rope_theta'] ** (np.arange(0, head, 2) / head)
  angle = np.concatenate([np.outer(np.arange(len(row)), rate)] * 2, axis=-1)[:, None]
  rotate_half = lambda x: np.concatenate([-x[..., head // 2 :], x[..., : head // 2]], axis=-1)
  turn = lambda x: x * np.cos(angle) + rotate_half(x) * np.sin(angle)
  x = w['model.embed_tokens.weight'][row]
  for i in range(config['num_hidden_layers']):
    layer = f'model.layers.{i}'
    normed = norm(x, f'{layer}.input_layernorm')
    q, k, v = (
      linear(normed, f'{layer}.self_attn.{name}_proj').reshape(len(row), -1, head) for name in 'qkv'
    )
    x = x + linear(softmax_heads(turn(q), turn(k), v), f'{layer}.self_attn.o_proj')
    normed = norm(x, f'{layer}.post_attention_layernorm')
    gate = linear(normed, f'{layer}.mlp.gate_proj')
    hidden = gate / (1 + np.exp(-gate)) * linear(normed, f'{layer}.mlp.up_proj')
    x = x + linear(hidden, f'{layer}.mlp.down_proj')
  return linear(norm(x, 'model.norm'), 'lm_head')


def theirs(folder, tokens):
  """The logits of a folder by the model that its config names, in NumPy."""
  config = json.loads((folder / 'config.json').read_text())
  forward = {'gpt2': theirs_gpt2, 'llama': theirs_llama}[config['model_type']]
  tensors = {}
  for file in folder.glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(file)
  return np.stack([forward(config, tensors, row) for row in tokens])


# Ours -------------------------------------------------------------------------------------------


def read(folder, model, *sizes):
  mesh = make_mesh(*sizes) if sizes else make_mesh(devices=jax.devices()[:1])
  return hf.load(folder, model, lm.abstract(model, mesh))


@partial(jax.jit, static_argnums=2)
def ours(params, tokens, model):
  return lm.apply(params, tokens, model)


@functools.cache
def fresh(model):
  params = jax.jit(partial(lm.init, cfg=model))(jax.random.key(0))
  noise = lambda leaf: 0.3 * np.random.default_rng(leaf.size).standard_normal(leaf.shape)
  return jax.tree.map(lambda leaf: leaf + noise(leaf).astype(np.float32), params)


TOKENS = np.random.default_rng(1).integers(0, 40, (2, 11)).astype(np.int32)
assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(b))


def test_a_folder_of_theirs_has_their_logits(stored):
  folder, model = stored
  logits = theirs(folder, TOKENS)
  assert np.std(logits) > 0.5
  assert_close(ours(read(folder, model), TOKENS, model), logits)


@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_a_folder_of_ours_has_our_logits(tmp_path, model):
  params = fresh(model)
  hf.save(tmp_path / 'out', params, model, eot_id=39)
  assert_close(theirs(tmp_path / 'out', TOKENS), ours(params, TOKENS, model))


@pytest.mark.parametrize('shard_bytes', [10**9, 20_000, 1], ids='one some each'.split())
@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_round_trip_bit_for_bit(tmp_path, model, shard_bytes):
  params = fresh(model)
  hf.save(tmp_path / 'out', params, model, eot_id=39, shard_bytes=shard_bytes)
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
  assert sum(sizes) == 4 * model.num_params()
  if shard_bytes == 1:
    assert len(files) == (3 * 12 + 4 if model is GPT2 else 3 * 9 + 3)
  else:
    assert max(sizes) <= shard_bytes
    assert (len(files) == 1) == (shard_bytes == 10**9)
  assert_same_bits(params, read(tmp_path / 'out', model))


def test_sixteen_bits_are_the_nearest(tmp_path):
  params = fresh(GPT2)
  hf.save(tmp_path / 'out', params, GPT2, eot_id=39, dtype='bfloat16')
  rounded = jax.tree.map(lambda x: x.astype('bfloat16').astype('float32'), params)
  assert_same_bits(rounded, read(tmp_path / 'out', GPT2))
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'
  assert config['eos_token_id'] == config['bos_token_id'] == 39


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_mesh_holds_the_same_parameters(stored, sizes):
  folder, model = stored
  placed = read(folder, model, *sizes)
  assert_same_bits(read(folder, model), placed)
  abstract = lm.abstract(model, make_mesh(*sizes))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, placed, abstract)))
  kernel = placed['blocks']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])


def test_only_the_slices_of_a_shard_are_read(stored, monkeypatch):
  """The largest array in memory is a device's part, not the tensor."""
  folder, model = stored
  largest, read_part = [], hf._Tensor.read

  def spy(self, index, dtype):
    part = read_part(self, index, dtype)
    if 'mlp' in self.where:
      largest.append(part.size)
    return part

  monkeypatch.setattr(hf._Tensor, 'read', spy)
  read(folder, model, 1, 4, 2)
  assert max(largest) == 16 * 24 // 8


def test_shards_of_theirs(tmp_path):
  config, tensors = llama_folder()
  whole = write(tmp_path / 'whole', config, tensors)
  parts = write(tmp_path / 'parts', config, tensors, shards=4)
  assert_same_bits(read(whole, LLAMA), read(parts, LLAMA))


def test_variants_of_their_gpt2(tmp_path):
  """Without a prefix, with the output layer beside the table, with masks, with n_inner null."""
  config, tensors = gpt2_folder()
  expected = read(write(tmp_path / 'a', config, tensors), GPT2)
  bare = {name.removeprefix('transformer.'): x for name, x in tensors.items()}
  bare |= {'h.0.attn.bias': np.ones((1, 1, 12, 12), np.float32)}
  assert_same_bits(expected, read(write(tmp_path / 'b', config, bare), GPT2))
  headed = {**tensors, 'lm_head.weight': tensors['transformer.wte.weight']}
  assert_same_bits(expected, read(write(tmp_path / 'c', config, headed), GPT2))
  (tmp_path / 'c/config.json').write_text(json.dumps({**config, 'n_inner': None}))
  assert hf.model_keys(tmp_path / 'c')['d_ff'] == 64


def test_variants_of_their_llama(tmp_path):
  """The base of rotary positions among its parameters; entries that old configs lack."""
  config, tensors = llama_folder()
  theta = config.pop('rope_theta')
  config['rope_parameters'] = {'rope_theta': theta, 'rope_type': 'default'}
  old = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(2, np.float32)}
  folder = write(tmp_path / 'a', config | {'head_dim': 4}, tensors | old)
  assert_close(
    ours(read(folder, LLAMA), TOKENS, LLAMA),
    theirs(write(tmp_path / 'b', config | {'rope_theta': theta}, tensors), TOKENS),
  )
  for key in ('rope_parameters', 'num_key_value_heads', 'rms_norm_eps'):
    config.pop(key)
  (folder / 'config.json').write_text(json.dumps(config))
  keys = hf.model_keys(folder)
  assert (keys['rope_theta'], keys['n_kv_head'], keys['norm_eps']) == (10_000.0, 4, 1e-6)


# What is refused --------------------------------------------------------------------------------


def refused(folder, model, *words):
  with pytest.raises(UserError) as error:
    read(folder, model)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  ('family', 'changes', 'words'),
  [
    ('gpt2', {'model_type': 'mamba'}, ("model_type='mamba'", 'gpt2 or llama')),
    ('gpt2', {'activation_function': 'relu'}, ("activation_function='relu'", 'gelu_new')),
    ('gpt2', {'layer_norm_epsilon': 1e-6}, ('layer_norm_epsilon=1e-06',)),
    ('gpt2', {'tie_word_embeddings': False}, ('tie_word_embeddings=False',)),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, ('scale_attn_by_inverse_layer_idx',)),
    ('gpt2', {'n_embd': 0}, ('n_embd is 0',)),
    ('gpt2', {'vocab_size': '40'}, ("vocab_size is '40'",)),
    ('llama', {'hidden_act': 'gelu'}, ("hidden_act='gelu'", 'silu')),
    ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2}}, ('rope_scaling', 'linear')),
    ('llama', {'rope_parameters': {'rope_type': 'llama3'}}, ('rope_parameters', 'llama3')),
    ('llama', {'tie_word_embeddings': True}, ('tie_word_embeddings=True',)),
    ('llama', {'attention_bias': True}, ('attention_bias=True',)),
    ('llama', {'mlp_bias': True}, ('mlp_bias=True',)),
    ('llama', {'sliding_window': 4096}, ('sliding_window=4096',)),
    ('llama', {'head_dim': 8}, ('head_dim=8', '4')),
  ],
)
def test_what_would_compute_other_numbers_is_refused(tmp_path, family, changes, words):
  make, model = FOLDERS[family]
  config, tensors = make()
  refused(write(tmp_path, config | changes, tensors), model, 'config.json', *words)


def test_another_architecture_is_named_key_by_key(stored):
  folder, model = stored
  other = dataclasses.replace(model, n_layer=2, d_ff=20)
  words = ('model.n_layer is 3 there and 2 here', 'model.d_ff is 24 there and 20 here')
  refused(folder, other, *words, f'export_hf --describe={folder}')
  refused(folder, LLAMA if model is GPT2 else GPT2, 'model.name is', 'there')


def test_tensors_that_do_not_fit_are_named(tmp_path):
  config, tensors = llama_folder()
  name = 'model.layers.1.mlp.up_proj.weight'
  with_nan = tensors[name].copy()
  with_nan[3, 5] = np.nan
  for i, (changed, words) in enumerate(
    [
      ({k: v for k, v in tensors.items() if k != name}, ('no tensor', name)),
      ({**tensors, 'model.extra.weight': tensors[name]}, ('model.extra.weight', 'not a parameter')),
      ({**tensors, name: tensors[name].T.copy()}, (name, '[16, 24]', '[24, 16]')),
      ({**tensors, name: tensors[name].astype(np.int32)}, (name, 'I32', 'BF16')),
      ({**tensors, name: with_nan}, (name, 'NaN')),
    ]
  ):
    refused(write(tmp_path / str(i), config, changed), LLAMA, *words)


def test_an_untied_gpt2_is_refused(tmp_path):
  config, tensors = gpt2_folder()
  head = tensors['transformer.wte.weight'].copy()
  head[0, 0] += 1
  folder = write(tmp_path, config, {**tensors, 'lm_head.weight': head})
  refused(folder, GPT2, 'lm_head.weight', 'not the token table')


@pytest.mark.parametrize('keep', [0, 4, 40, 0.5, -4])
def test_truncated_files(stored, keep):
  folder, model = stored
  file = folder / 'model.safetensors'
  data = file.read_bytes()
  file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
  refused(folder, model, str(file), 'cannot be read')


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda m: m.update({'lm_head.weight': '../model-0.safetensors'}), ("'../model-0", 'no file')),
    (lambda m: m.update({'lm_head.weight': '/tmp/model-0.safetensors'}), ('no file',)),
    (lambda m: m.update({'lm_head.weight': 7}), ('lm_head.weight', '7')),
    (lambda m: m.update({'lm_head.weight': 'model-9.safetensors'}), ('model-9', 'missing')),
    (lambda m: m.update({'absent.weight': 'model-0.safetensors'}), ('absent.weight', 'no shard')),
    (lambda m: m.pop('lm_head.weight'), ('lm_head.weight', 'index')),
    (lambda m: m.clear(), ('weight_map',)),
  ],
)
def test_an_index_that_is_wrong(tmp_path, change, words):
  folder = write(tmp_path / 'theirs', *llama_folder(), shards=3)
  shutil.copy(folder / 'model-0.safetensors', tmp_path / 'model-0.safetensors')
  index = folder / 'model.safetensors.index.json'
  stored = json.loads(index.read_text())
  change(stored['weight_map'])
  index.write_text(json.dumps(stored))
  refused(folder, LLAMA, *words)
  index.write_text(index.read_text()[:-20])
  refused(folder, LLAMA, 'index.json', 'JSON')
  index.write_text('[]')
  refused(folder, LLAMA, 'index.json', 'weight_map')


def test_folders_without_what_they_need(tmp_path):
  folder = write(tmp_path, *gpt2_folder())
  (folder / 'config.json').rename(folder / 'other.json')
  refused(folder, GPT2, 'config.json')
  (folder / 'config.json').write_text('{"model_type": "gpt2"}')
  refused(folder, GPT2, 'config.json', 'vocab_size')
  (folder / 'other.json').rename(folder / 'config.json')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  assert hf.is_folder(folder)
  refused(folder, GPT2, 'model.safetensors', 'as safetensors')


def test_an_export_never_overwrites(tmp_path):
  (tmp_path / 'file').write_text('mine')
  for taken in (tmp_path, tmp_path / 'file'):
    with pytest.raises(UserError, match='not an empty folder'):
      hf.save(taken, fresh(GPT2), GPT2, eot_id=39)
  assert (tmp_path / 'file').read_text() == 'mine'


# Programs ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(folder of the test, config of a finished run of a BPE Llama, its directory)."""
  root = tmp_path_factory.mktemp('hf')
  config = small.config(small.write_corpus(root / 'corpus'), root / 'data', steps=2)
  config.data.tokenizer = 'bpe:300'
  config.model.update(name='llama', n_kv_head=1, d_ff=48)
  train.train(config, root / 'run')
  return root, config, root / 'run'


def test_from_a_run_to_a_folder_and_back(finished, capsys):
  root, config, run = finished
  folder = export_hf.export(str(run), str(root / 'out'))
  described = dict(line[9:].split('=') for line in export_hf.describe(str(folder)).splitlines())
  tokenizer = load_tokenizer(described['data.tokenizer'])
  stored = json.loads((folder / 'config.json').read_text())
  assert stored['eos_token_id'] == tokenizer.eot_id
  assert described == {
    'model.name': 'llama',
    'model.vocab_size': str(tokenizer.vocab_size),
    'model.n_layer': '2',
    'model.n_head': '2',
    'model.n_kv_head': '1',
    'model.n_embd': '32',
    'model.d_ff': '48',
    'model.rope_theta': '10000.0',
    'model.norm_eps': '1e-05',
    'data.tokenizer': str(folder / 'tokenizer.json'),
    'checkpoint.init_from': str(folder),
  }
  losses = {}
  for source in (str(run), str(folder)):
    again = config.copy_and_resolve_references()
    again.checkpoint.init_from = source
    again.data.tokenizer = described['data.tokenizer']
    again.total_steps = 1
    workdir = root / f'from {"folder" if source == str(folder) else "run"}'
    losses[source] = train.train(again, workdir)['final']
    assert f'parameters from {source}' in capsys.readouterr().out
  assert losses[str(run)] == losses[str(folder)]


def test_another_model_is_refused_before_training(finished):
  root, config, run = finished
  folder = export_hf.export(str(run), str(root / 'refused'), 'bfloat16')
  config = config.copy_and_resolve_references()
  config.checkpoint.init_from = str(folder)
  config.model.n_layer = 1
  with pytest.raises(UserError, match=r'model\.n_layer is 2 there and 1 here'):
    train.train(config, root / 'never')


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (('', 'x'), '--workdir is missing'),
    (('runs', ''), '--out is missing'),
    (('runs', 'x', 'float8'), '--dtype=float8'),
  ],
)
def test_mistakes_on_the_command_line(arguments, words):
  with pytest.raises(UserError, match=words):
    export_hf.export(*arguments)
