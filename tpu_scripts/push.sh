#!/usr/bin/env bash
# Copies a run to a slice that does not have it: what was saved before the last slice was lost.
#   tpu_scripts/push.sh [--name=... --zone=... --project=...] RUN
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
path=${rest[0]:?RUN is missing: a run directory}
# What a copy that was killed between its two moves has left.
if [[ ! -d $path && -d $path.old ]]; then run mv "$path.old" "$path"; fi

[[ -d $path ]] || exit 0
run tar -czf "$scratch/run.tgz" "$path"
copy all "$scratch/run.tgz" "$TPU_NAME:$dir.run.tgz"
on_hosts all "cd $dir && { [ -e $(quoted "$path") ] || tar -xzf ../$(basename "$dir").run.tgz; }"
