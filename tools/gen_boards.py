#!/usr/bin/env python3
"""Writes the Grafana boards of deploy/grafana from what they show.

usage: tools/gen_boards.py [--check]   (--check: say whether the files are up to date)
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "deploy" / "grafana"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
MODEL = 'namespace=~"$namespace",model=~"$model"'
PLACE = 'namespace=~"$namespace"'
# Panels of GPUs alone: there is no data where ranks are CPUs.
GPU = MODEL + ',device="cuda"'
RATE = "$__rate_interval"


def quantiles(metric, by=(), where=MODEL):
    """(legend, query) of the median, the 90th and the 99th percentile of a histogram."""
    groups = ", ".join((*by, "le"))
    legend = "".join(f" {{{{{label}}}}}" for label in by)
    return [(f"p{share}{legend}",
             f"histogram_quantile({share / 100:g}, sum by ({groups}) "
             f"(rate({metric}_bucket{{{where}}}[{RATE}])))") for share in (50, 90, 99)]


def rate(metric, by, where=MODEL):
    groups = ", ".join(by)
    return (" ".join(f"{{{{{label}}}}}" for label in by),
            f"sum by ({groups}) (rate({metric}{{{where}}}[{RATE}]))")


def panel(title, queries, unit="short", **options):
    """A panel of a board. options: kind, width, height, stack, limits, description."""
    return {"title": title, "queries": queries, "unit": unit, **options}


def stat(title, query, unit="short", limits=None, description=""):
    return panel(title, [("", query)], unit, kind="stat", width=4, height=4, limits=limits,
                 description=description)


SERVICE = [
    "Now",
    stat("Models served", f"sum(max by (namespace, model) (nibble_gateway_model_ready{{{MODEL}}}))",
         limits=[("red", None), ("green", 1)]),
    stat("Groups reached",
         f"sum(max by (namespace, worker) (nibble_gateway_worker_up{{{PLACE}}}))",
         limits=[("red", None), ("green", 1)]),
    stat("Requests in flight", f"sum(nibble_gateway_requests_inflight{{{MODEL}}})"),
    stat("Tokens generated", f"sum(rate(nibble_gateway_generated_tokens_total{{{MODEL}}}[{RATE}]))",
         "suffix: tokens/s"),
    stat("First token, p99",
         f"histogram_quantile(0.99, sum by (le) "
         f"(rate(nibble_gateway_time_to_first_token_seconds_bucket{{{MODEL}}}[{RATE}])))", "s",
         limits=[("green", None), ("orange", 2), ("red", 10)]),
    stat("Calls that fail",
         f'sum(rate(grpc_server_handled_total{{{PLACE},'
         f'grpc_code=~"INTERNAL|UNAVAILABLE|UNKNOWN|DATA_LOSS"}}[{RATE}])) / '
         f"sum(rate(grpc_server_handled_total{{{PLACE}}}[{RATE}]))", "percentunit",
         limits=[("green", None), ("red", 0.05)]),
    "Requests",
    panel("Calls by status", [rate("grpc_server_handled_total", ["grpc_code"], PLACE)], "reqps"),
    panel("Calls by method", [rate("grpc_server_started_total", ["grpc_method"], PLACE)], "reqps"),
    panel("Requests that ended",
          [rate("nibble_gateway_requests_total", ["model", "code", "finish_reason"])], "reqps"),
    panel("In flight", [
        ("admitted {{model}}",
         f"sum by (model) (nibble_gateway_requests_inflight{{{MODEL}}})"),
        ("calls", f"sum(nibble_gateway_calls_inflight{{{PLACE}}})"),
        ("streams to groups", f"sum(nibble_gateway_upstream_streams{{{PLACE}}})")]),
    panel("Refused by the gateways",
          [rate("nibble_gateway_requests_rejected_total", ["reason"], PLACE)], "reqps"),
    panel("Sent again, and ended early", [
        (f"retry {legend}", query) for legend, query in
        [rate("nibble_gateway_retries_total", ["reason"], PLACE)]] + [
        (f"cancelled by {legend}", query) for legend, query in
        [rate("nibble_gateway_stream_cancelled_total", ["by"], PLACE)]], "reqps"),
    "Speed",
    panel("Tokens", [
        (f"{word} {legend}", query) for word, (legend, query) in (
            ("generated", rate("nibble_gateway_generated_tokens_total", ["model"])),
            ("prompt", rate("nibble_gateway_prompt_tokens_total", ["model"])))],
          "suffix: tokens/s"),
    panel("Time to the first token", quantiles("nibble_gateway_time_to_first_token_seconds"), "s"),
    panel("Time between tokens", quantiles("nibble_gateway_inter_token_latency_seconds"), "s"),
    panel("Time of a whole request", quantiles("nibble_gateway_request_duration_seconds"), "s"),
    panel("Time in each stage", quantiles("nibble_gateway_stage_duration_seconds", ("stage",),
                                          PLACE), "s"),
    panel("Size of requests", [
        (f"{word} {legend}", query) for word, metric in (
            ("prompt", "nibble_gateway_request_prompt_tokens"),
            ("generated", "nibble_gateway_request_generated_tokens"))
        for legend, query in quantiles(metric)], "suffix: tokens"),
    panel("Time of a call, by method", quantiles("grpc_server_handling_seconds", ("grpc_method",),
                                                 PLACE), "s"),
    "Tenants and queues",
    panel("Sent and not admitted yet, by priority", [
        ("{{model}} {{priority}}",
         f"sum by (model, priority) (nibble_gateway_queue_depth{{{MODEL}}})")], stack=True),
    panel("Tokens of each tenant", [
        rate("nibble_gateway_tenant_tokens_total", ["tenant", "type"], PLACE)],
          "suffix: tokens/s", description="Where calls show keys; charged as quotas are."),
    panel("Refused for their keys", [
        rate("nibble_gateway_requests_rejected_total", ["reason"],
             PLACE + ',reason=~"unauthenticated|forbidden|quota"')], "reqps"),
    panel("Draining", [("{{instance}}", f"nibble_gateway_draining{{{PLACE}}}")]),
    "Groups",
    panel("Reached", [("{{worker}}", f"max by (worker) (nibble_gateway_worker_up{{{PLACE}}})")]),
    panel("Breaker (0 closed, 1 half open, 2 open)",
          [("{{worker}}", f"max by (worker) (nibble_gateway_worker_breaker_state{{{PLACE}}})")]),
    panel("Sequences at each group", [
        ("{{worker}}",
         f"sum by (worker) (nibble_gateway_worker_sequences_inflight{{{PLACE}}})")], stack=True),
    panel("Routing", [rate("nibble_gateway_routing_decisions_total", ["worker", "outcome"],
                           PLACE)], "reqps"),
    panel("Waiting inside the gateways", [
        ("texts to tokenize", f"sum(nibble_gateway_tokenize_queue_depth{{{PLACE}}})")]),
    panel("Bytes that clients have not read",
          [("{{instance}}", f"nibble_gateway_stream_buffered_bytes{{{PLACE}}}")], "bytes"),
    "TLS",
    panel("Time left of certificates", [
        ("{{use}} {{file}} {{instance}}",
         f"nibble_tls_expiry_timestamp_seconds{{{PLACE}}} - time()")], "s",
          description="Of gateways and groups, where they have TLS; an alert below seven days."),
    panel("Files read again", [
        rate("nibble_tls_reloads_total", ["use", "result"], PLACE)], "reqps"),
    panel("Files that do not hold",
          [("{{use}} {{instance}}", f"nibble_tls_files_stale{{{PLACE}}}")]),
]

ENGINE = [
    "Work",
    panel("Requests", [
        ("running {{model}}", f"sum by (model) (nibble_requests_running{{{MODEL}}})"),
        ("waiting {{model}}", f"sum by (model) (nibble_requests_waiting{{{MODEL}}})")]),
    panel("Prompt tokens that wait",
          [("{{instance}}", f"nibble_waiting_prompt_tokens{{{MODEL}}}")], "suffix: tokens"),
    panel("Slots and steps in flight", [
        ("slots {{instance}}", f"nibble_slots_used{{{MODEL}}}"),
        ("steps {{instance}}", f"nibble_steps_in_flight{{{MODEL}}}")]),
    panel("Tokens", [
        (f"{word} {legend}", query) for word, (legend, query) in (
            ("generated", rate("nibble_generated_tokens_total", ["instance"])),
            ("prompt", rate("nibble_prompt_tokens_total", ["instance", "source"])))],
          "suffix: tokens/s"),
    "Steps",
    panel("Steps by kind", [rate("nibble_engine_steps_total", ["kind"])], "suffix: steps/s"),
    panel("Time of a step", quantiles("nibble_step_duration_seconds", ("kind",)), "s"),
    panel("Tokens of a step", [
        ("mean {{instance}}",
         f"sum by (instance) (rate(nibble_step_tokens_sum{{{MODEL}}}[{RATE}])) / "
         f"sum by (instance) (rate(nibble_step_tokens_count{{{MODEL}}}[{RATE}]))"),
        *quantiles("nibble_step_tokens")], "suffix: tokens"),
    panel("Age of the last step", [
        ("{{instance}}",
         f"time() - (nibble_engine_last_step_timestamp_seconds{{{MODEL}}} > 0)")], "s",
        description="Grows while a group is idle; with work it stays under the step deadline."),
    "Latency, as the leader sees it",
    panel("Time to the first token", quantiles("nibble_time_to_first_token_seconds"), "s"),
    panel("Time between tokens", quantiles("nibble_inter_token_latency_seconds"), "s"),
    panel("Time in the queue", quantiles("nibble_request_queue_duration_seconds"), "s"),
    panel("Time of a whole request", quantiles("nibble_request_duration_seconds"), "s"),
    "KV cache",
    panel("Use", [("{{instance}}", f"nibble_kv_cache_usage_ratio{{{MODEL}}}")], "percentunit"),
    panel("Blocks by state",
          [("{{state}}", f"sum by (state) (nibble_kv_cache_blocks{{{MODEL}}})")], stack=True),
    panel("Prompt tokens found cached, share", [
        ("{{instance}}",
         f"sum by (instance) (rate(nibble_prefix_cache_hit_tokens_total{{{MODEL}}}[{RATE}])) / "
         f"sum by (instance) (rate(nibble_prefix_cache_queried_tokens_total{{{MODEL}}}[{RATE}]))")],
          "percentunit"),
    panel("Preemptions", [rate("nibble_preemptions_total", ["instance"])], "suffix: /s"),
    panel("Rows that were not finite",
          [rate("nibble_nonfinite_logits_total", ["instance"])], "suffix: /s"),
    "GPUs",
    panel("Tokens of a GPU", [
        (f"{word} {{{{instance}}}}",
         f"sum by (instance) (rate(nibble_{metric}_tokens_total{{{MODEL}}}[{RATE}])) / "
         f'count by (instance) (nibble_memory_bytes{{{GPU},kind="weights"}})')
        for word, metric in (("generated", "generated"), ("prompt", "prompt"))],
          "suffix: tokens/s"),
    panel("Tokens of a step on GPUs, mean", [
        ("{{instance}}",
         f"sum by (instance) (rate(nibble_step_tokens_sum{{{MODEL}}}[{RATE}])) / "
         f"sum by (instance) (rate(nibble_step_tokens_count{{{MODEL}}}[{RATE}])) and "
         f"on (instance) nibble_memory_bytes{{{GPU}}}")], "suffix: tokens"),
    "Ends",
    panel("Requests by how they ended",
          [rate("nibble_requests_total", ["code", "finish_reason"])], "reqps"),
    panel("Requests refused", [rate("nibble_requests_rejected_total", ["reason"])], "reqps"),
    panel("Ready, draining", [
        ("ready {{instance}}", f"nibble_model_ready{{{MODEL}}}"),
        ("draining {{instance}}", f"nibble_draining{{{MODEL}}}")]),
    panel("Builds and models", [
        ("{{component}} {{version}} {{git}}",
         f"count by (component, version, git) (nibble_build_info{{{PLACE}}})"),
        ("{{model}} {{quant}} g{{group_size}} tp {{tp}} {{numerics}}",
         f"count by (model, quant, group_size, tp, numerics) (nibble_model_info{{{MODEL}}})")]),
]

MEMORY = [
    "Now",
    stat("All ranks", f"sum(nibble_memory_bytes{{{MODEL}}})", "bytes"),
    stat("Weights", f'sum(nibble_memory_bytes{{{MODEL},kind="weights"}})', "bytes"),
    stat("KV cache", f'sum(nibble_memory_bytes{{{MODEL},kind="kv_cache"}})', "bytes"),
    stat("Positions that fit",
         f"sum(nibble_kv_cache_blocks_capacity{{{MODEL}}} * "
         f"nibble_kv_cache_block_tokens{{{MODEL}}})", "suffix: tokens"),
    stat("KV cache in use", f"max(nibble_kv_cache_usage_ratio{{{MODEL}}})", "percentunit",
         limits=[("green", None), ("orange", 0.9), ("red", 0.95)]),
    stat("Beyond the plan",
         f'max(sum by (instance, rank) (nibble_memory_bytes{{{MODEL},kind!="context"}}) / '
         f"sum by (instance, rank) (nibble_memory_planned_bytes{{{MODEL}}}) - 1)", "percentunit",
         limits=[("green", None), ("red", 0.02)]),
    "By owner",
    panel("All ranks", [("{{kind}}", f"sum by (kind) (nibble_memory_bytes{{{MODEL}}})")], "bytes",
          stack=True),
    panel("Each rank", [
        ("{{instance}} rank {{rank}} {{device}}",
         f"sum by (instance, rank, device) (nibble_memory_bytes{{{MODEL}}})")], "bytes"),
    panel("Weights of each rank", [
        ("{{instance}} rank {{rank}}", f'nibble_memory_bytes{{{MODEL},kind="weights"}}')], "bytes"),
    panel("Activations and workspace of each rank", [
        ("{{instance}} rank {{rank}} {{kind}}",
         f'nibble_memory_bytes{{{MODEL},kind=~"activations|workspace"}}')], "bytes"),
    "Plan",
    panel("Planned", [
        ("{{kind}}", f"sum by (kind) (nibble_memory_planned_bytes{{{MODEL}}})")], "bytes",
        stack=True),
    panel("Held minus planned", [
        ("{{instance}} rank {{rank}} {{kind}}",
         f"nibble_memory_bytes{{{MODEL}}} - nibble_memory_planned_bytes{{{MODEL}}}")], "bytes",
        below_zero=True),
    "Use",
    panel("KV bytes that hold positions", [
        ("{{instance}}",
         f'sum by (instance, model) (nibble_memory_bytes{{{MODEL},kind="kv_cache"}}) * '
         f"on (instance, model) nibble_kv_cache_usage_ratio{{{MODEL}}}")], "bytes"),
    panel("Bytes that clients have not read",
          [("{{instance}}", f"nibble_gateway_stream_buffered_bytes{{{PLACE}}}")], "bytes"),
    "GPUs",
    panel("Each GPU", [
        ("{{instance}} rank {{rank}} {{kind}}", f"nibble_memory_bytes{{{GPU}}}")], "bytes",
          stack=True),
    panel("Held minus planned, without what was there before", [
        ("{{instance}} rank {{rank}}",
         f'sum by (instance, rank) (nibble_memory_bytes{{{GPU},kind!="context"}}) - '
         f"sum by (instance, rank) (nibble_memory_planned_bytes{{{GPU}}})")], "bytes",
        below_zero=True),
    panel("Graphs, kernels and libraries", [
        ("held {{instance}} rank {{rank}}", f'nibble_memory_bytes{{{GPU},kind="graphs"}}'),
        ("planned {{instance}} rank {{rank}}",
         f'nibble_memory_planned_bytes{{{GPU},kind="graphs"}}')], "bytes"),
    panel("Taken before: the driver and others", [
        ("{{instance}} rank {{rank}}", f'nibble_memory_bytes{{{GPU},kind="context"}}')], "bytes"),
]

TENSOR_PARALLEL = [
    "Now",
    stat("Ranks up", f"sum(nibble_rank_up{{{MODEL}}})"),
    stat("Ranks down", f"count(nibble_rank_up{{{MODEL}}}) - sum(nibble_rank_up{{{MODEL}}})",
         limits=[("green", None), ("red", 1)]),
    stat("Groups ready", f"sum(nibble_model_ready{{{MODEL}}})"),
    stat("Tokens of a rank",
         f"sum(rate(nibble_generated_tokens_total{{{MODEL}}}[{RATE}])) / "
         f"sum(nibble_rank_up{{{MODEL}}})", "suffix: tokens/s"),
    stat("Exchanged", f"sum(rate(nibble_collective_bytes_total{{{MODEL}}}[{RATE}]))", "Bps"),
    stat("Slowest start", f"max(nibble_startup_duration_seconds{{{MODEL}}})", "s"),
    "Ranks",
    panel("Up", [("{{instance}} rank {{rank}}", f"nibble_rank_up{{{MODEL}}}")]),
    panel("Steps", [rate("nibble_rank_steps_total", ["instance", "rank"])], "suffix: steps/s"),
    panel("Steps between the first and the last rank", [
        ("{{instance}}",
         f"max by (instance, model) (nibble_rank_steps_total{{{MODEL}}}) - "
         f"min by (instance, model) (nibble_rank_steps_total{{{MODEL}}})")],
        description="Ranks run the same steps; two may be in flight."),
    panel("Start, by phase", [
        ("{{instance}} rank {{rank}} {{phase}}", f"nibble_startup_duration_seconds{{{MODEL}}}")],
        "s"),
    "Between ranks",
    panel("Bytes given to collectives", [
        rate("nibble_collective_bytes_total", ["instance", "rank"])], "Bps"),
    panel("Bytes of a step", [
        ("{{instance}} rank {{rank}}",
         f"sum by (instance, rank) (rate(nibble_collective_bytes_total{{{MODEL}}}[{RATE}])) / "
         f"sum by (instance, rank) (rate(nibble_rank_steps_total{{{MODEL}}}[{RATE}]))")], "bytes"),
    panel("Memory of each rank", [
        ("{{instance}} rank {{rank}}",
         f"sum by (instance, rank) (nibble_memory_bytes{{{MODEL}}})")], "bytes"),
    panel("Time of a decode step",
          quantiles("nibble_step_duration_seconds", ("instance",), MODEL + ',kind="decode"'), "s"),
]

BOARDS = {"service": ("Service", SERVICE), "engine": ("Engine", ENGINE),
          "memory": ("Memory", MEMORY), "tensor-parallel": ("Tensor parallel", TENSOR_PARALLEL)}


def thresholds(limits):
    return {"mode": "absolute", "steps": [{"color": color, "value": value}
                                          for color, value in limits or [("green", None)]]}


def grafana_panel(number, spec, place):
    kind = spec.get("kind", "timeseries")
    defaults = {"unit": spec["unit"], "thresholds": thresholds(spec.get("limits"))}
    if kind == "timeseries":
        defaults["min"] = None if spec.get("below_zero") else 0
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 30 if spec.get("stack") else 5,
                              "showPoints": "never",
                              "stacking": {"mode": "normal" if spec.get("stack") else "none"}}
        options = {"legend": {"displayMode": "table", "placement": "bottom",
                              "calcs": ["lastNotNull", "max"]},
                   "tooltip": {"mode": "multi", "sort": "desc"}}
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value",
                   "graphMode": "area"}
    return {"id": number, "type": kind, "title": spec["title"],
            "description": spec.get("description", ""), "datasource": SOURCE, "gridPos": place,
            "fieldConfig": {"defaults": {key: value for key, value in defaults.items()
                                         if value is not None}, "overrides": []},
            "options": options,
            "targets": [{"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query,
                         "legendFormat": legend or "__auto"}
                        for index, (legend, query) in enumerate(spec["queries"])]}


def layout(specs):
    """Panels side by side from the left, a row's title above each section."""
    x, y, height, number = 0, 0, 0, 0
    for spec in specs:
        number += 1
        if isinstance(spec, str):
            y, x, height = y + height, 0, 0
            yield {"id": number, "type": "row", "title": spec, "collapsed": False, "panels": [],
                   "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}}
            y += 1
            continue
        width, tall = spec.get("width", 12), spec.get("height", 8)
        if x + width > COLUMNS:
            x, y, height = 0, y + height, 0
        yield grafana_panel(number, spec, {"x": x, "y": y, "w": width, "h": tall})
        x, height = x + width, max(height, tall)


def variable(name, label, query):
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE,
            "query": {"query": query, "refId": name}, "definition": query, "refresh": 2, "sort": 1,
            "multi": True, "includeAll": True, "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]}}


def board(name, title, specs):
    return {"uid": f"nibble-{name}", "title": f"nibble / {title}", "tags": ["nibble"],
            "schemaVersion": 39, "version": 1, "editable": True, "graphTooltip": 1,
            "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "timezone": "",
            "annotations": {"list": []},
            "links": [{"type": "dashboards", "title": "nibble", "tags": ["nibble"],
                       "asDropdown": False, "includeVars": True, "keepTime": True}],
            "templating": {"list": [
                {"name": "datasource", "label": "Source", "type": "datasource",
                 "query": "prometheus"},
                variable("namespace", "Namespace",
                         "label_values(nibble_build_info, namespace)"),
                variable("model", "Model", 'label_values(nibble_gateway_model_ready'
                         '{namespace=~"$namespace"}, model)')]},
            "panels": list(layout(specs))}


def main():
    stale = []
    for name, (title, specs) in BOARDS.items():
        path = FOLDER / f"{name}.json"
        text = json.dumps(board(name, title, specs), indent=1, ensure_ascii=False) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv[1:] and stale:
        print(f"not what tools/gen_boards.py writes: {', '.join(stale)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
