#!/usr/bin/env bash
# Makes sure that the slice is there: requests it, waits for it, replaces one that was taken away.
#   tpu_scripts/create.sh [--name=... --zone=... --project=... --type=... --version=... --spot]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
need TYPE=v6e-8 VERSION=v2-alpha-tpuv6e

dry_state=NONE
failures=0
while true; do
  now=$(state) || now=UNKNOWN
  case $now in
    ACTIVE) exit 0 ;;
    NONE)
      spot=()
      [[ -n ${TPU_SPOT:-} ]] && spot=(--spot)
      say "requesting $TPU_NAME ($TPU_TYPE)"
      if ! queued create "--node-id=$TPU_NAME" "--accelerator-type=$TPU_TYPE" \
        "--runtime-version=$TPU_VERSION" ${spot[@]+"${spot[@]}"} --quiet; then
        failures=$((failures + 1))
        [[ $failures -lt 5 ]] || fail "$TPU_NAME could not be requested: gcloud says why, above"
      fi
      ;;
    FAILED | SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
      say "$TPU_NAME is $now: replacing it"
      "$(dirname "$0")/delete.sh"
      ;;
    UNKNOWN)
      failures=$((failures + 1))
      [[ $failures -lt 5 ]] || fail "the state of $TPU_NAME is unknown: gcloud says why, above"
      ;;
    *) say "$TPU_NAME is $now" ;;
  esac
  if [[ -n $dry ]]; then exit 0; fi
  sleep "$poll"
done
