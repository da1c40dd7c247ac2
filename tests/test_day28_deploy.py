"""Day 28: deployment files are valid, a container's first process passes signals on, the runbook knows every alert."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from capstone.config import ROOT, Config, load_config
from tests.launch import PATH

NEEDS = "day 28's packages are not here: pip install -r day28/requirements.txt"
for package in ("kubernetes_validate", "compose_spec"):
    pytest.importorskip(package, reason=NEEDS)

DEPLOY = ROOT / "capstone/deploy"
MANIFESTS = ("kubernetes-train.yaml", "kubernetes-serve.yaml")


def parts_of(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def test_the_dockerfile_passes_hadolint_and_copies_what_is_imported(tmp_path):
    hadolint, text = shutil.which("hadolint", path=PATH), (DEPLOY / "Dockerfile").read_text()
    assert subprocess.run([hadolint, DEPLOY / "Dockerfile"]).returncode == 0
    (tmp_path / "Dockerfile").write_text(text.replace("FROM python:3.11-slim-bookworm", "FROM python:latest"))
    assert "DL3007" in subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True).stdout
    copied = {name for name in re.findall(r"^COPY (\S+) ", text, re.M) if not name.startswith("--")}
    kept = set(re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M))
    code = [path for room in ("capstone", "common", "bench") for path in ROOT.glob(f"{room}/**/*.py")]
    sources = "".join(path.read_text() for path in code)
    imported = set(re.findall(r"^ *(?:from|import) (bench|common|config|capstone|data|day\d\d)\b", sources, re.M))
    assert imported <= copied and {name for name in copied if "/" not in name} == kept
    assert all((ROOT / name).exists() for name in copied)
    stages = {part.split()[3]: part for part in re.split(r"^(?=FROM )", text, flags=re.M)[1:]}
    assert "g++" in stages["train"] and not re.search(r"\b(g\+\+|gcc)\b", stages["base"] + stages["serve"])


def test_what_the_server_imports_is_pinned():
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for name in ("requirements.txt", "capstone/serve/requirements.txt")
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()}
    owners = packages_distributions()
    for path in (ROOT / "capstone/serve").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        for name in {name.split(".")[0] for name in names} - rooms - sys.stdlib_module_names:
            owner = owners[name][0].lower().replace("_", "-")
            assert owner in pinned, f"{path.name} imports {name}, and no requirements.txt pins {owner}"


def test_the_compose_file_is_valid():
    from compose_spec import PyCompose

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())  # merge keys and anchors resolved
    checked = PyCompose.from_json(json.dumps(compose))
    for check in (checked.validate, checked.validate_volumes, checked.validate_networks, checked.validate_secrets):
        check()
    with pytest.raises(ValueError, match="restrat"):
        PyCompose.from_json(json.dumps({"services": {"serve": compose["services"]["serve"] | {"restrat": "always"}}}))
    runs = "../../runs/capstone"
    for name, service in compose["services"].items():
        if service["image"].startswith(
            "capstone-"
        ):  # ours: an image of this name in a public registry is somebody else's
            assert service["pull_policy"] == "build" and service["build"]["target"] in service["image"], name
            assert service["read_only"] and service["tmpfs"] == ["/tmp"], f"{name}: as the checklist says"
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            there = source in compose["volumes"] or source.startswith(runs) or (DEPLOY / source).exists()
            assert there, f"{name}: {source}"
        for variable in re.findall(r"\$\{[^}]*\}", json.dumps(service)):
            assert ":-" in variable, f"{name}: without {variable} no service would start, {name} or not"
    home = re.search(r"HF_HOME=(\S+)", (DEPLOY / "Dockerfile").read_text())[1]
    assert f"hub:{home}" in compose["services"]["train"]["volumes"], "or each new container downloads it again"
    (mount,) = compose["services"]["serve"]["volumes"]
    assert mount["read_only"] and mount["target"] == "/app/" + mount["source"].removeprefix("../../")
    train = load_config(compose["services"]["train"]["command"][1], compose["services"]["train"]["command"][2:])
    watch = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    training, serving = watch["scrape_configs"]
    assert training == yaml.safe_load((ROOT / "capstone/alerts/prometheus.yml").read_text())["scrape_configs"][0]
    targets = f"../../{train.run_dir}/prometheus_targets.json"
    assert train.monitor.port and targets in training["file_sd_configs"][0]["files"], "Prometheus has something to read"
    assert all((DEPLOY / rules).exists() for rules in watch["rule_files"])
    port = serving["static_configs"][0]["targets"][0].split(":")[1]
    assert compose["services"]["serve"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert serving["authorization"]["credentials_file"] == f"/run/secrets/{[*compose['secrets']][0]}"
    stop = re.search(r"(\d+)s", compose["services"]["serve"]["stop_grace_period"])[1]
    assert int(stop) > 5 + 60  # --drain_s and --grace_s


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_manifests_fit_the_schemas_of_kubernetes(version):
    import kubernetes_validate

    kinds = []
    for name in MANIFESTS:
        for part in parts_of(name):
            kubernetes_validate.validate(part, version, strict=True)
            kinds.append(part["kind"])
    assert {"Job", "PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} == set(
        kinds
    )
    part["spec"]["policyType"] = ["Ingress"]
    with pytest.raises(kubernetes_validate.ValidationError, match="policyType"):
        kubernetes_validate.validate(part, version, strict=True)


def test_the_manifests_ask_the_server_what_it_answers():
    deployment = next(part for part in parts_of("kubernetes-serve.yaml") if part["kind"] == "Deployment")["spec"]
    pod = deployment["template"]["spec"]
    container = pod["containers"][0]
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    waits = [container[f"{kind}Probe"].get("timeoutSeconds", 1) for kind in ("startup", "readiness", "liveness")]
    assert min(waits) > 2, "/ready gives the model server 2 s"
    assert pod["terminationGracePeriodSeconds"] > 10 + 60 and pod["securityContext"]["runAsNonRoot"]
    spread = {rule["topologyKey"]: rule for rule in pod["topologySpreadConstraints"]}
    assert set(spread) == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
    for rule in spread.values():
        assert rule["labelSelector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()
    for part in parts_of("kubernetes-serve.yaml"):
        selector = part["spec"].get("selector") or part["spec"].get("podSelector")
        labels = selector.get("matchLabels", selector)
        assert labels.items() <= deployment["template"]["metadata"]["labels"].items()
    from capstone.serve.__main__ import parse_args  # its flags are those that manifests and compose use

    argv, sys.argv = sys.argv, ["serve", *container["args"]]
    try:
        assert parse_args().drain_s == 10
    finally:
        sys.argv = argv


def test_pods_see_their_own_run_alone_on_a_root_that_is_read_only():
    pods = {part["kind"]: part["spec"]["template"]["spec"] for name in MANIFESTS for part in parts_of(name)
            if part["kind"] in ("Job", "Deployment")}  # fmt: skip
    image = (DEPLOY / "Dockerfile").read_text()
    for kind, pod in pods.items():
        claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"], f"{kind}: as the checklist says"
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts.keys() == claims.keys() and mounts["tmp"]["mountPath"] == "/tmp"
        runs = mounts["runs"]
        assert claims["runs"] == "capstone-runs" and runs["mountPath"] == f"/app/runs/{runs['subPath']}"
    config = load_config(ROOT / pods["Job"]["containers"][0]["args"][1])
    job = {mount["name"]: mount for mount in pods["Job"]["containers"][0]["volumeMounts"]}
    assert job["runs"]["mountPath"] == f"/app/{config.run_dir}"
    assert f"HF_HOME={job['hub']['mountPath']} " in image  # 30 GB are not downloaded again by each new pod
    for cache in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
        assert re.search(rf"{cache}=/tmp/\w+", image), f"{cache}: its place is in a home that is read-only"
    served = pods["Deployment"]["containers"][0]
    assert f"/app/{served['args'][0]}" == served["volumeMounts"][0]["mountPath"] and runs["readOnly"]


def test_the_slurm_script_passes_shellcheck(tmp_path):
    shellcheck, text = shutil.which("shellcheck", path=PATH), (DEPLOY / "slurm.sh").read_text()
    assert subprocess.run([shellcheck, DEPLOY / "slurm.sh"]).returncode == 0
    (tmp_path / "bad.sh").write_text(text.replace('"$run/evaluation.json" ]', "$run/evaluation.json ]"))
    assert "SC2086" in subprocess.run([shellcheck, tmp_path / "bad.sh"], capture_output=True, text=True).stdout


def a_fake_training(tmp_path: Path, body: str) -> Path:
    """A folder in which capstone/train.py is `body`, beside the real config.py."""
    (tmp_path / "capstone").mkdir()
    (tmp_path / "capstone/train.py").write_text(body)
    return tmp_path


RANK = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
def stop(number, frame):
    Path(f"stopped_{rank}").write_text(str(number)); sys.exit(0)
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, stop)
Path(f"started_{rank}").write_text(" ".join(sys.argv[1:]) + f" {os.environ['WORLD_SIZE']} {os.environ['LOCAL_RANK']}")
if "fail" in sys.argv and rank == "1": sys.exit(3)
time.sleep(60)
"""


def wait_for(*paths: Path) -> None:
    ends = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < ends, f"no {paths}"
        time.sleep(0.02)


@pytest.mark.launch
def test_the_containers_first_process_passes_signals_to_every_rank(tmp_path):
    folder = a_fake_training(tmp_path, RANK)
    command = [sys.executable, DEPLOY / "launch.py", "--config", "x"]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "RANKS": "2"})
    wait_for(folder / "started_0", folder / "started_1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143  # saved, not done
    assert [(folder / f"stopped_{rank}").read_text() for rank in (0, 1)] == ["15", "15"]
    assert (folder / "started_1").read_text() == "--config x 2 1"
    failing = subprocess.run([*command, "fail"], cwd=folder, env={**os.environ, "RANKS": "2"}, timeout=30)
    assert failing.returncode == 3  # one lost, all lost, and the reason passed on


@pytest.mark.long
def test_the_slurm_script_starts_every_rank_and_queues_again_what_is_not_done(tmp_path):
    """With srun and scontrol made up: each task its rank, requeued until the model is there."""
    folder = a_fake_training(tmp_path, RANK.replace("time.sleep(60)", ""))
    (folder / "bin").mkdir()
    srun = '#!/bin/bash\nshift\nfor i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || exit; done\n'
    scontrol = '#!/bin/bash\n[ "$1" = show ] && echo node7 && exit\necho "$@" >> asked\n'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    env = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "PYTHON": sys.executable}
    env |= {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder / 'bin'}:{PATH}"} | env
    command = ["bash", DEPLOY / "slurm.sh", ROOT / "capstone/configs/tiny.yaml", f"run_dir={folder}/run"]
    first = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "not done, queued again" in first.stdout and (folder / "asked").read_text() == "requeue 4711\n"
    said = [(folder / f"started_{rank}").read_text().split()[-3:] for rank in (0, 1)]
    assert said == [[f"run_dir={folder}/run", "2", str(rank)] for rank in (0, 1)]
    (folder / "run").mkdir()
    (folder / "run/evaluation.json").touch()
    assert "done," in subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True).stdout
    assert (folder / "asked").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("page", ["runbook.md", "runbook.zh.md"])
def test_every_alert_has_its_section_in_the_runbook(page):
    rules = [yaml.safe_load((ROOT / f"capstone/{room}/rules.yml").read_text()) for room in ("alerts", "serve")]
    alerts = [rule["alert"] for file in rules for group in file["groups"] for rule in group["rules"] if "alert" in rule]
    text = (DEPLOY / page).read_text()
    sections = re.findall(r"^## ([A-Za-z]+)$", text, re.M)
    assert sections == alerts and len(alerts) >= 13
    for section in re.split(r"^## ", text, flags=re.M)[1 : len(alerts) + 1]:
        assert (
            re.search(r"^\*\*(Means|含义)", section, re.M) and re.search(r"^1\. ", section, re.M) and "2. " in section
        )
    nan = text.partition("## LossNaN")[2].partition("\n## ")[0]
    assert "checkpoint.stop_at_nan" in nan and Config.model_fields["checkpoint"].default.stop_at_nan
    for script in re.findall(r"(?:python|deepspeed [^\n]*?) ((?:day\d\d|config|capstone)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script


def test_runbook_and_checklist_tell_the_same_in_both_languages():
    for name in ("runbook", "checklist"):
        english, chinese = ((DEPLOY / f"{name}{suffix}.md").read_text() for suffix in ("", ".zh"))
        for pattern in (r"^#+", r"^\d\. ", r"^- (?:\[[x ]\])?", r"^```"):
            assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), (name, pattern)
        assert re.findall(r"^- (\[[x ]\])", english, re.M) == re.findall(r"^- (\[[x ]\])", chinese, re.M)
