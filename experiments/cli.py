"""What all command lines share: `--config`, `--help` and errors of one line. Never imports jax."""

from __future__ import annotations

import ctypes
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.common import ConfigError
from experiments import config as config_lib
from experiments.errors import HostLostError, NonFiniteError, StoppedError, UserError

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # a flag belongs to the program that defines it, for --help's sake


def define_config() -> flags.FlagHolder[ConfigDict]:
  """Defines the required flag `--config=file.py[:arg]`; `--config.optim.lr=0.001` overrides."""
  return config_flags.DEFINE_config_file(
    'config',
    help_string='file.py[:arg]; change any value with --config.<key>=<value>',
    flag_values=FLAGS,
    sys_argv=[arg for arg in sys.argv if not _is_flagfile(arg)],  # which are refused, in `_parse`
  )


def config_origin() -> tuple[dict, str]:
  """({flat key: value set on the command line}, the --config value), once flags are parsed."""
  flag = FLAGS['config']
  return dict(flag.override_values), flag.config_filename


def run(main: Callable[[list[str]], None], *, positional: bool = False) -> None:
  """Parses the flags, calls `main(positional arguments)` and exits.

  What the user can fix ends in `error: <one line>` on stderr and exit status 2, without traceback;
  numbers that stop being finite end in status 3, a run that lost one of its processes in 69, one
  that was asked to stop and has saved in 75. `--help` prints the program's docstring.

  Args:
    main: the program.
    positional: whether it takes arguments that are not flags.
  """
  if {'--help', '-help', '-h', '--helpshort'} & set(sys.argv[1:]):
    print(help_text(sys.argv))
    sys.exit(0)
  try:
    app.run(
      lambda argv: _quietly(main, argv[1:]),
      flags_parser=lambda argv: _parse(argv, positional=positional),
    )
  except (UserError, NonFiniteError, ConfigError) as e:
    print(f'error: {config_lib.one_line(e)}', file=sys.stderr)
    sys.exit(getattr(e, 'exit_status', UserError.exit_status))
  except (HostLostError, StoppedError) as e:
    what = 'stopped' if isinstance(e, StoppedError) else 'lost'
    print(f'{what}: {config_lib.one_line(e)}', file=sys.stderr)
    sys.exit(e.exit_status)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)


def use_compilation_cache(folder: Path) -> None:
  """Programs that were compiled before, by a killed run or another seed, are read from `folder`.

  A folder that the user chose (JAX_COMPILATION_CACHE_DIR) stays.
  """
  import jax

  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(folder.absolute()))


def keep_freed_memory() -> None:
  """Tells glibc not to hand freed memory back to the system; does nothing elsewhere.

  On a CPU, XLA allocates a step's temporary arrays as one block and frees it after the step. glibc
  maps such a block afresh every time, and the kernel zeroes it page by page while the step runs,
  which cost 0.2 s of 1.1 s of processor time in a step of a 3M-parameter model.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # not glibc
    return
  arena_max, mmap_max, trim_threshold = -8, -4, -1  # names of malloc.h
  mallopt(arena_max, 1)  # the heaps of other threads cannot hold large blocks
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, -1)


def _quietly(main: Callable[[list[str]], None], argv: list[str]) -> None:
  # app.run turns INFO on, and every library underneath logs at that level.
  if not any(re.match(r'--?(v|verbosity)\b', arg) for arg in sys.argv):
    logging.set_verbosity(logging.WARNING)
  keep_freed_memory()
  main(argv)


def _parse(argv: list[str], *, positional: bool) -> list[str]:
  """Parses `argv` into FLAGS; returns what is left.

  The config file and the names of its overrides are checked first, because the messages of
  config_flags are tracebacks.
  """
  if files := [arg for arg in argv if _is_flagfile(arg)]:
    raise UserError(f'{files[0]}: options in a file are not read; write them on the command line')
  spec = _config_spec(argv)
  if 'config' in FLAGS:
    if not spec:
      raise UserError('--config is missing: try --config=configs/quickstart.py')
    _check_override_names(argv, config_lib.load(spec))
  try:
    rest = FLAGS(argv)
  except flags.Error as e:
    raise UserError(_flag_message(e)) from e
  if rest[1:] and not positional:
    raise UserError(f'unexpected argument {rest[1]!r}: every option is written --name=value')
  if 'config' in FLAGS:
    config_lib.check(FLAGS.config)
  return rest


def _is_flagfile(arg: str) -> bool:
  return re.match(r'--?flagfile\b', arg) is not None


def _config_spec(argv: list[str]) -> str | None:
  for arg, following in zip(argv[1:], [*argv[2:], '']):
    if match := re.fullmatch(r'--?config(?:=(.*))?', arg):
      return following if match[1] is None else match[1]
  return None


def _override_names(argv: Iterable[str]) -> Iterator[str]:
  for arg in argv:
    if match := re.match(r'--?(?:no)?config\.([^=]*)', arg):
      yield match[1]


def _check_override_names(argv: Iterable[str], config: ConfigDict) -> None:
  flat = config_lib.flatten(config)
  for name in _override_names(argv):
    if any(key.startswith(f'{name}.') for key in flat):
      raise UserError(f'--config.{name} is a group of keys: set one of them, --config.{name}.<key>')
    if name not in flat:
      raise UserError('--' + config_lib.unknown_key(name, flat))


def _flag_message(error: flags.Error) -> str:
  """absl's message on one line; that of an override of the wrong type says which type is right."""
  text = config_lib.one_line(error)
  if match := re.match(r'flag --config\.([^=]*)=(.*?): ', text):
    defaults = config_lib.flatten(config_lib.load(_config_spec(sys.argv)))
    return '--' + config_lib.wrong_type(match[1], match[2], defaults[match[1]])
  if match := re.match(r'Missing value for flag (\S*)', text):
    return f'{match[1]} has no value: write {match[1]}=<value>'
  if match := re.match(r'flag (--\w+=.*): (?:could not convert|invalid literal)', text):
    return f'{match[1]}: must be a number'
  if match := re.match(r'Found (\S*) in argv before a value for --config', text):
    return f'{match[1]} stands before --config=...: write it behind'
  return text.removeprefix('flag ')


def help_text(argv: list[str]) -> str:
  """The program's docstring with its examples, its flags, and the configs there are.

  With `--config=file.py` also that file's docstring.
  """
  program = sys.modules['__main__']
  parts = [inspect.cleandoc(program.__doc__ or ''), 'Flags:\n' + _flag_lines(program)]
  if 'config' in FLAGS:
    lines = [
      f'  {p}: {config_lib.describe(p).partition(chr(10))[0]}' for p in config_lib.config_files()
    ]
    parts.append('Configs (add --help --config=<file> to read more):\n' + '\n'.join(lines))
    path = (_config_spec(argv) or '').partition(':')[0]
    if path and Path(path).is_file():
      parts.append(f'{path}:\n{config_lib.describe(path)}')
  return '\n\n'.join(parts)


def _flag_lines(program) -> str:
  lines = []
  for flag in sorted(FLAGS.get_key_flags_for_module(program), key=lambda f: f.name):
    default = '' if flag.default in (None, '', False) else f' [{flag.default}]'
    lines.append(f'  --{flag.name}: {flag.help}{default}')
  return '\n'.join(lines)
