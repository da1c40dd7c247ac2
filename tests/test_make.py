"""The first minutes: what make installs, into which environment, with whose mirrors, and what it shows."""

import importlib
import logging
import os
import pty
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.render import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed: sudo apt-get install make")
# A Python whose pip and uv write down what they are asked for, and fail when FAILS says so.
FAKE = f"""#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip config list"*) printf '%s' "$PIP_SAYS" ;;
    "-m pip install "*uv==*) [[ $FAILS != *no-uv* ]] || {{ echo "ERROR: No matching distribution" >&2; exit 1; }}
        printf '#!/bin/bash\\necho "uv $* $UV_HTTP_TIMEOUT" >>"$LOG"; [[ $FAILS != *uv-fails* ]]\\n' >"$here/uv"
        chmod +x "$here/uv" ;;
    "-m pip install "*) shift 3; echo "pip $*" >>"$LOG"; [[ $FAILS != *pip-fails* ]] ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*command, **env):
    """`command` from the root, and without what a `make test VENV=... ARGS=...` above this hands down."""
    handed_down = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "TORCH", "RANKS", "LABEL", "ARGS")
    env = {name: value for name, value in os.environ.items() if name not in handed_down} | env
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True)


def install(tmp_path, config="", fails="", torch=""):
    """Set up tmp_path/venv with the fake Python; return the run, and what pip and uv were asked for."""
    log = tmp_path / "log"
    log.write_text("")
    python = program(tmp_path / "python", FAKE)
    env = {"LOG": str(log), "PIP_SAYS": config, "FAILS": fails, "TORCH": torch, "PYTHONDONTWRITEBYTECODE": ""}
    return run("./install.sh", "new", python, tmp_path / "venv", **env), log.read_text().splitlines()


def test_uv_installs_from_where_pip_would(tmp_path):
    config = """global.index-url='file:///mirror/simple'
global.extra-index-url='\\nfile:///more\\nfile:///most'
global.find-links='/overruled'
install.no-index='false'
:env:.find-links='/wheels /more-wheels'
global.constraint='/etc/constraints.txt'
global.cert='/etc/ca.crt'
:env:.default-timeout='180'
:env:.disable-pip-version-check='1'
freeze.exclude='of no importance here'
"""
    done, asked = install(tmp_path, config)
    assert done.returncode == 0, done.stderr
    (uv,) = asked  # and pip installed nothing
    flags = "--default-index file:///mirror/simple --index file:///more --index file:///most --find-links /wheels"
    flags += " --find-links /more-wheels --constraints /etc/constraints.txt --cert /etc/ca.crt"
    assert uv.startswith("uv pip install ") and uv.endswith(" --requirement requirements.txt 180")
    for flag in flags.split(" --"):
        assert f" --{flag.removeprefix('--')} " in uv
    assert "overruled" not in uv and "--no-index" not in uv and "--index-strategy unsafe-best-match" in uv


@pytest.mark.parametrize(
    "config, fails, sentence, asked_first",
    [
        ("global.only-binary=':all:'\n", "", "pip is configured with only-binary, which uv does not know", "pip"),
        ("", "no-uv", "is not to be had here (ERROR: No matching distribution)", "pip"),
        ("", "uv-fails", "uv could not install this (see above): trying pip", "uv"),
    ],
)
def test_pip_installs_what_uv_cannot(tmp_path, config, fails, sentence, asked_first):
    done, asked = install(tmp_path, config, fails)
    assert done.returncode == 0 and sentence in done.stdout
    assert asked[0].startswith(asked_first)
    assert asked[-1] == "pip --disable-pip-version-check --requirement requirements.txt"  # not --quiet: pip shows bars


def test_a_failed_install_ends_in_one_sentence(tmp_path):
    done, _ = install(tmp_path, fails="uv-fails pip-fails")
    assert done.returncode == 1
    assert done.stderr == (
        "error: pip could not install these packages (see above); the next call starts over, with what was downloaded"
        " kept\n"
    )
    done, _ = install(tmp_path, fails="pip-fails", torch="torch==1.0")
    assert done.returncode == 1 and done.stderr.startswith(
        'error: pip could not install TORCH="torch==1.0" (see above)'
    )


def test_torch_is_installed_first_and_kept(tmp_path):
    pin = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    for torch, words in (
        ("--index-url file:///cpu", f"--index-url file:///cpu {pin}"),
        ("--find-links /wheels", f"--find-links /wheels {pin}"),
        ("torch==2.11.0", "torch==2.11.0"),
        ("/some/torch-2.11.0-cp311.whl", "/some/torch-2.11.0-cp311.whl"),
        ("", "/some/torch-2.11.0-cp311.whl"),  # requirements.txt changed: the choice holds
    ):
        done, (pip, uv) = install(tmp_path, torch=torch)
        assert done.returncode == 0 and pip == f"pip --disable-pip-version-check {words}"
        venv = tmp_path / "venv"
        assert f"--requirement {venv}/requirements.txt --constraint {venv}/torch-installed.txt" in uv
        assert "\ntorch==" not in (venv / "requirements.txt").read_text()  # the constraint decides
        assert (venv / "torch-installed.txt").read_text().startswith("torch==")


def test_make_installs_again_for_another_torch_only(tmp_path):
    for name in ("Makefile", "requirements.txt", "day22/requirements.txt", "day28/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    stamp = run("make", "-C", tmp_path, "-n", "venv").stdout.split("touch ")[1].split()[0]
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).touch()
    (tmp_path / ".venv/torch").write_text("torch==2.11.0\n")
    for torch, again in (("", False), ("torch==2.11.0", False), ("torch==2.12.0", True)):
        assert ("install.sh" in run("make", "-C", tmp_path, "-n", "venv", f"TORCH={torch}").stdout) == again


def test_an_environment_of_the_readers_is_checked_and_not_touched(tmp_path):
    done = run("make", "venv", f"VENV={tmp_path}")
    assert done.returncode and f"error: VENV={tmp_path} has no bin/python: name a virtual or conda" in done.stderr
    program(tmp_path / "bin/python", f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # -S: without any packages
    for day, lacking, cure in (
        ("day05", "lacks deepspeed==", "/bin/python -m pip install -r requirements.txt\n"),
        ("day05", ", pytest==", "/bin/python -m pip install -r requirements.txt\n"),
    ):
        done = run("make", day, f"VENV={tmp_path}")
        assert done.returncode and lacking in done.stderr and f"{tmp_path}{cure}" in done.stderr
    done = run("./install.sh", "check", tmp_path, "day22/requirements.txt")
    assert done.stderr.endswith("/bin/python -m pip install --no-deps -r day22/requirements.txt\n")
    assert "fastapi==" in run("./install.sh", "check", tmp_path, "day28/requirements.txt").stderr  # named one file on
    program(tmp_path / "bin/python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "pins.txt").write_text(f"pytest=={pytest.__version__}  # as it is\n")
    done = run("./install.sh", "check", tmp_path, tmp_path / "pins.txt")
    assert done.returncode == 0 and not done.stdout + done.stderr
    (tmp_path / "pins.txt").write_text("pytest==0.1\n")
    done = run("./install.sh", "check", tmp_path, tmp_path / "pins.txt")
    assert done.returncode == 0 and "has other versions than the tested ones" in done.stderr
    assert f"(in brackets): pytest {pytest.__version__} (0.1)" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bin", "pins.txt", "python"]


@pytest.fixture
def env_of_fakes(tmp_path):
    """An environment whose deepspeed tells how it was called, then fails with exit code 3."""
    program(tmp_path / "bin/python", '#!/bin/bash\n[[ $1 != -c ]] || echo "a warning"; echo ${DEVICES:-0}\n')
    program(tmp_path / "smi/nvidia-smi", "#!/bin/bash\nexit 9\n")
    say = 'echo "called: $* OMP=$OMP_NUM_THREADS DS=$DS_ACCELERATOR W=$PYTHONWARNINGS"\n'
    say += "[ -t 1 ] && [ -t 2 ] && echo bars\n"
    program(tmp_path / "bin/deepspeed", f"#!/bin/bash\n{say}echo what went wrong >&2\nexit 3\n")
    return tmp_path


def test_the_screen_shows_the_plain_command_and_a_failure_whole(env_of_fakes):
    command = ["make", "day05", f"VENV={env_of_fakes}", "RANKS=2", "ARGS=--say 'the whale'"]
    clean = {name: "" for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONWARNINGS")}
    path = f"{env_of_fakes}/smi:{os.defpath}"
    done = run(*command, PATH=path, **clean)
    shown, called = done.stdout.splitlines()[-2:]
    assert shown == "$ deepspeed --num_accelerators 2 day05/train.py --say 'the whale'"
    launch = "called: --quiet --log_level error --num_accelerators 2 day05/train.py --say the whale"
    assert called == f"{launch} OMP=1 DS=cpu W=ignore"
    assert "what went wrong\n" in done.stderr and "Error 3" in done.stderr
    own = run(*command, PATH=path, OMP_NUM_THREADS="5", DS_ACCELERATOR="own", PYTHONWARNINGS="error")
    assert own.stdout.splitlines()[-1].endswith("OMP=5 DS=own W=error")


@pytest.mark.parametrize(
    "first, second, code",
    [(0, 0, 0), (0, 5, 0), (5, 0, 0), (5, 5, 5), (1, 0, 1), (1, 5, 1), (0, 1, 1), (5, 1, 1), (1, 1, 1), (2, 0, 2)],
)
def test_make_test_fails_when_either_pass_does(env_of_fakes, first, second, code):
    """Exit code 5 is "no such test", which one pass alone may say; 2 is Ctrl-C, after which no second pass starts."""
    beside = f'*"--serial without -n "*) echo beside: $*; exit {first} ;;'
    alone = f'*"--serial only"*) echo alone: $*; exit {second} ;;'
    program(env_of_fakes / "bin/python", f'#!/bin/bash\ncase "$*" in {beside} {alone} esac\n')
    done = run("make", "-s", "test-long", f"VENV={env_of_fakes}", "ARGS=-k 'a name'")
    assert bool(done.returncode) == bool(code) and (not code or f"Error {code}" in done.stderr)
    assert [line.split()[0] for line in done.stdout.splitlines() if ": -m pytest -m long " in line] == [
        "beside:", "alone:",
    ][: 1 if first == 2 else 2]  # fmt: skip
    assert ("see the first of the two summaries" in done.stdout) == (first == 1)


def test_a_terminal_stays_one(env_of_fakes):
    ours, theirs = pty.openpty()
    subprocess.run(["make", "day05", f"VENV={env_of_fakes}"], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    assert b"\r\nbars\r\n" in os.read(ours, 10_000)


def test_accelerators_are_counted_when_a_program_starts_and_not_before(env_of_fakes):
    path = f"{env_of_fakes}/smi:{os.defpath}"
    other = program(env_of_fakes / "smi/xpu-smi", "#!/bin/bash\n")  # of another make: DeepSpeed is asked, and says 6
    for target, launched in (("day05", "--num_accelerators 6 "), ("results", "--label 6gpu")):
        assert launched in run("make", "-n", target, f"VENV={env_of_fakes}", PATH=path, DEVICES="6").stdout
    other.unlink()
    asked = env_of_fakes / "asked"
    program(
        env_of_fakes / "smi/nvidia-smi",
        f"#!/bin/bash\ntouch {asked}\necho 'GPU 0: x'; echo 'GPU 1: x'; echo 'GPU 2: x'\n",
    )
    assert "train" in run("make", "help", PATH=path).stdout and not asked.exists()
    called = run("make", "day05", f"VENV={env_of_fakes}", PATH=path, DS_ACCELERATOR="").stdout.splitlines()[-1]
    assert "--num_accelerators 3 " in called and " DS= " in called and asked.exists()


def test_under_make_the_warning_that_every_schedule_brings_is_left_out(monkeypatch):
    logger, gpu = logging.Logger("DeepSpeed"), SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.delitem(sys.modules, "common.cpu", raising=False)  # DeepSpeed itself takes seconds to import
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(
        ops=SimpleNamespace(__compatible_ops__={}),
        accelerator=SimpleNamespace(get_accelerator=lambda: gpu),
        utils=SimpleNamespace(logger=logger),
    ))  # fmt: skip
    cpu = importlib.import_module("common.cpu")
    del sys.modules["common.cpu"]  # nobody after us gets this one
    texts = ("Attempting to get learning rate from scheduler before it has started", "OVERFLOW! Skipping step")
    records = [logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, text, (), None) for text in texts]
    for under_make, shown in ((False, [True, True]), (True, [False, True])):
        monkeypatch.setenv("UNDER_MAKE", "1") if under_make else monkeypatch.delenv("UNDER_MAKE", raising=False)
        cpu.start_without_compiler()
        assert [bool(logger.filter(record)) for record in records] == shown
