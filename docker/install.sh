#!/bin/sh
# Installs logitcache for one role, from a wheel: its extras, and nothing of the other roles.
#
#   install.sh WHEEL_FOLDER EXTRAS 'PACKAGES OF OTHER ROLES' TESTED_VERSIONS
#
# PYTHON names the interpreter to install for (python3).
set -eu
wheels=$1 extras=$2 left_out=$3 tested=$4
python=${PYTHON:-python3}

versions=$(mktemp)
trap 'rm -f "$versions"' EXIT
"$python" "$(dirname "$0")/versions.py" "$tested" >"$versions"

set -- "$wheels"/logitcache-*.whl
if [ $# != 1 ] || [ ! -f "$1" ]; then
    echo "install.sh: expected one wheel in $wheels, found: $*" >&2
    exit 2
fi
"$python" -m pip install --constraint "$versions" "$1[$extras]"

for package in $left_out; do
    rm -r "$("$python" -c "import importlib.util as u; print(*u.find_spec('$package').submodule_search_locations)")"
done
