#!/usr/bin/env bash
# Trains one run on a slice to its end: creates the slice, sets it up, runs the command on all hosts,
# copies the run back; on a new slice whenever the last one was taken away. Ends with the command's
# exit status. On SIGTERM the run saves, is copied back, and this ends with 75; the slice stays.
#   tpu_scripts/train.sh [--name=... --zone=... --project=... --type=... --version=...] RUN COMMAND...
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
path=${rest[0]:?RUN is missing: a run directory}
here=$(dirname "$0")

asked=''
trains=''
child=''
# shellcheck disable=SC2329  # the trap calls it
told() {
  asked=1
  if [[ -n $trains ]]; then "$here/stop.sh" "$path" || true; else kill "$child" || true; fi
}
trap told TERM

# In the background, because bash hears a signal only between commands, and while it waits.
await() {
  local status=0
  "$@" &
  child=$!
  wait "$child" || status=$?
  while [[ $status -eq 143 && -n $asked ]] && kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  return "$status"
}

for ((attempt = 1; attempt <= ${TPU_ATTEMPTS:-20}; attempt++)); do
  if ! await "$here/create.sh"; then
    if [[ -n $asked ]]; then exit 75; else exit 2; fi
  fi
  status=75
  if await "$here/setup.sh" && await "$here/push.sh" "$path"; then
    status=0
    trains=1
    await "$here/run.sh" "${rest[@]}" || status=$?
    trains=''
    "$here/fetch.sh" "$path" || say "the run could not be copied from $TPU_NAME"
  fi
  if [[ -n $asked && ! $status =~ ^(0|2|3)$ ]]; then exit 75; fi
  if [[ $status -ne 75 && $status -ne 69 ]]; then break; fi
  say 'starting again'
  sleep "$poll"
done
if [[ -f $path/tpu/log.txt ]]; then tail -n 5 "$path/tpu/log.txt"; fi
exit "$status"
