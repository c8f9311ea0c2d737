"""Configs as data: load a file, check every value, store as JSON, compare. Never imports jax."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import common
from experiments import files
from experiments.config_rules import RULES, are_names, is_text
from experiments.errors import UserError

# Keys that change what is logged, kept or where, never a parameter or a score. A run may be resumed
# with others, and `config_hash` ignores them.
HARMLESS = (
  'checkpoint.best',
  'checkpoint.every',
  'checkpoint.keep',
  'checkpoint.keep_every',
  'data.prefetch',
  'data.root',
  'data.tfds_dir',
  'eval.every',
  'log',
  'mesh',
)


# Loading


def load(spec: str) -> ConfigDict:
  """Loads `path/to/file.py[:arg]`, the value of `--config`, and checks its keys and types.

  Raises:
    UserError: no such file, a mistake inside it, an unknown argument, key or type.
  """
  config = _call(spec, 'get_config')
  if not isinstance(config, ConfigDict):
    path = spec.partition(':')[0]
    raise UserError(f'{path}: get_config() must return a ConfigDict, got {type(config).__name__}')
  check_schema(config)
  return config


def arms(spec: str) -> dict[str, str]:
  """{name: arm} of the comparison that a config file is made for, its `get_arms`; {} without one.

  Raises:
    UserError: as `load`.
  """
  found = _call(spec, 'get_arms', lambda arg: {})
  if not isinstance(found, dict) or not all(isinstance(arm, str) for arm in found.values()):
    path = spec.partition(':')[0]
    raise UserError(f'{path}: get_arms() must return a dict of names and arms, got {found!r}')
  return found


def sweep(spec: str) -> list[dict[str, Any]]:
  """The units that a config file's `sweep(add)` adds, in that order; none without one.

  Raises:
    UserError: as `load`.
  """
  units: list[dict[str, Any]] = []
  _call(spec, 'sweep', lambda add: None, lambda **unit: units.append(unit))
  return units


def _call(
  spec: str, name: str, default: Callable[[Any], Any] | None = None, argument: Any = None
) -> Any:
  """What a function of the config file returns, for the argument behind the colon unless given."""
  path, _, arg = spec.partition(':')
  if not os.path.isfile(path):
    known = ', '.join(map(str, config_files()))
    raise UserError(f'--config={path}: no such file' + (f'; there is {known}' if known else ''))
  try:
    module_spec = importlib.util.spec_from_file_location('_config_file', path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name) if default is None else getattr(module, name, default)
    return function(arg if argument is None else argument)
  except common.ConfigError as e:
    raise UserError(f'--config={spec}: {e}') from e
  except Exception as e:  # whatever the user's file raises is the user's to fix
    raise UserError(f'{path}{_line_in(path, e)}: {type(e).__name__}: {one_line(e)}') from e


def _line_in(path: str, error: Exception) -> str:
  if isinstance(error, SyntaxError):
    return f', line {error.lineno}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if os.path.realpath(f.filename) == os.path.realpath(path)]
  return f', line {lines[-1]}' if lines else ''


def one_line(error: Exception) -> str:
  """The message of an exception with all white space folded; a KeyError without its quotes."""
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  return ' '.join(str(text).split())


def config_files() -> list[Path]:
  """The configs that the current folder offers."""
  candidates = sorted(Path('configs').glob('*.py'))
  return [p for p in candidates if '\ndef get_config(' in p.read_text(encoding='utf-8')]


def describe(path: str | os.PathLike) -> str:
  """The docstring of a config file, read without running it; '' if it has none."""
  return ast.get_docstring(ast.parse(Path(path).read_text(encoding='utf-8'))) or ''


# Flat view


def flatten(config: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'optim.lr': 0.003, ...}, sorted by name; an empty subtree is a value."""
  flat = {}
  for key in sorted(config):
    value = config[key]
    if isinstance(value, (Mapping, ConfigDict)) and len(value):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = {} if isinstance(value, ConfigDict) else value
  return flat


def diff(a: Mapping, b: Mapping) -> dict[str, tuple[Any, Any]]:
  """{key: (value in a, value in b)} where the two differ; None where one lacks the key."""
  a, b = flatten(a), flatten(b)
  missing = object()
  return {
    key: (a.get(key), b.get(key))
    for key in sorted(a.keys() | b.keys())
    if a.get(key, missing) != b.get(key, missing)
  }


def is_harmless(key: str) -> bool:
  """Whether a finished or resumed run stays the same run when `key` changes; see HARMLESS."""
  return any(key == k or key.startswith(f'{k}.') for k in HARMLESS)


# Checking


def check(config: ConfigDict) -> None:
  """Finds every mistake that can be seen without data or devices, before anything is imported.

  Raises:
    UserError: names the first wrong field, its value and the fix.
  """
  check_schema(config)
  flat = flatten(config)
  for key, value in flat.items():
    strings = [v for v in (value if isinstance(value, tuple) else [value]) if isinstance(v, str)]
    if not all(map(is_text, strings)):
      raise UserError(
        f'config.{key}={value!r}: must be UTF-8 text without NUL; choose another name'
      )
  for key, rule in RULES.items():
    if not rule.holds(flat[key]):
      raise UserError(f'config.{key}={flat[key]!r}: must be {rule.text}')
  _check_weighting(config)
  _check_mixture(config)
  _check_together(config)


def check_schema(config: ConfigDict) -> None:
  """Every key of `base_config` and no other, each of its type; `w` and `mixture.args` are open.

  Raises:
    UserError: names the first unknown, missing or mistyped key.
  """
  known = {k: v for k, v in flatten(common.base_config()).items() if not _is_open(k)}
  found = {k: v for k, v in flatten(config).items() if not _is_open(k)}
  for key in found:
    if key not in known:
      raise UserError(unknown_key(key, known))
  for key, default in known.items():
    if key not in found:
      raise UserError(f'config.{key} is missing; start from configs.common.base_config()')
    if type(found[key]) is not type(default):
      raise UserError(wrong_type(key, found[key], default))
  for key, group in (('w', config.w), ('mixture.args', config.mixture.args)):
    if not isinstance(group, ConfigDict):
      raise UserError(f'config.{key}={group!r}: must be a ConfigDict')


def _is_open(key: str) -> bool:
  """Whether a key is for a method to judge: its names are not those of `base_config`."""
  return any(key == part or key.startswith(f'{part}.') for part in ('w', 'mixture.args'))


def unknown_key(key: str, known: Mapping) -> str:
  """The message for a key that does not exist, with the nearest one that does."""
  return f'config.{key}: no such key{common.nearest(key, known)}'


def wrong_type(key: str, value: Any, default: Any) -> str:
  """The message for a value whose type is not that of the key's default."""
  return f'config.{key}={value!r}: must be of type {type(default).__name__}, such as {default!r}'


def _check_weighting(config: ConfigDict) -> None:
  order, specs = config.weighting, config.w
  if not order or not are_names(order):
    raise UserError(f"config.weighting={order!r}: must be distinct stage names, such as ('loss',)")
  for name in order:
    if not isinstance(specs.get(name), ConfigDict) or 'fn' not in specs[name]:
      raise UserError(
        f'config.weighting names {name!r}, so config.w.{name}.fn must name a weighting'
      )
  for name in specs:
    if name not in order:
      raise UserError(
        f'config.w.{name} is never used: add {name!r} to config.weighting or delete it'
      )


def _check_mixture(config: ConfigDict) -> None:
  mixture = config.mixture
  if not mixture.fn:
    if mixture.args:
      raise UserError(
        f"config.mixture.args={dict(mixture.args)!r} is never used: config.mixture.fn=''"
      )
    return
  if config.microbatches > 1 and config.scope != 'global':
    raise UserError(
      f"config.mixture.fn={mixture.fn!r} must see the whole step: use scope='global', not "
      f'{config.scope!r}, or microbatches=1'
    )


def _check_together(config: ConfigDict) -> None:
  data, model, optim = config.data, config.model, config.optim
  if data.source == 'folder' and not os.path.isdir(data.path):
    raise UserError(
      f"config.data.path={data.path!r}: data.source='folder' needs an existing folder"
    )
  if data.source == 'tfds' and not data.name:
    raise UserError("config.data.name='': data.source='tfds' needs a dataset's name, 'my_ds:1.0.0'")
  if config.batch_size % config.microbatches:
    raise UserError(
      f'config.batch_size={config.batch_size} must be a multiple of '
      f'config.microbatches={config.microbatches}'
    )
  if model.n_embd % model.n_head:
    raise UserError(
      f'config.model.n_embd={model.n_embd} must be a multiple of config.model.n_head={model.n_head}'
    )
  if model.max_len and data.seq_len > model.max_len:
    raise UserError(
      f'config.data.seq_len={data.seq_len} is longer than config.model.max_len={model.max_len}: '
      'shorten the sequence, or set max_len=0 to follow it'
    )
  if optim.warmup_steps + optim.decay_steps > config.total_steps:
    raise UserError(
      f'config.optim.warmup_steps={optim.warmup_steps} and decay_steps={optim.decay_steps} do not '
      f'fit into config.total_steps={config.total_steps}'
    )
  if config.keep.rows and config.scope != 'global':
    raise UserError(
      f"config.keep.rows={config.keep.rows} needs all weights first: use scope='global', not "
      f'{config.scope!r}'
    )
  if config.target.domain:
    if config.target.read == 'gradient' and (config.keep.rows or config.scope == 'online'):
      raise UserError(
        f'config.target.domain={config.target.domain!r} needs a backward pass of all rows under '
        "their weights: leave out config.keep, and use scope='global' or 'microbatch'"
      )
    if config.checkpoint.every % config.target.every:
      raise UserError(
        f'config.checkpoint.every={config.checkpoint.every} must be a multiple of '
        f'config.target.every={config.target.every}, so that a resumed run reads the same target'
      )
  if list(config.mesh.values()).count(-1) > 1:
    sizes = ', '.join(f'config.mesh.{axis}={size}' for axis, size in config.mesh.items())
    raise UserError(f'{sizes}: only one may take all the rest')
  if config.checkpoint.best and config.eval.every % config.checkpoint.every:
    raise UserError(
      f'config.eval.every={config.eval.every} must be a multiple of '
      f'config.checkpoint.every={config.checkpoint.every}, so that the best state has a checkpoint'
    )


# Storing


def to_json(config: Mapping) -> str:
  """`config` as indented JSON; tuples become lists."""
  return json.dumps(_plain(config), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> ConfigDict:
  """The inverse of `to_json`: every list becomes a tuple."""
  return ConfigDict(_with_tuples(json.loads(text)))


def _plain(value: Any) -> Any:
  if isinstance(value, (Mapping, ConfigDict)):
    return {k: _plain(v) for k, v in value.items()}
  return value


def _with_tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(_with_tuples(v) for v in value) if isinstance(value, list) else value


def read(workdir: str | os.PathLike) -> ConfigDict:
  """The config of the run in `workdir`; a key that is younger than the run has its default, with
  which everything is as it was.

  Raises:
    UserError: not a run directory, or an unreadable `config.json`.
  """
  path = Path(workdir) / 'config.json'
  if not os.path.isfile(path):
    raise UserError(f'{workdir} is not a run directory: it has no config.json')
  defaults = common.base_config().to_dict() | {'w': {}}  # the run's own, whatever they are
  filled = _filled(defaults, _with_tuples(files.read_json(path)), path)
  try:
    return ConfigDict(filled)
  except (ValueError, AttributeError) as e:  # a name that no key can have
    raise UserError(f'{path} is damaged ({one_line(e)}); restore it from a copy') from e


def _filled(defaults: Mapping, stored: Any, path: Path) -> dict:
  if not isinstance(stored, dict):
    raise UserError(
      f'{path} is damaged: {stored!r:.40} stands where a group of keys belongs; restore it from a '
      'copy'
    )
  groups = {k: v for k, v in stored.items() if isinstance(defaults.get(k), dict)}
  return {**defaults, **stored, **{k: _filled(defaults[k], v, path) for k, v in groups.items()}}


def write(workdir: str | os.PathLike, config: Mapping) -> None:
  """Stores the config of the run in `workdir`, atomically."""
  files.write_text(Path(workdir) / 'config.json', to_json(config))


def check_same_run(workdir: str | os.PathLike, config: Mapping) -> None:
  """A run directory holds one run: if `workdir` has a config, it must be this one.

  Differences in HARMLESS keys are fine.

  Raises:
    UserError: says what differs, there and here; or no directory can have this name.
  """
  if long := [part for part in Path(workdir).parts if len(os.fsencode(part)) > 255]:
    raise UserError(f'--workdir: {long[0][:40]}... is longer than 255 bytes; choose a shorter name')
  if not os.path.isfile(Path(workdir) / 'config.json'):
    return
  changes = {k: v for k, v in diff(read(workdir), config).items() if not is_harmless(k)}
  if not changes:
    return
  shown = [f'{key} is {there!r} there and {here!r} here' for key, (there, here) in changes.items()]
  more = f' (and {len(shown) - 3} more)' if len(shown) > 3 else ''
  raise UserError(
    f'{workdir} holds a run with another config: {", ".join(shown[:3])}{more}; '
    'set it back to resume that run, or choose another --workdir'
  )


def config_hash(config: Mapping) -> str:
  """12 hex digits that name what is computed: HARMLESS keys do not count."""
  flat = {k: v for k, v in flatten(config).items() if not is_harmless(k)}
  return hashlib.sha256(to_json(flat).encode()).hexdigest()[:12]


# Printing


def origins(config: Mapping, overrides: Mapping[str, Any], file: str) -> dict[str, str]:
  """{flat key: 'command line', 'default', or the name of the config file that set it}."""
  defaults, flat = flatten(common.base_config()), flatten(config)
  is_default = lambda key: key in defaults and defaults[key] == flat[key]
  return {
    key: 'command line' if key in overrides else 'default' if is_default(key) else file
    for key in flat
  }


def format_config(config: Mapping, overrides: Mapping[str, Any], file: str) -> str:
  """One aligned line for each value, marked with where it comes from unless it is a default.

  Args:
    config: the resolved config.
    overrides: flat keys set on the command line.
    file: the name of the config file.
  """
  flat, set_by = flatten(config), origins(config, overrides, file)
  width = max(map(len, flat))
  lines = []
  for key, value in flat.items():
    line = f'{key:<{width}} = {value!r}'
    if set_by[key] != 'default':
      line = f'{line:<{width + 24}}  # {set_by[key]}'
    lines.append(line)
  return '\n'.join(lines)
