"""Findings for people and for machines: text, JSON, SARIF 2.1.0, annotations of GitHub Actions."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from config.rules.checker import all_rules
from config.rules.finding import LEVELS, Finding
from config.rules.schema_file import version

Report = dict[str, list[Finding]]  # file -> findings


def as_text(report: Report) -> str:
    """Lines as compilers write them, coloured on a terminal, and a sum for each file."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    paint = {"error": "31", "warning": "33", "note": "36"} if colour else {}
    lines = []
    for name, findings in report.items():
        for f in findings:
            level = f"\x1b[1;{paint[f.level]}m{f.level}\x1b[0m" if colour else f.level
            at = f"{name}:{f.line}" if f.line else name
            lines.append(f"{at}: {level}: {f.path + ': ' if f.path else ''}{f.message}")
            lines += [f"    {f.fix}"] if f.fix else []
        counts = [f"{n} {level}{'s' * (n != 1)}" for level in LEVELS if (n := sum(f.level == level for f in findings))]
        lines.append(f"{name}: {', '.join(counts) or 'nothing to say'}")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    plain = {
        name: [{k: v for k, v in asdict(f).items() if k != "edits"} | {"fixable": bool(f.edits)} for f in findings]
        for name, findings in report.items()
    }
    return json.dumps(plain, indent=2)


def as_github(report: Report) -> str:
    """Workflow commands: https://docs.github.com/actions/reference/workflow-commands-for-github-actions"""

    def data(text):
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def attribute(text):
        return data(text).replace(":", "%3A").replace(",", "%2C")

    levels = {"note": "notice"}
    return "\n".join(
        f"::{levels.get(f.level, f.level)} file={attribute(name)},line={f.line or 1},"
        f"title={attribute(f'{f.path or name} ({f.rule})')}::{data(' '.join(filter(None, (f.message, f.fix))))}"
        for name, findings in report.items()
        for f in findings
    )


def as_sarif(report: Report) -> str:
    """Static Analysis Results Interchange Format 2.1.0, for code scanning."""
    known = {rule.id: rule.reason for rule in all_rules()}
    used = list(dict.fromkeys(f.rule for findings in report.values() for f in findings))
    driver = {
        "name": "ds-check",
        "version": version(),
        "informationUri": "https://www.deepspeed.ai/docs/config-json/",
        "rules": [{"id": rule, "shortDescription": {"text": known.get(rule) or rule}} for rule in used],
    }
    results = [
        {
            "ruleId": f.rule,
            "ruleIndex": used.index(f.rule),
            "level": f.level,
            "message": {"text": " ".join(filter(None, (f"{f.path}:" if f.path else "", f.message, f.fix)))},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": Path(name).as_posix()},
                        "region": {"startLine": f.line or 1},
                    }
                }
            ],
        }
        for name, findings in report.items()
        for f in findings
    ]
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2)


FORMATS: dict[str, Callable[[Report], str]] = {
    "text": as_text, "json": as_json, "sarif": as_sarif, "github": as_github}  # fmt: skip
