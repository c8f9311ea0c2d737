# shellcheck shell=bash disable=SC2034  # others use what is set here
# What the scripts share. Each sources this file with its own arguments.
#
# Names, from the environment or as leading arguments (--name=mine --zone=us-east5-b):
#   TPU_NAME TPU_ZONE TPU_PROJECT   the slice, and its queued resource of the same name
#   TPU_TYPE TPU_VERSION            needed to create it: v6e-8, v2-alpha-tpuv6e
#   TPU_SPOT=1                      a spot slice: cheap, and may be taken away at any time
#   TPU_DIR=jaxrw                   where the tree is copied to on every host, below its home
#   TPU_SETUP='sudo mount ...'      what every host runs first, in TPU_DIR; several hosts need a shared
#                                   file system for their runs
#   TPU_POLL=15 TPU_SYNC=300        seconds between looks, and between copies of a run that goes on
#   TPU_ATTEMPTS=20                 how often train.sh starts a run, on a new slice or the same one
#   TPU_DRY_RUN=1                   print the commands, and run none
set -euo pipefail

rest=()
for argument in "$@"; do
  if [[ ${#rest[@]} -eq 0 && $argument =~ ^--(name|zone|project|type|version|dir|setup)=(.*)$ ]]; then
    name=$(tr '[:lower:]' '[:upper:]' <<<"${BASH_REMATCH[1]}")
    export "TPU_$name=${BASH_REMATCH[2]}"
  elif [[ ${#rest[@]} -eq 0 && $argument == --dry_run ]]; then
    export TPU_DRY_RUN=1
  elif [[ ${#rest[@]} -eq 0 && $argument == --spot ]]; then
    export TPU_SPOT=1
  else
    rest+=("$argument")
  fi
done
dir=${TPU_DIR:-jaxrw}
poll=${TPU_POLL:-15}
dry=${TPU_DRY_RUN:-}
exec 3>&1 # where dry runs print, also from inside $(...)

say() { printf 'tpu: %s\n' "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# need ZONE=us-east5-b ...: ends with an error unless TPU_ZONE and so on are set; with an example.
need() {
  local pair variable
  for pair in "$@"; do
    variable=TPU_${pair%%=*}
    [[ -n ${!variable:-} ]] || fail "$variable is missing: set it, such as $variable=${pair#*=}"
  done
}

# One argument as a shell would read it back.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf '%s' "$1"; else
    printf "'%s'" "${1//\'/\'\\\'\'}"
  fi
}

quoted_all() {
  local word line=''
  for word in "$@"; do line+="$(quoted "$word") "; done
  printf '%s' "${line% }"
}

# Runs a command, or prints it.
run() {
  if [[ -n $dry ]]; then quoted_all "$@" >&3 && echo >&3; else "$@"; fi
}

queued() { run gcloud compute tpus queued-resources "$1" "$TPU_NAME" "$(at_zone)" "$(at_project)" "${@:2}"; }
at_zone() { printf -- '--zone=%s' "$TPU_ZONE"; }
at_project() { printf -- '--project=%s' "$TPU_PROJECT"; }

# on_hosts all|0 COMMAND: through ssh, which notices a host that is gone.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "$(at_zone)" "$(at_project)" "--worker=$1" \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 "--command=$2" --quiet
}

# copy all|0 FROM TO: where NAME: stands for the slice.
copy() {
  run gcloud compute tpus tpu-vm scp "$2" "$3" "$(at_zone)" "$(at_project)" "--worker=$1" --quiet
}

# Prints ACTIVE when the slice can be used, NONE when there is none, else what it is in.
state() {
  local found error=$scratch/error
  if [[ -n $dry ]]; then
    queued describe '--format=value(state.state)'
    echo "$dry_state"
    return
  fi
  if ! found=$(queued describe '--format=value(state.state)' 2>"$error"); then
    if grep -qE 'NOT_FOUND|not found' "$error"; then echo NONE; else cat "$error" >&2 && return 1; fi
    return
  fi
  if [[ $found == ACTIVE ]]; then # the request may be, and its slice gone
    found=$(gcloud compute tpus tpu-vm describe "$TPU_NAME" "$(at_zone)" "$(at_project)" \
      '--format=value(state)' 2>/dev/null) || found=PREEMPTED
    [[ $found == READY ]] && found=ACTIVE
  fi
  echo "$found"
}

dry_state=ACTIVE
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
need NAME=sweep ZONE=us-east5-b PROJECT=my-project
