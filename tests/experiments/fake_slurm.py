"""A SLURM of one machine for tests: sbatch runs the tasks of a script at once, in background."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# A job is a file in `jobs/`, named by its id, that holds the process group of its script.
SBATCH = """#!/usr/bin/env bash
here=$(dirname "$(dirname "$0")")
cp "$1" "$here/script"
if [ -e "$here/refuse" ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
echo "Submitted batch job 70"
for i in $(seq 0 "${last:-0}"); do
  export SLURM_JOB_ID=$((70 + i)) SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=$i
  [ -n "$last" ] || unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
  id=70${last:+_$i}
  setsid bash -c "echo \\$\\$ >'$here/jobs/$id'; bash '$1'; rm '$here/jobs/$id'" \\
    </dev/null >/dev/null 2>"$here/errors" &
  until [ -e "$here/jobs/$id" ]; do sleep 0.02; done
done
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in --unbuffered) shift ;; *) shift 2 ;; esac; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
exec "$@"
"""
SQUEUE = """#!/usr/bin/env bash
here=$(dirname "$(dirname "$0")")
if [[ $* == *' -j '* ]]; then cat "$here/state"; exit; fi
for job in "$here"/jobs/*; do [ -e "$job" ] && echo "$(basename "$job") RUNNING"; done; exit 0
"""
SCANCEL = """#!/usr/bin/env bash
here=$(dirname "$(dirname "$0")")
echo "scancel $*" >>"$here/calls"
[[ $1 == --signal=TERM ]] || exit 0
for id in "${@:2}"; do
  group=$(cat "$here/jobs/$id") || exit 1
  # To the steps of the job and not to its script, as SLURM does it.
  for pid in $(pgrep -g "$group" -f submitit.core._submit); do kill -TERM "$pid"; done
done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$(dirname "$(dirname "$0")")/calls"
"""


class Slurm:
  """The commands, in `folder`/bin."""

  def __init__(self, folder: Path):
    self.folder = folder
    (folder / 'jobs').mkdir(parents=True)
    programs = {'sbatch': SBATCH, 'srun': SRUN, 'squeue': SQUEUE, 'scancel': SCANCEL}
    for name, text in {**programs, 'scontrol': SCONTROL}.items():
      path = folder / 'bin' / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(text)
      path.chmod(0o755)

    self.state('RUNNING')

  def state(self, state: str) -> None:
    """What squeue says of every job that is asked for."""
    (self.folder / 'state').write_text(f'{state}\n')

  @property
  def path(self) -> str:
    return f'{self.folder / "bin"}:{os.environ["PATH"]}'

  @property
  def script(self) -> str:
    """What was submitted last."""
    return (self.folder / 'script').read_text()

  @property
  def calls(self) -> list[str]:
    path = self.folder / 'calls'
    return path.read_text().splitlines() if path.exists() else []

  def kill(self) -> None:
    """Ends what is left of all jobs."""
    for job in (self.folder / 'jobs').iterdir():
      os.killpg(int(job.read_text()), signal.SIGKILL)
