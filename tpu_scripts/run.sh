#!/usr/bin/env bash
# Runs a command on all hosts and waits for it; ends with its exit status, or with 75 if the slice was
# lost. The command outlives a connection that drops; while it runs, the same call only waits for it.
#   tpu_scripts/run.sh [--name=... --zone=... --project=...] RUN COMMAND...
# RUN is the run directory; the output goes to RUN/tpu/log.txt on each host.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh" "$@"
path=${rest[0]:?RUN is missing: a run directory}
[[ ${#rest[@]} -gt 1 ]] || fail "COMMAND is missing: what to run on all hosts"
job=$(quoted "$path/tpu")
sync=${TPU_SYNC:-300}

command=$(quoted_all "${rest[@]:1}")
detached="PATH=\$PWD/.venv/bin:\$PATH $command >>$job/log.txt 2>&1 & echo \$! >$job/pid
wait \$!; echo \$? >$job/status"
start="cd $dir && mkdir -p $job && if flock -n $job/lock rm -f $job/status; then
setsid nohup flock $job/lock bash -c $(quoted "$detached") </dev/null >/dev/null 2>&1 & fi"
# Prints 'status: N', 'status: running' after $sync seconds, or 'status: 75' if it is gone without one.
look="cd $dir; for i in \$(seq $((sync / poll + 1))); do sleep $poll
if [ -e $job/status ]; then echo status: \$(cat $job/status); exit; fi
if flock -n $job/lock true; then echo status: 75; exit; fi; done; echo status: running"

lost() {
  [[ $(state) != ACTIVE ]]
}

failures=0
until on_hosts all "$start"; do
  if lost; then exit 75; fi
  failures=$((failures + 1))
  [[ $failures -lt 5 ]] || fail "the command could not be started on $TPU_NAME: see above"
  sleep "$poll"
done
while true; do
  if ! seen=$(on_hosts all "$look"); then
    if lost; then
      say "$TPU_NAME was taken away"
      exit 75
    fi
    say 'the connection dropped; the command goes on'
    sleep "$poll"
    continue
  fi
  if [[ -n $dry ]]; then exit 0; fi
  if ! grep -q 'status: running' <<<"$seen"; then
    # The worst of all hosts; what lost another host (69) or saved (75) says less than a mistake.
    found=$(sed -n 's/^status: \([0-9][0-9]*\)$/\1/p' <<<"$seen" | sort -n)
    mistakes=$(grep -vxE '0|69|75' <<<"$found" || true)
    exit "$(tail -n 1 <<<"${mistakes:-$found}")"
  fi
  "$(dirname "$0")/fetch.sh" "$path" || say 'could not copy the run; trying again later'
done
