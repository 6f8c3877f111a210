"""The recording rules and alerts: promtool's checks and tests, and what else must hold."""

import pathlib
import re
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
TESTS = ROOT / "tests" / "deploy" / "alerts_test.yaml"
RUNBOOK = ROOT / "docs" / "OPERATIONS.md"
SEVERITIES = {"critical", "warning", "info"}
COMMAND_SECONDS = 60
SELECTOR = re.compile(r"\b((?:\w+:)?(?:nibble|grpc_server|up)\w*(?::\w+)*)(\{[^}]*\})?")


def rules():
    """Every rule of every file."""
    found = []
    for path in sorted(FOLDER.glob("*.rules.yaml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            found += group["rules"]
    return found


def alerts():
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def selectors(query):
    """The vector selectors of a query, without ranges."""
    bare = re.sub(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", "", query)
    return sorted({name + (matchers or "") for name, matchers in SELECTOR.findall(bare)})


def promtool(*words):
    result = subprocess.run(["promtool", *map(str, words)], cwd=FOLDER, capture_output=True,
                            text=True, check=False, timeout=COMMAND_SECONDS)
    return result.returncode == 0, (result.stdout + result.stderr).strip()


def all_faults():
    for words in (("check", "rules", *sorted(FOLDER.glob("*.rules.yaml"))),
                  ("check", "config", FOLDER / "prometheus.yml"),
                  ("test", "rules", TESTS)):
        ok, output = promtool(*words)
        if not ok:
            yield output
    yield from coverage_faults()
    yield from runbook_faults()


def coverage_faults():
    """Each alert is tested firing and not firing."""
    fires, silent = set(), set()
    for test in yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]:
        for case in test.get("alert_rule_test", []):
            (fires if case.get("exp_alerts") else silent).add(case["alertname"])
    for name in alerts():
        if name not in fires:
            yield f"{name} is nowhere tested firing"
        if name not in silent:
            yield f"{name} is nowhere tested silent"
    for name in (fires | silent) - set(alerts()):
        yield f"{name} is tested and is no alert"


def runbook_faults():
    """Each alert has its entry in the runbook, and each entry its alert."""
    entries = set(re.findall(r"^#### (Nibble\w+)$", RUNBOOK.read_text(encoding="utf-8"),
                             re.MULTILINE))
    for name, rule in alerts().items():
        if name not in entries:
            yield f"{name} has no entry in {RUNBOOK.name}"
        if rule["annotations"].get("runbook") != f"docs/OPERATIONS.md#{name.lower()}":
            yield f"{name} names another runbook"
        if rule["labels"].get("severity") not in SEVERITIES:
            yield f"{name} has no severity"
        if not rule["annotations"].get("summary") or not rule["annotations"].get("description"):
            yield f"{name} does not say what is wrong"
    for name in entries - set(alerts()):
        yield f"{RUNBOOK.name} has an entry for {name}, which is no alert"
