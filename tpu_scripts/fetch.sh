#!/usr/bin/env bash
# Copies a run from the first host, with its log in RUN/tpu/log.txt; it may still go on.
#   tpu_scripts/fetch.sh [--name=... --zone=... --project=...] RUN
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
path=${rest[0]:?RUN is missing: a run directory}
# What a copy that was killed between its two moves has left.
if [[ ! -d $path && -d $path.old ]]; then run mv "$path.old" "$path"; fi

# A file that changes while it is read is none of tar's errors: checkpoints are sealed.
on_hosts 0 "cd $dir && { tar --warning=no-file-changed -czf ../$(basename "$dir").fetch.tgz \
$(quoted "$path") || [ \$? -eq 1 ]; }"
copy 0 "$TPU_NAME:$dir.fetch.tgz" "$scratch/run.tgz"
run mkdir -p "$path.new"
run tar -xzf "$scratch/run.tgz" -C "$path.new"
# In one move, so that a run directory is never half of one.
run rm -rf "$path.old"
[[ ! -d $path ]] || run mv "$path" "$path.old"
run mv "$path.new/$path" "$path"
run rm -rf "$path.new" "$path.old"
