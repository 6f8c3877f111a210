"""What every end-to-end suite uses: the model, a running `nibble serve`, clients, metrics.

A suite's classes derive from ServedTestCase, which starts one server for the class on free ports.
Every wait is bounded.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

SOURCE = pathlib.Path(os.environ.get("NIBBLE_SOURCE_DIR", pathlib.Path(__file__).parents[2]))
BUILD = pathlib.Path(os.environ.get("NIBBLE_BINARY_DIR", SOURCE / "build" / "release"))
NIBBLE = BUILD / "bin" / "nibble"
STUBS = BUILD / "e2e-stubs"
READY_SECONDS_MAX = 90
END_SECONDS_MAX = 30
HTTP_SECONDS_MAX = 10
CALL_SECONDS = 60
LOCAL = "127.0.0.1:0"


def find_model():
    """A real quantized model: the shared data's, else what `make demo` left."""
    data = pathlib.Path(os.environ.get("NIBBLE_TEST_DATA", SOURCE.parent / "shared" / "data"))
    for folder in (data / "models" / "smollm2-135m-awq-gemm-g64",
                   SOURCE / ".cache" / "models" / "smollm2-135m-awq"):
        if (folder / "config.json").exists():
            return folder
    return None


def tool(name):
    """A tool that tools/setup installs."""
    path = os.pathsep.join([str(SOURCE / ".cache" / "bin"), str(SOURCE / ".venv" / "bin"),
                            os.environ["PATH"]])
    return shutil.which(name, path=path)


def make_stubs():
    """Python stubs of the contracts, made once per build."""
    protos = sorted((SOURCE / "proto" / "nibble").rglob("*.proto"))
    newest = max(proto.stat().st_mtime for proto in protos)
    stamp = STUBS / ".made"
    if not stamp.exists() or stamp.stat().st_mtime < newest:
        from grpc_tools import protoc  # pylint: disable=import-outside-toplevel
        import grpc_tools  # pylint: disable=import-outside-toplevel
        well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
        STUBS.mkdir(parents=True, exist_ok=True)
        code = protoc.main(["protoc", f"-I{SOURCE / 'proto'}", f"-I{well_known}",
                            f"--python_out={STUBS}", f"--grpc_python_out={STUBS}",
                            *[str(proto) for proto in protos],
                            *[str(SOURCE / "proto/google/rpc" / name)
                              for name in ("status.proto", "error_details.proto")]])
        if code != 0:
            raise RuntimeError("protoc failed")
        stamp.touch()
    if str(STUBS) not in sys.path:
        sys.path.insert(0, str(STUBS))


def wait_until(condition, seconds, what):
    """The first true value of condition(), asked again and again."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def run_nibble(*arguments, seconds=CALL_SECONDS, env=None, text=True, **options):
    """A nibble command run to its end; a CompletedProcess."""
    return subprocess.run([str(NIBBLE), *map(str, arguments)], capture_output=True, text=text,
                          timeout=seconds, check=False, env={**os.environ, **(env or {})},
                          stdin=options.pop("stdin", subprocess.DEVNULL), **options)


def http_get(address, path):
    """(status, body) of http://address/path."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=HTTP_SECONDS_MAX) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def parse_metrics(text):
    """{name: [(labels, value)]} of a Prometheus page."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", line)
        if match:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


class Server:
    """A running `nibble serve` on free ports. channel() and bearer() are what its clients need."""

    def __init__(self, model, *flags):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="nibble-e2e-"))
        self.log_path = self.folder / "serve.log"
        announce = self.folder / "announce.json"
        command = [str(NIBBLE), "serve", str(model), "--port", "0", "--metrics-listen", LOCAL,
                   "--worker-metrics-listen", LOCAL, "--announce", str(announce), *flags]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: announce.exists() or self.process.poll() is not None,
                       READY_SECONDS_MAX, "the server gets ready")
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}")
            self.addresses = json.loads(announce.read_text(encoding="utf-8"))
        except BaseException:
            self.close()
            raise

    @property
    def address(self):
        return self.addresses["grpc"]

    def log(self):
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def descendants(self):
        """{pid: command line} of every process below this one."""
        children = {}
        for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                text = status.read_text(encoding="utf-8", errors="replace")
                parent = int(text.rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(status.parent.name))
        found, queue = {}, [self.process.pid]
        while queue:
            for pid in children.get(queue.pop(), ()):
                try:
                    line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                except OSError:
                    continue
                found[pid] = line.replace("\0", " ").strip()
                queue.append(pid)
        return found

    def ranks(self):
        """{rank: pid} of the group's processes."""
        found = {}
        for pid, line in self.descendants().items():
            match = re.search(r"--rank[= ](\d+)", line)
            if match:
                found[int(match[1])] = pid
        return found

    def metrics(self, which="metrics"):
        status, text = http_get(self.addresses[which], "/metrics")
        assert status == 200, f"/metrics answered {status}"
        return parse_metrics(text)

    def metric(self, name, which="metrics", **labels):
        """The sum of the samples whose labels agree."""
        return sum(value for found, value in self.metrics(which).get(name, [])
                   if all(found.get(key) == wanted for key, wanted in labels.items()))

    def channel(self):
        import grpc  # pylint: disable=import-outside-toplevel
        return grpc.insecure_channel(self.address)

    def bearer(self):
        """The metadata of a call."""
        return []

    def end(self, how=signal.SIGTERM, seconds=END_SECONDS_MAX):
        """Asks it to end; its exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout=seconds)

    def close(self):
        if self.process.poll() is None:
            try:
                self.end()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class ModelTestCase(unittest.TestCase):
    """Tests that need a real model; where there is none, one line says what did not run."""

    model = None

    @classmethod
    def setUpClass(cls):
        cls.model = find_model()

    def run(self, result=None):
        if self.model is None:
            print(f"NOT RUN: {self.id()} (no model under NIBBLE_TEST_DATA or .cache/models)",
                  file=sys.stderr)
            return result
        return super().run(result)


class ServedTestCase(ModelTestCase):
    """Tests against one server per class, which `start` makes; on two ranks unless flags differ."""

    start = Server
    flags = ("--tp", "2", "--context", "2048", "--log-level", "info")
    server = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        make_stubs()
        if cls.model is not None:
            cls.server = cls.start(cls.model, *cls.flags)

    @classmethod
    def tearDownClass(cls):
        if cls.server is not None:
            cls.server.close()

    def setUp(self):
        self.assertIsNone(self.server.process.poll(), self.server.log())

    def tearDown(self):
        outcome = getattr(self, "_outcome", None)
        if outcome is not None and outcome.result is not None and (
                outcome.result.failures or outcome.result.errors):
            print(self.server.log()[-4000:], file=sys.stderr)

    def channel(self):
        import grpc  # pylint: disable=import-outside-toplevel
        channel = grpc.insecure_channel(
            self.server.address, options=[("grpc.max_send_message_length", -1)])
        self.addCleanup(channel.close)
        return channel

    def inference(self):
        from nibble.inference.v1 import inference_pb2_grpc  # pylint: disable=C0415
        return inference_pb2_grpc.InferenceServiceStub(self.channel())

    def await_idle(self):
        """Every gauge of work is zero."""
        for which, names in (
                ("metrics", ("nibble_gateway_requests_inflight",
                             "nibble_gateway_upstream_streams")),
                ("worker_metrics", ("nibble_requests_running", "nibble_requests_waiting",
                                    "nibble_slots_used"))):
            for name in names:
                wait_until(lambda n=name, w=which: self.server.metric(n, w) == 0, 10,
                           f"{name} is zero")
        wait_until(lambda: self.server.metric("nibble_kv_cache_blocks", "worker_metrics",
                                              state="used") == 0, 10, "no KV block is used")
