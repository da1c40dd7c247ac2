#!/usr/bin/env bash
# Make a virtual environment and install requirements.txt into it: install.sh PYTHON FOLDER (see `make venv`).
# Every failure that a user can put right ends in one sentence with the cure.
set -u
python=$1 venv=$2
fail() { echo "error: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python is not there: sudo apt-get install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old: DeepSpeed's dependencies need 3.10 or newer; try make PYTHON=python3.12 venv"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python has no venv module here: sudo apt-get install python3-venv"

# PyTorch with CUDA unpacks to about 6 GB; the CPU build to 1 GB. Without a GPU the smaller one may be what pip finds.
need_gb=3 free_gb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1e6)}')
[ "$free_gb" -ge "$need_gb" ] || fail "only $free_gb GB free here, the install needs at least $need_gb GB"

# No stamp (we would not be here with one): what is there is half-made or outdated, so start clean. pip's cache keeps
# the downloads.
echo "setting up $venv (minutes the first time) ..."
"$python" -m venv --clear "$venv" || fail "could not create $venv: see the message above"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt || {
    free_gb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1e6)}')
    [ "$free_gb" -ge 1 ] || fail "the disk is full ($free_gb GB left): free 8 GB and run the same command again"
    fail "pip could not install requirements.txt (see above); the next call starts over, with what was downloaded kept"
}
