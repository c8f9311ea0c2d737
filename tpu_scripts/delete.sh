#!/usr/bin/env bash
# Gives the slice back, with everything on it. Nothing to do when there is none.
#   tpu_scripts/delete.sh [--name=... --zone=... --project=...]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"

failures=0
until [[ $(state) == NONE ]]; do
  if ! queued delete --force --quiet; then # it may be changing, or gone in the meantime
    failures=$((failures + 1))
    [[ $failures -lt 5 ]] || fail "$TPU_NAME could not be deleted: gcloud says why, above"
  fi
  if [[ -n $dry ]]; then exit 0; fi
  sleep "$poll"
done
