"""Alerts and dashboards: each alert has a test and a runbook; each asks for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_metrics import documented

PROMETHEUS = ROOT / "docker/prometheus"
DASHBOARDS = sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))

ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
TESTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]


def expectations(alert: str) -> Iterator[list[Any]]:
    """What the tests expect of an alert, each time that they look."""
    for test in TESTS:
        for look in test["promql_expr_test"]:
            if f'alertname="{alert}"' in look["expr"]:
                yield look["exp_samples"]


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_fires_in_a_test_and_is_silent_in_one(alert: str) -> None:
    found = list(expectations(alert))
    assert [] in found
    assert any(samples for samples in found)


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_runbook_a_summary_and_a_severity(alert: str) -> None:
    annotations = ALERTS[alert]["annotations"]
    assert annotations["runbook"] == f"docs/runbooks.md#{alert.lower()}"
    assert annotations["summary"]
    assert ALERTS[alert]["labels"]["severity"] in ("page", "ticket")


def test_runbooks_are_those_of_the_alerts_in_their_order() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert sections == list(ALERTS)


def promtool() -> str:
    unpacked = ROOT / ".cache/debian/prometheus/usr/bin/promtool"
    found = shutil.which("promtool") or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        # `make test` fetches it by apt, and fails where that fails; other systems have no such
        # package, and only who changes rules needs it there.
        assert shutil.which("apt-get") is None, "no promtool: `scripts/get-promtool` fetches it"
        pytest.skip("there is no promtool, and no apt to fetch it: install Prometheus")
    return found


def run_rule_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [promtool(), "test", "rules", "alerts.test.yml"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_rule_tests_pass() -> None:
    done = run_rule_tests(PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rule_tests_fail_for_each_alert_that_never_fires(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    mute = [{**rule, "expr": "vector(0) == 1"} for rule in ALERTS.values()]
    rules = {"groups": [{"name": "philharmonics", "rules": mute}]}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(PROMETHEUS / "alerts.test.yml", tmp_path)
    done = run_rule_tests(tmp_path)
    assert done.returncode != 0
    missed = re.findall(r'alertname="(\w+)"', done.stdout + done.stderr)
    assert set(missed) == set(ALERTS)


def asked_for(path: Path) -> set[str]:
    """Names of our metrics in a file, without what Prometheus adds to them."""
    names = re.findall(r"philharmonics_[a-z_]+", path.read_text())
    known = set(documented())
    return {name if name in known else re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


@pytest.mark.parametrize(
    "path",
    [*sorted(PROMETHEUS.glob("*.yml")), *DASHBOARDS, ROOT / "docs/runbooks.md"],
    ids=lambda path: path.name,
)
def test_only_metrics_that_there_are_are_asked_for(path: Path) -> None:
    assert asked_for(path) <= set(documented())


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_is_whole(path: Path) -> None:
    board = json.loads(path.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel lies on another
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        assert panel["title"] and panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["expr"] for target in panel["targets"])


def test_every_query_of_the_dashboards_is_understood_by_prometheus(tmp_path: Path) -> None:
    queries = {
        target["expr"].replace("$__rate_interval", "5m")
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    }
    assert len(queries) > 30
    rules = [{"record": f"q{i}", "expr": query} for i, query in enumerate(sorted(queries))]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]})
    )
    done = subprocess.run(
        [promtool(), "check", "rules", "rules.yml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["callers.json", "operators.json"])
def test_committed_dashboard_is_what_its_rows_make(name: str, tmp_path: Path) -> None:
    script = ROOT / "docker/grafana/make_dashboards.py"
    shutil.copy(script, tmp_path)
    (tmp_path / "dashboards").mkdir()
    subprocess.run([sys.executable, tmp_path / script.name], check=True, timeout=60)
    made = (tmp_path / "dashboards" / name).read_text()
    assert made == (ROOT / "docker/grafana/dashboards" / name).read_text()
