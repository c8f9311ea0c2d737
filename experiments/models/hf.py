"""Weights as the Hugging Face library stores them, both ways and without that library.

A folder of theirs holds `config.json` and either `model.safetensors` or shards of it with an index.
Linear layers of their Llama are stored [out, in], those of their GPT-2 [in, out] as ours are; their
GPT-2 has its output layer in the token table; both order the entries of a head as ours do. Whatever
would compute other numbers here than there (scaled rotary positions, other activations, biases) is
refused by name, and so is a tensor that is missing, unknown, of another shape or not finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from experiments import files
from experiments.errors import UserError
from experiments.models import FAMILIES, gpt2, llama
from experiments.models.lm import ModelConfig, Params

CONFIG, SINGLE, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9
_HEAD = 'lm_head.weight'
_DTYPES = ('F32', 'F16', 'BF16')


class Family(NamedTuple):
  """How a family is spelled there.

  Attributes:
    architecture: the class of theirs.
    from_json: (config.json) -> the keys of config.model, but for the name; KeyError names one that
      is missing.
    to_json: (architecture) -> the entries of config.json that `from_json` reads.
    fixed: entries that compute what ours does; the first value is the one when there is none.
    ends, block: path of ours -> name there, of one layer.
    blocks: what precedes the names of a layer, '{}' its number.
    prefix: of all names but the output layer's; files of the bare model lack it.
    turned: whether kernels are [out, in] there.
    ignored: names of what old files hold beside parameters.
  """

  architecture: str
  from_json: Callable[[Mapping[str, Any]], dict[str, Any]]
  to_json: Callable[[Any], dict[str, Any]]
  fixed: Mapping[str, tuple]
  ends: Mapping[str, str]
  blocks: str
  block: Mapping[str, str]
  prefix: str
  turned: bool
  ignored: str


def _affine(ours: str, theirs: str, scale: str = 'kernel') -> dict[str, str]:
  return {f'{ours}/{scale}': f'{theirs}.weight', f'{ours}/bias': f'{theirs}.bias'}


def _gpt2_from_json(stored):
  names = {'max_len': 'n_positions', 'n_layer': 'n_layer', 'n_head': 'n_head', 'n_embd': 'n_embd'}
  keys = {ours: stored[theirs] for ours, theirs in names.items()}
  return keys | {'d_ff': stored.get('n_inner') or 4 * keys['n_embd']}


def _gpt2_to_json(model: gpt2.GPT2Config):
  return {
    'n_positions': model.max_len,
    'n_layer': model.n_layer,
    'n_head': model.n_head,
    'n_embd': model.n_embd,
    'n_inner': model.hidden,
    'embd_pdrop': model.dropout,
    'resid_pdrop': model.dropout,
    'attn_pdrop': 0.0,
  }


def _llama_from_json(stored):
  rope = stored.get('rope_parameters') or stored
  return {
    'n_layer': stored['num_hidden_layers'],
    'n_head': stored['num_attention_heads'],
    'n_kv_head': stored.get('num_key_value_heads') or stored['num_attention_heads'],
    'n_embd': stored['hidden_size'],
    'd_ff': stored['intermediate_size'],
    'rope_theta': rope.get('rope_theta', 10_000.0),
    'norm_eps': stored.get('rms_norm_eps', 1e-6),
  }


def _llama_to_json(model: llama.LlamaConfig):
  return {
    'num_hidden_layers': model.n_layer,
    'num_attention_heads': model.n_head,
    'num_key_value_heads': model.kv_heads,
    'hidden_size': model.n_embd,
    'intermediate_size': model.hidden,
    'rope_theta': model.rope_theta,
    'rms_norm_eps': model.norm_eps,
    'max_position_embeddings': model.max_len,
  }


SPELLED = {
  'gpt2': Family(
    architecture='GPT2LMHeadModel',
    from_json=_gpt2_from_json,
    to_json=_gpt2_to_json,
    fixed={
      'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
      'layer_norm_epsilon': (1e-5,),
      'scale_attn_weights': (True,),
      'scale_attn_by_inverse_layer_idx': (False,),
      'add_cross_attention': (False,),
      'tie_word_embeddings': (True,),
    },
    ends={
      'wte/embedding': 'transformer.wte.weight',
      'wpe/embedding': 'transformer.wpe.weight',
      **_affine('ln_f', 'transformer.ln_f', 'scale'),
    },
    blocks='transformer.h.{}.',
    block={
      **_affine('ln_1', 'ln_1', 'scale'),
      **_affine('attn/qkv', 'attn.c_attn'),
      **_affine('attn/out', 'attn.c_proj'),
      **_affine('ln_2', 'ln_2', 'scale'),
      **_affine('mlp/up', 'mlp.c_fc'),
      **_affine('mlp/down', 'mlp.c_proj'),
    },
    prefix='transformer.',
    turned=False,
    ignored=r'\.attn\.(masked_)?bias$',
  ),
  'llama': Family(
    architecture='LlamaForCausalLM',
    from_json=_llama_from_json,
    to_json=_llama_to_json,
    fixed={
      'hidden_act': ('silu',),
      'rope_scaling': (None,),
      'sliding_window': (None,),
      'attention_bias': (False,),
      'mlp_bias': (False,),
      'tie_word_embeddings': (False,),
    },
    ends={
      'wte/embedding': 'model.embed_tokens.weight',
      'ln_f/scale': 'model.norm.weight',
      'head/embedding': _HEAD,
    },
    blocks='model.layers.{}.',
    block={
      'ln_1/scale': 'input_layernorm.weight',
      'attn/q/kernel': 'self_attn.q_proj.weight',
      'attn/k/kernel': 'self_attn.k_proj.weight',
      'attn/v/kernel': 'self_attn.v_proj.weight',
      'attn/out/kernel': 'self_attn.o_proj.weight',
      'ln_2/scale': 'post_attention_layernorm.weight',
      'mlp/gate/kernel': 'mlp.gate_proj.weight',
      'mlp/up/kernel': 'mlp.up_proj.weight',
      'mlp/down/kernel': 'mlp.down_proj.weight',
    },
    prefix='model.',
    turned=True,
    ignored=r'\.rotary_emb\.inv_freq$',
  ),
}


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a folder holds weights of this kind rather than a run."""
  return any(Path(path).glob('*.safetensors*')) or any(Path(path).glob('pytorch_model*'))


# Configs ----------------------------------------------------------------------------------------


def model_keys(folder: str | os.PathLike) -> dict[str, Any]:
  """The keys of config.model that decide whether a model fits the folder: name, n_layer, ...

  Raises:
    UserError: no such config, or a model that ours do not compute.
  """
  path = Path(folder) / CONFIG
  stored = files.read_json(path)
  name = stored.get('model_type') if isinstance(stored, dict) else None
  if name not in SPELLED:
    raise UserError(f'{path}: model_type={name!r} is not supported: use {" or ".join(SPELLED)}')
  family = SPELLED[name]
  try:
    keys = {'vocab_size': stored['vocab_size'], **family.from_json(stored)}
  except KeyError as error:
    raise UserError(f'{path} has no {error.args[0]}; fetch the folder again') from error
  for key, value in keys.items():
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
      raise UserError(f'{path}: its {key} is {value!r}, not a positive number; fetch it again')
  supported = {**family.fixed, 'head_dim': (None, keys['n_embd'] // keys['n_head'])}
  for key, values in supported.items():
    if (value := stored.get(key, values[0])) not in values:
      shown = ' or '.join(map(repr, values))
      raise UserError(f'{path}: {key}={value!r} is not supported, only {shown}; use another model')
  rope = stored.get('rope_parameters') or {}
  if rope.keys() - {'rope_theta', 'rope_type'} or rope.get('rope_type', 'default') != 'default':
    raise UserError(
      f'{path}: rope_parameters={rope} are not supported: use a model without scaling'
    )
  return {'name': name, **keys}


def check_fits(folder: str | os.PathLike, model: ModelConfig) -> Family:
  """How the family of `model` is spelled, if the folder holds a model of that architecture.

  Raises:
    UserError: names every key that differs.
  """
  there, name = model_keys(folder), _name(model)
  here = {**dataclasses.asdict(model), 'name': name, 'd_ff': model.hidden}
  if name == 'llama':
    here['n_kv_head'] = model.kv_heads
  keys = there if there['name'] == name else ['name']
  if differing := [key for key in keys if there[key] != here[key]]:
    shown = ', '.join(f'model.{k} is {there[k]!r} there and {here[k]!r} here' for k in differing)
    raise UserError(
      f'{folder} is of another architecture: {shown}; the keys that fit are printed by '
      f'python -m experiments.export_hf --describe={folder}'
    )
  return SPELLED[name]


def _name(model: ModelConfig) -> str:
  return next(name for name, kind in FAMILIES.items() if isinstance(model, kind))


# Names ------------------------------------------------------------------------------------------


class _Place(NamedTuple):
  """Where a parameter of ours lies there: the name, or one for each layer."""

  names: list[str]
  layered: bool
  turned: bool

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of each of its tensors."""
    ours = ours[1:] if self.layered else ours
    return ours[::-1] if self.turned else ours


def _place(path: Any, leaf: Any, family: Family) -> _Place:
  ours = jax.tree_util.keystr(path, simple=True, separator='/')
  if not ours.startswith('blocks/'):
    return _Place([family.ends[ours]], layered=False, turned=False)
  ours = ours.removeprefix('blocks/')
  names = [family.blocks.format(i) + family.block[ours] for i in range(leaf.shape[0])]
  return _Place(names, layered=True, turned=family.turned and ours.endswith('/kernel'))


def _places(tree: Any, family: Family) -> list[tuple[_Place, Any]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(_place(path, leaf, family), leaf) for path, leaf in leaves]


# In ---------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike, model: ModelConfig, abstract: Any) -> Params:
  """Reads parameters slice by slice into the shards that they are to have.

  Args:
    folder: `config.json` and safetensors of 32 or 16 bits.
    model: must be of the same architecture.
    abstract: a pytree of `jax.ShapeDtypeStruct` with shardings, in the structure of `lm.init`.

  Raises:
    UserError: of another architecture, incomplete or damaged; names the tensor.
  """
  family = check_fits(folder, model)
  with _tensors(Path(folder), family) as tensors:
    _check(Path(folder), tensors, abstract, family)

    def read(path, leaf):
      place = _place(path, leaf, family)

      def part(index):
        if not place.layered:
          return tensors[place.names[0]].read(index, leaf.dtype)
        layers, index = place.names[index[0]], index[1:]
        index = index[::-1] if place.turned else index
        arrays = [tensors[name].read(index, leaf.dtype) for name in layers]
        return np.stack([x.T for x in arrays] if place.turned else arrays)

      return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(read, abstract)


class _Tensor(NamedTuple):
  """A tensor in a file, not read yet."""

  where: str
  data: Any  # of safetensors

  def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    array = self.data[index].astype(dtype)
    if not np.isfinite(array).all():
      raise UserError(f'{self.where} holds NaN or infinity; fetch it again or use another model')
    return array


@contextlib.contextmanager
def _tensors(folder: Path, family: Family) -> Iterator[dict[str, _Tensor]]:
  """{name: tensor} of all files of a folder, its index checked against them."""
  index = _index(folder)
  with contextlib.ExitStack() as stack:
    found, shards = {}, {}
    for shard in sorted(set(index.values())) or [SINGLE]:
      path = folder / shard
      if not path.is_file():
        raise UserError(f'{path} is missing; fetch the whole folder again')
      try:
        file = stack.enter_context(safetensors.safe_open(path, 'numpy'))
      except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f'{path} cannot be read ({error}); fetch it again') from error
      for name in file.keys():  # noqa: SIM118
        bare = name != _HEAD and not name.startswith(family.prefix)
        full = family.prefix + name if bare else name
        found[full] = _Tensor(f'{path}: {name}', file.get_slice(name))
        shards[name] = shard
    for name in sorted(index.keys() ^ shards.keys()) if index else ():
      lacking = 'no shard' if name in index else INDEX
      raise UserError(f'{folder}: {name} is not in {lacking}; fetch the whole folder again')
    yield found


def _index(folder: Path) -> dict[str, str]:
  """{tensor: file}; empty where all is in one file."""
  path = folder / INDEX
  if (folder / SINGLE).is_file():
    return {}
  if not path.is_file():
    raise UserError(f'{folder} has neither {SINGLE} nor {INDEX}; save the model as safetensors')
  stored = files.read_json(path)
  found = stored.get('weight_map') if isinstance(stored, dict) else None
  if not isinstance(found, dict) or not found:
    raise UserError(f'{path} has no weight_map; fetch it again')
  for name, shard in found.items():
    if not isinstance(shard, str) or not re.fullmatch(r'[\w.-]+\.safetensors', shard):
      raise UserError(f'{path}: {name} is in {shard!r}, which is no file of this folder')
  return found


def _check(folder: Path, tensors: Mapping[str, _Tensor], abstract: Any, family: Family) -> None:
  """Whether the tensors are those of the model, before any of them is read."""
  expected = {
    name: place.shape(leaf.shape)
    for place, leaf in _places(abstract, family)
    for name in place.names
  }
  tied = _HEAD not in expected
  table = family.ends['wte/embedding']
  if tied and _HEAD in tensors:
    expected[_HEAD] = expected[table]
  for name in sorted(expected.keys() - tensors.keys()):
    raise UserError(f'{folder} has no tensor {name}; fetch the whole folder again')
  for name, tensor in sorted(tensors.items()):
    if name not in expected:
      if re.search(family.ignored, name):
        continue
      raise UserError(f'{tensor.where} is not a parameter of this architecture; use another model')
    shape, dtype = tuple(tensor.data.get_shape()), tensor.data.get_dtype()
    if shape != expected[name]:
      raise UserError(
        f'{tensor.where} is {list(shape)}, not {list(expected[name])}; fetch it again'
      )
    if dtype not in _DTYPES:
      raise UserError(f'{tensor.where} is of type {dtype}, not one of {", ".join(_DTYPES)}')
  if (
    tied and _HEAD in tensors and not np.array_equal(*(tensors[n].data[:] for n in (table, _HEAD)))
  ):
    raise UserError(
      f'{tensors[_HEAD].where} is not the token table; use a model whose embeddings are tied'
    )


# Out --------------------------------------------------------------------------------------------


def save(
  folder: str | os.PathLike,
  params: Params,
  model: ModelConfig,
  *,
  eot_id: int,
  dtype: str = 'float32',
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes `config.json`, as the last file, and the parameters.

  Args:
    folder: created when missing.
    params: arrays that this process holds whole.
    model: their architecture.
    eot_id: the token before and after each document.
    dtype: 'float32', which loses nothing, or 'bfloat16'.
    shard_bytes: a file holds no more, unless one tensor does.

  Raises:
    UserError: the folder holds something, or cannot be written.
  """
  folder, name, family = Path(folder), _name(model), SPELLED[_name(model)]
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f'{folder} is there and not an empty folder; choose another name')
  dtype = jnp.dtype(dtype)
  shards, size = [{}], 0
  for place, leaf in _places(params, family):
    each = leaf.size // len(place.names) * dtype.itemsize
    for layer, tensor in enumerate(place.names):
      if shards[-1] and size + each > shard_bytes:
        shards.append({})
        size = 0
      shards[-1][tensor] = (leaf, layer if place.layered else ..., place.turned)
      size += each
  weight_map = {}
  for number, shard in enumerate(shards, start=1):
    file = SINGLE if len(shards) == 1 else f'model-{number:05}-of-{len(shards):05}.safetensors'
    _write(folder / file, {tensor: _turned(*found, dtype) for tensor, found in shard.items()})
    weight_map |= dict.fromkeys(shard, file)
  if len(shards) > 1:
    total = sum(leaf.size for leaf in jax.tree.leaves(params)) * dtype.itemsize
    stored = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    files.write_json(folder / INDEX, stored)
  config = {
    'model_type': name,
    'architectures': [family.architecture],
    'vocab_size': model.vocab_size,
    **family.to_json(model),
    **{key: values[0] for key, values in family.fixed.items()},
    'bos_token_id': eot_id,
    'eos_token_id': eot_id,
    'torch_dtype': dtype.name,
  }
  files.write_text(folder / CONFIG, json.dumps(config, indent=2) + '\n')


def _turned(leaf: jax.Array, layer: Any, turned: bool, dtype: Any) -> np.ndarray:
  array = np.asarray(leaf)[layer]
  return np.ascontiguousarray((array.T if turned else array).astype(dtype))


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
  with files.replacing(path) as temporary:
    try:
      safetensors.numpy.save_file(tensors, temporary, metadata={'format': 'pt'})
    except safetensors.SafetensorError as error:
      raise UserError(
        f'cannot write {path} ({error}); free space or choose another folder'
      ) from error
