#!/usr/bin/env bash
# Runs a recipe on all workers of a Cloud TPU VM slice.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE [--project=PROJECT] [--type=v5litepod-256]
#       [--version=v2-alpha-tpuv5-lite] [--keep] [--dry_run] -- ARGUMENTS OF kd.main
#
# With --type the slice is created first and deleted at the end unless --keep is given; without it,
# a slice NAME must exist. The checkout is copied to every worker. The work directory must be one
# that all workers share, such as a bucket mounted with gcsfuse. --dry_run prints every command.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }

name='' zone='' project='' type='' version='v2-alpha-tpuv5-lite' keep='' dry=''
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --keep) keep=1 ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) echo "tpu_pod.sh: unknown argument '$1'" >&2; usage ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || { echo 'tpu_pod.sh: --name and --zone are needed' >&2; usage; }
[[ $# -gt 0 ]] || { echo 'tpu_pod.sh: the arguments of kd.main are missing, after --' >&2; usage; }

for argument in "$@"; do
  case "$argument" in
    --workdir=*://* | --data_dir=*://*)
      echo "tpu_pod.sh: '$argument' is an address: mount the bucket and name the folder" >&2
      exit 2 ;;
  esac
done

run() {
  if [[ -n "$dry" ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpu() {
  local verb="$1"; shift
  run gcloud compute tpus tpu-vm "$verb" "$name" "--zone=$zone" \
    ${project:+"--project=$project"} "$@"
}
everywhere() { tpu ssh --worker=all "--command=$1"; }

root="$(cd "$(dirname "$0")/.." && pwd)"
archive="${TMPDIR:-/tmp}/kd-$name.tar.gz"
if [[ -n "$type" ]]; then
  tpu create "--accelerator-type=$type" "--version=$version"
  if [[ -z "$keep" ]]; then trap 'tpu delete --quiet' EXIT; fi
fi
run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:kd.tar.gz" "--zone=$zone" \
  ${project:+"--project=$project"} --worker=all
everywhere 'mkdir -p kd && tar -xzf kd.tar.gz -C kd && cd kd && python3 -m venv .venv && .venv/bin/pip install --quiet -e ".[tpu]"'
everywhere "cd kd && .venv/bin/python -m kd.main --distributed=auto$(printf ' %q' "$@")"
