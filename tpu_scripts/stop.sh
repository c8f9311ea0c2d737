#!/usr/bin/env bash
# Asks a command that run.sh has started to save and end.
#   tpu_scripts/stop.sh [--name=... --zone=... --project=...] RUN
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
job=$(quoted "${rest[0]:?RUN is missing: a run directory}/tpu")

on_hosts all "cd $dir && { flock -n $job/lock true || kill -TERM \$(cat $job/pid); }"
