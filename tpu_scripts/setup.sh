#!/usr/bin/env bash
# Copies the tree to every host and installs what it needs there; again, it copies what has changed.
#   tpu_scripts/setup.sh [--name=... --zone=... --project=...]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
root=$(cd "$(dirname "$0")/.." && pwd)

run tar -czf "$scratch/tree.tgz" -C "$root" --exclude=./.git --exclude=./runs --exclude='./.venv*' --exclude=./.libtpu \
  --exclude=__pycache__ --exclude='*.egg-info' .
copy all "$scratch/tree.tgz" "$TPU_NAME:$dir.tgz"
# The hosts' own Python may be too old: uv brings one.
on_hosts all "set -e; mkdir -p $dir; tar -xzf $dir.tgz -C $dir; cd $dir
${TPU_SETUP:+if [ ! -e .venv/set_up ]; then $TPU_SETUP; fi
}if ! cmp -s pyproject.toml .venv/set_up; then
  python3 -m pip install -q --user uv
  python3 -m uv venv -q --allow-existing --python 3.12 .venv
  python3 -m uv pip install -q --python .venv/bin/python -e '.[experiments,tpu]'
  cp pyproject.toml .venv/set_up
fi"
