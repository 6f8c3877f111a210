#!/usr/bin/env python3
"""A real Prometheus scrapes a server under load: every query of every board returns data, every
selector of every rule returns series, no rule fails and no alert fires or is about to. The
server's log, at its most talkative, has nothing of a prompt.

usage: tests/deploy/live_metrics.py   (NIBBLE_BINARY_DIR, NIBBLE_TEST_DATA as for tests/e2e)
"""

import concurrent.futures
import json
import math
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "e2e"), str(ROOT / "tests" / "deploy")]

import boards  # noqa: E402  pylint: disable=wrong-import-position
import harness  # noqa: E402  pylint: disable=wrong-import-position
import rules  # noqa: E402  pylint: disable=wrong-import-position
import secured  # noqa: E402  pylint: disable=wrong-import-position

LOAD_SECONDS = 15
CLIENTS = 6
PROMPT = "One, two, three, "
READY_SECONDS = 30
# What a machine that is busy otherwise may begin to say.
THERE = {"tenants", "tls"}  # of boards.PARTS
SLOW = {"NibbleFirstTokenSlow", "NibbleTokensSlow"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """Scrapes pages, an address by job, and evaluates deploy/prometheus, both once a second."""

    def __init__(self, addresses):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="nibble-prometheus-"))
        self.address = f"127.0.0.1:{free_port()}"
        names = []
        for path in rules.FOLDER.glob("*.rules.yaml"):
            text = path.read_text(encoding="utf-8")
            (self.folder / path.name).write_text(
                re.sub(r"interval: \w+", "interval: 1s", text), encoding="utf-8")
            names.append(path.name)
        config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                  "rule_files": names,
                  "scrape_configs": [
                      {"job_name": job, "static_configs": [{"targets": [address]}]}
                      for job, address in addresses.items()]}
        (self.folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        self.log = open(self.folder / "log", "wb")  # pylint: disable=consider-using-with
        self.process = subprocess.Popen(  # pylint: disable=consider-using-with
            [harness.tool("prometheus"), f"--config.file={self.folder}/prometheus.yml",
             f"--storage.tsdb.path={self.folder}/data", f"--web.listen-address={self.address}"],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)

    def ready(self):
        try:
            return harness.http_get(self.address, "/-/ready")[0] == 200
        except OSError:
            return False

    def get(self, path, **fields):
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(url, timeout=harness.HTTP_SECONDS_MAX) as page:
            return json.load(page)["data"]

    def values(self, query):
        """The numbers that a query returns now, without those that are none."""
        try:
            result = self.get("/api/v1/query", query=query)["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        numbers = [float(sample["value"][1]) for sample in result]
        return [number for number in numbers if not math.isnan(number)]

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=harness.END_SECONDS_MAX)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def client(server, number, enough):
    """One client's calls, of all kinds, until it is enough; how many were answered."""
    import grpc  # pylint: disable=import-outside-toplevel
    from nibble.inference.v1 import inference_pb2 as pb  # pylint: disable=import-outside-toplevel
    from nibble.inference.v1 import inference_pb2_grpc as rpc  # pylint: disable=C0415
    answered = 0
    metadata = server.bearer()
    with server.channel() as channel:
        stub = rpc.InferenceServiceStub(channel)
        while not enough():
            request = pb.GenerateRequest(
                text=PROMPT * (1 + 20 * (number % 3)),
                stopping=pb.StoppingCriteria(max_tokens=16 + 8 * number, ignore_eos=True))
            if number % 2:
                list(stub.GenerateStream(pb.GenerateStreamRequest(request=request), timeout=60,
                                         metadata=metadata))
            else:
                stub.Generate(request, timeout=60, metadata=metadata)
            answered += 1
            try:
                stub.Generate(pb.GenerateRequest(), timeout=60, metadata=metadata)
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    return answered


def board_faults(prometheus, there):
    """Panels of a part are asked where it is `there`."""
    count = 0
    for name, board in boards.boards().items():
        for title, query in boards.queries(board):
            if not boards.parts(query) <= there:
                continue
            count += 1
            if not prometheus.values(query):
                yield f"{name}: \"{title}\": no data for {query}"
    print(f"{count} queries of boards asked")


def rule_faults(prometheus, there):
    seen = set()
    for rule in rules.rules():
        name = rule.get("alert", rule.get("record"))
        for selector in rules.selectors(rule["expr"]):
            if not boards.parts(selector) <= there:
                continue
            seen.add(selector)
            if not prometheus.values(f"count({selector})"):
                yield f"{name}: no series for {selector}"
    print(f"{len(seen)} selectors of rules asked")
    for group in prometheus.get("/api/v1/rules")["groups"]:
        for rule in group["rules"]:
            if rule["health"] != "ok":
                yield f"{rule['name']}: {rule['health']}: {rule.get('lastError')}"
            if rule.get("state", "inactive") != "inactive" and rule["name"] not in SLOW:
                yield f"{rule['name']} is {rule['state']}: {rule['alerts']}"


def find_faults(server):
    """Under load, as a board is when people look at it."""
    prometheus = Prometheus({"nibble-gateway": server.addresses["metrics"],
                             "nibble-worker": server.addresses["worker_metrics"]})
    try:
        harness.wait_until(prometheus.ready, READY_SECONDS, "Prometheus gets ready")
        enough = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client, server, number, enough.is_set)
                       for number in range(CLIENTS)]
            try:
                time.sleep(LOAD_SECONDS)
                harness.wait_until(
                    lambda: server.metric("nibble_gateway_requests_total", code="OK") >= CLIENTS,
                    harness.CALL_SECONDS, "requests are answered")
                faults = [*board_faults(prometheus, THERE), *rule_faults(prometheus, THERE)]
            finally:
                enough.set()
            print(f"{sum(each.result() for each in clients)} requests answered")
        return faults
    finally:
        prometheus.close()


def faults_under_load(model):
    server = secured.SecuredServer(model, "--tp", "2", "--context", "2048", "--log-level", "trace")
    try:
        faults = find_faults(server)
        if PROMPT.strip() in server.log():
            faults.append("the log has a prompt")
    finally:
        server.close()
    return faults


def main():
    model = harness.find_model()
    if model is None:
        print("NOT RUN: live_metrics (no model under NIBBLE_TEST_DATA or .cache/models)")
        return 0
    harness.make_stubs()
    faults = faults_under_load(model)
    print("\n".join(faults))
    print(f"live_metrics: {'FAILED' if faults else 'ok'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
