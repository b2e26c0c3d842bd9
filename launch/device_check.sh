#!/usr/bin/env bash
# Measures kd on one GPU within eight minutes, installation included, and prints a page:
#
#   launch/device_check.sh            # wheels from PyPI
#   launch/device_check.sh wheels/    # from a folder, for a machine without a network:
#                                     # pip download --dest wheels/ 'jax[cuda12]' . on another one
#   KD_PYTHON=.venv/bin/python launch/device_check.sh     # an environment that is there
#
# What it printed goes into docs/performance.md by
#   python -m kd.benchmarks --page --device=FILE
# KD_DEVICE_CHECK holds further arguments of kd.benchmarks.device: --tiny tries it on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

limit=480
began=$SECONDS
python="${KD_PYTHON:-}"
if [[ -z $python ]]; then
  place="$(mktemp -d)"
  trap 'rm -rf "$place"' EXIT
  python3 -m venv "$place/venv"
  python="$place/venv/bin/python"
  from=()
  [[ $# -eq 0 ]] || from=(--no-index --find-links "$1")
  "$python" -m pip install --quiet "${from[@]}" '.[gpu]'
fi
echo "Installed in $((SECONDS - began)) s."
echo
# A check that is not done by then is cut off; what was printed stays.
# shellcheck disable=SC2086
PYTHONPATH=. timeout "$((limit - (SECONDS - began)))" \
  "$python" -m kd.benchmarks.device ${KD_DEVICE_CHECK:-} || status=$?
echo
echo "Took $((SECONDS - began)) s in all."
exit "${status:-0}"
