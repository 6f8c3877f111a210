"""The Grafana boards: their form, and the queries in them."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "grafana"
COLUMNS = 24
KINDS = {"row", "stat", "timeseries"}
# Of Grafana's list of units; "suffix:" makes one up.
UNITS = {"short", "s", "bytes", "Bps", "percentunit", "reqps"}
# What stands for a board's variables where nobody has chosen anything.
VARIABLES = {"namespace": ".*", "model": ".*", "__rate_interval": "30s"}


def boards():
    """{file name: board}."""
    return {path.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(FOLDER.glob("*.json"))}


def panels(board):
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def filled_in(query):
    return re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], query)


# What only some have, by how a query asks for it: ranks on GPUs, calls that show keys, TLS.
PARTS = {"gpus": 'device="cuda"', "tenants": "nibble_gateway_tenant_tokens_total",
         "tls": "nibble_tls_"}


def parts(query):
    """Those of PARTS without which a query has no data."""
    return {part for part, text in PARTS.items() if text in query}


def queries(board):
    """(panel title, query without variables) of every query."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield panel["title"], filled_in(target["expr"])


def overlap(one, other):
    return (one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"] and
            one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"])


def panel_faults(panel):
    if panel["type"] not in KINDS:
        yield f"kind {panel['type']}"
    if not panel["title"]:
        yield "no title"
    place = panel["gridPos"]
    if place["x"] < 0 or place["x"] + place["w"] > COLUMNS or place["w"] < 1 or place["h"] < 1:
        yield f"place {place}"
    if panel["type"] == "row":
        return
    if panel["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
        yield "a data source of its own"
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if unit not in UNITS and not unit.startswith("suffix:"):
        yield f"unit {unit}"
    references = [target["refId"] for target in panel["targets"]]
    if not references or len(set(references)) != len(references):
        yield f"references {references}"
    for target in panel["targets"]:
        unknown = set(re.findall(r"\$(\w+)", target["expr"])) - set(VARIABLES)
        if unknown:
            yield f"unknown variables {sorted(unknown)}"


def faults(name, board):
    """What is wrong with the form of a board."""
    for key in ("uid", "title", "schemaVersion", "panels", "templating", "time"):
        if not board.get(key):
            yield f"{name}: no {key}"
    numbers = [panel["id"] for panel in board["panels"]]
    if len(set(numbers)) != len(numbers):
        yield f"{name}: a panel's number twice"
    declared = {variable["name"] for variable in board["templating"]["list"]}
    if not {"datasource", "namespace", "model"} <= declared:
        yield f"{name}: variables {sorted(declared)}"
    for index, panel in enumerate(board["panels"]):
        for fault in panel_faults(panel):
            yield f"{name}: \"{panel['title']}\": {fault}"
        for other in board["panels"][:index]:
            if overlap(panel["gridPos"], other["gridPos"]):
                yield f"{name}: \"{panel['title']}\" lies over \"{other['title']}\""


def all_faults():
    found = boards()
    if sorted(found) != ["engine.json", "memory.json", "service.json", "tensor-parallel.json"]:
        yield f"boards are {sorted(found)}"
    for name, board in found.items():
        yield from faults(name, board)
    uids = [board["uid"] for board in found.values()]
    if len(set(uids)) != len(uids):
        yield f"uids are {uids}"
