"""Day 27: the shipped Prometheus configuration, started for real on a faster clock; labs/watch.py asks it for alerts.

Every duration in the rules is divided by the same number, the scrape and evaluation intervals too; shares and ratios
stay. A module, nothing to start: take day27/prometheus.py along to watch another run.
Checked with Prometheus 2.42. Source: https://prometheus.io/docs/prometheus/2.42/querying/api/
"""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Python puts only this folder on the path; common/ is one level up

from bench.world import free_port
from common.errors import UserError
from common.run_log import show_path

ALERTS = ROOT / "capstone/alerts"
UNLISTED_S = 8  # the longest from a clean end until its targets are gone: file_sd 1 s, discovery 5 s, a scrape
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def find_tool(name: str) -> str:
    """The path of `prometheus`, `promtool` or `amtool`: on the PATH, or fetched into runs/tools."""
    if found := shutil.which(name):
        return found
    fetch = subprocess.run([ALERTS / "get_tools.sh", ROOT / "runs/tools"], capture_output=True, text=True)
    if fetch.returncode:
        raise UserError(fetch.stderr.strip().removeprefix("error: "))
    return str(ROOT / "runs/tools/usr/bin" / name)


def seconds(duration: str) -> float:
    """Prometheus's durations: 15s, 1h30m -> seconds."""
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|s|m|h|d)", duration))


def faster(duration: str, speedup: float) -> str:
    return f"{max(1, round(1000 * seconds(duration) / speedup))}ms"


def scale_rules(rules: dict, speedup: float) -> dict:
    """The rules with every duration divided: `for`, `within`, those of an expression and its bare seconds (300, 1800).

    Prometheus passes on a new list of targets every 5 s at most, whatever the clock: what hangs on it gets UNLISTED_S.
    """
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        within, longer = seconds(rule["annotations"]["within"]) / speedup, 0
        if re.search(r"\bup\{|training_starts", rule["expr"]):
            longer = UNLISTED_S
        if "for" in rule:
            waits = seconds(rule["for"]) / speedup
            rule["for"] = f"{round(1000 * max(waits, longer))}ms"
        rule["annotations"]["within"] = f"{round(1000 * (within + longer))}ms"
        rule["expr"] = re.sub(
            r"\b(\d+(?:ms|s|m|h|d))\b|\b(\d{3,})\b",
            lambda found: faster(found[1], speedup) if found[1] else f"{int(found[2]) / speedup}",
            rule["expr"],
        )
    return rules


class Prometheus:
    """A Prometheus of our own, with the shipped configuration on a faster clock."""

    def __init__(self, folder: Path, targets: Path, speedup: float) -> None:
        self.rules = scale_rules(yaml.safe_load((ALERTS / "rules.yml").read_text()), speedup)
        config = yaml.safe_load((ALERTS / "prometheus.yml").read_text())
        self.interval = faster(config["global"]["scrape_interval"], speedup)
        config["global"] = {"scrape_interval": self.interval, "evaluation_interval": self.interval}
        config.pop("alerting")
        job = config["scrape_configs"][0]
        job["scrape_timeout"] = self.interval
        job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
        (folder / "rules.yml").write_text(yaml.safe_dump(self.rules))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [find_tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
        command += [
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        with open(folder / "prometheus.log", "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(100):
            if self.process.poll() is None and self.answers():
                return
            time.sleep(0.1)
        raise UserError(f"prometheus did not start: see {show_path(folder / 'prometheus.log')}")

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/-/ready", timeout=2).status == 200
        except OSError:
            return False

    def get(self, what: str, **query: object) -> dict:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        return json.load(urllib.request.urlopen(url, timeout=10))["data"]

    def value(self, query: str) -> int:
        """The one number that `query` gives; 0 where there is none."""
        found = self.get("query", query=query)["result"]
        return int(float(found[0]["value"][1])) if found else 0

    def firing(self) -> dict[str, str]:
        """{alert: summary} of what fires now."""
        alerts = [alert for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"]
        return {alert["labels"]["alertname"]: alert["annotations"]["summary"] for alert in alerts}

    def first_fired(self, start: float) -> dict[str, float]:
        """{alert: unix time of the first evaluation at which it fired}."""
        query = {"query": 'ALERTS{alertstate="firing"}', "start": start, "end": time.time()}
        query["step"] = max(seconds(self.interval), (time.time() - start) / 10_000)
        first = {}
        for series in self.get("query_range", **query)["result"]:
            name = series["metric"]["alertname"]
            first[name] = min(first.get(name, 1e18), float(series["values"][0][0]))
        return first

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
