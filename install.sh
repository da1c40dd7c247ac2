#!/usr/bin/env bash
# Install into a virtual environment and show what comes, for the Makefile:
#     install.sh new PYTHON FOLDER                  make FOLDER afresh, with requirements.txt and the PyTorch of $TORCH
#     install.sh add FOLDER REQUIREMENTS [FLAG...]  install more into it
#     install.sh check FOLDER REQUIREMENTS          an environment of your own: say what it lacks, change nothing
# Every failure that a user can put right ends in one sentence with the cure.
set -uo pipefail
trap 'exit 130' INT  # Ctrl-C is no failure of uv: do not go on with pip
uv_version=0.13.9  # loads and unpacks many packages at once: a third of pip's time. Without it, pip does the same.
fail() { echo "error: $*" >&2; exit 1; }
gb_free() { df -Pk . | awk 'NR == 2 {print int($4 / 1e6)}'; }
pip() { "$venv/bin/python" -m pip "$@"; }

pip_settings_for_uv() { # Print what pip's configuration says as uv's arguments; fail with what uv cannot do.
    pip config list --disable-pip-version-check | "$venv/bin/python" -c '
import ast, sys

FLAGS = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links", "cert": "--cert",
         "constraint": "--constraints", "trusted-host": "--allow-insecure-host", "cache-dir": "--cache-dir"}
SWITCHES = {"no-index": "--no-index", "no-cache-dir": "--no-cache"}
VARIABLES = {"timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT", "proxy": "ALL_PROXY"}
SCREEN_ONLY = {"break-system-packages", "config-file", "disable-pip-version-check", "no-color", "no-input", "progress-bar",
               "quiet", "require-virtualenv", "retries", "root-user-action", "verbose", "no-warn-script-location",
               "no-python-version-warning"}
found = {}
for line in sys.stdin:
    key, _, value = line.strip().partition("=")
    section, _, name = key.rpartition(".")
    if (value := ast.literal_eval(value).strip()) and section in ("global", "install", ":env:"):
        found[section, name] = value
settings = {}  # the last one wins, as with pip
for section in ("global", "install", ":env:"):
    settings |= {name: value for (where, name), value in found.items() if where == section}
arguments = []
for name, value in settings.items():
    if name in VARIABLES:
        print(f"{VARIABLES[name]}={value}")
    elif name == "cache-dir":
        arguments += [FLAGS[name], f"{value}/uv"]
    elif name in FLAGS:
        arguments += [part for one in value.split() for part in (FLAGS[name], one)]
    elif name in SWITCHES:
        arguments += [SWITCHES[name]] * (value.lower() in ("1", "true", "yes", "on"))
    elif name not in SCREEN_ONLY:
        sys.exit(name)
print("uv", "pip", "install", *arguments, sep="\n")'
}

with_uv() { # with_uv FLAG...: install as pip is configured to, if uv can.
    local settings reason
    if ! settings=$(pip_settings_for_uv 2>&1); then
        echo "pip is configured with ${settings##*$'\n'}, which uv does not know: installing with pip"
        return 1
    fi
    if ! reason=$(pip install --quiet --disable-pip-version-check --retries 1 "uv==$uv_version" 2>&1); then
        echo "uv $uv_version is not to be had here ($(grep -i error <<<"$reason" | tail -1)): installing with pip"
        return 1
    fi
    local -a arguments
    mapfile -t arguments <<<"$settings"
    # Modules are compiled when first imported. Where Python may not write what it compiled, compile now.
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || arguments+=(--compile-bytecode)
    # "unsafe" is what pip does: the best version of all indexes, not the first index that knows the name.
    PATH="$venv/bin:$PATH" env "${arguments[@]}" --python "$venv/bin/python" --index-strategy unsafe-best-match "$@" ||
        { echo "uv could not install this (see above): trying pip"; return 1; }
}

install() { # install FLAG...
    with_uv "$@" || { [ "$(gb_free)" -ge 1 ] && pip install --disable-pip-version-check "$@"; } || {
        [ "$(gb_free)" -ge 1 ] || fail "the disk is full ($(gb_free) GB left): free 8 GB and run the same command again"
        fail "pip could not install these packages (see above); the next call starts over, with what was downloaded kept"
    }
}

new() { # new PYTHON FOLDER
    local python=$1 torch=${TORCH:-}
    venv=$2
    command -v "$python" >/dev/null || fail "$python is not there: sudo apt-get install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old: DeepSpeed's dependencies need 3.10 or newer; try make PYTHON=python3.12 venv"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python has no venv module here: sudo apt-get install python3-venv"
    # PyTorch with CUDA unpacks to about 6 GB; the CPU build to 1 GB. Without a GPU the smaller one may be what pip finds.
    [ "$(gb_free)" -ge 3 ] || fail "only $(gb_free) GB free here, the install needs at least 3 GB"

    # No stamp (we would not be here with one): what is there is half-made or outdated, so start clean. The caches of uv
    # and pip keep the downloads, and TORCH holds until another is given.
    [ "$torch" ] || torch=$(cat "$venv/torch" 2>/dev/null)
    echo "setting up $venv: PyTorch, DeepSpeed and what they need, 1 GB (PyTorch for CPU) to 6 GB (with CUDA)"
    "$python" -m venv --clear "$venv" || fail "could not create $venv: see the message above"
    if [ -z "$torch" ]; then
        install --requirement requirements.txt
    else
        torch_first "$torch"
    fi
}

torch_first() { # torch_first WORDS: what pip is to take for PyTorch: a requirement, a wheel, an index, or several of them
    local -a words
    read -ra words <<<"$1"
    [[ $1 =~ (^| )torch|\.whl ]] || words+=("$(grep '^torch==' requirements.txt)")
    # With pip, because the words are pip's: what pytorch.org's "Get Started" says after `pip3 install`.
    pip install --disable-pip-version-check "${words[@]}" ||
        fail "pip could not install TORCH=\"$1\" (see above): give a requirement, a wheel, or --index-url and an address"
    "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        >"$venv/torch-installed.txt"
    grep -v '^torch==' requirements.txt >"$venv/requirements.txt"
    install --requirement "$venv/requirements.txt" --constraint "$venv/torch-installed.txt"
    echo "$1" >"$venv/torch"
}

check() { # check FOLDER REQUIREMENTS
    venv=$1
    [ -x "$venv/bin/python" ] || fail "VENV=$venv has no bin/python: name a virtual or conda environment, or leave VENV out"
    "$venv/bin/python" - "$venv" "$2" <<'PYTHON'
import re, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pins(path):
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            yield from pins(path.parent / line[3:])
        elif pin := re.match(r"([\w-]+)==(\S+)", line):
            yield pin.groups()


venv, requirements = sys.argv[1:]
missing, other = [], []
for name, pinned in pins(Path(requirements)):
    try:
        installed = version(name).split("+")[0]
    except PackageNotFoundError:
        missing.append(f"{name}=={pinned}")
        continue
    if installed != pinned:
        other.append(f"{name} {installed} ({pinned})")
if missing:
    flags = "--no-deps " if "day22" in requirements else ""
    sys.exit(f"error: VENV={venv} lacks {', '.join(missing)}: {venv}/bin/python -m pip install {flags}-r {requirements}")
if other:  # the course may well run with these
    print(f"VENV={venv} has other versions than the tested ones (in brackets): {', '.join(other)}", file=sys.stderr)
PYTHON
}

case ${1:-} in
    new) new "$2" "$3" ;;
    add) venv=$2; install --requirement "${@:3}" ;;
    check) check "$2" "$3" ;;
    *) fail "install.sh ${1:-}: say new, add or check" ;;
esac
