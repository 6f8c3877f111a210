#!/usr/bin/env python3
"""Builds the images' roots without a container engine, and runs the chart's gateway and group in
them: as the chart's user, on read-only roots, in network namespaces of their own. The group goes
and comes back with another address, as a pod does.

usage: tests/deploy/image_roots.py   (as root; NIBBLE_BINARY_DIR, NIBBLE_TEST_DATA as tests/e2e)
"""

import ctypes
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "e2e"), str(ROOT / "tests" / "deploy")]

import harness  # noqa: E402  pylint: disable=wrong-import-position
import manifests  # noqa: E402  pylint: disable=wrong-import-position
import model_servers  # noqa: E402  pylint: disable=wrong-import-position
import secured  # noqa: E402  pylint: disable=wrong-import-position

os.environ["PATH"] = os.pathsep.join([str(ROOT / ".cache" / "bin"), os.environ["PATH"]])
DOCKER = ROOT / "deploy" / "docker"
PROGRAMS = {"gateway": ["nibble-gateway", "nibble"], "worker": ["nibble-worker"]}
EXAMPLE = "laptop"
ADDRESSES = {"gateway": "10.9.0.1", "worker": "10.9.0.2"}
NEXT_ADDRESS = "10.9.0.3"
USER = 65532
READY_SECONDS = 90
# gRPC resolves a name again at most every 30 s.
FOUND_SECONDS = 45
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, CAPABILITIES_MAX = 38, 24, 64
UNWANTED = ("sh", "bash", "dash", "perl", "python3", "apt-get", "dpkg", "ldd", "busybox")


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, text=True, **options)


def base_root():
    """A Debian with the runtime packages, made once per list of packages."""
    packages = (DOCKER / "runtime-packages.txt").read_text(encoding="utf-8").split()
    name = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:16]
    folder = ROOT / ".cache" / "roots" / name
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        print("debootstrap of the images' Debian, once", flush=True)
        run("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", "bookworm",
            partial, stdout=subprocess.DEVNULL)
        partial.rename(folder)
    return folder


def cuda_files():
    """What deploy/docker/worker-cuda.Dockerfile hands to make_root.sh, as far as it is here."""
    nccl = sorted((ROOT / "third_party" / "cuda" / "venv").glob(
        "lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2"))
    return [*nccl, ROOT / "build" / "cuda" / "bin" / "nibble-worker"]


IMAGES = {"worker-cuda": cuda_files}


def build_root(base, image, target):
    """What deploy/docker/IMAGE.Dockerfile's second stage does."""
    scratch = base / "setup"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    shutil.copy(DOCKER / "make_root.sh", scratch)
    files = IMAGES[image]() if image in IMAGES else [
        harness.BUILD / "bin" / program for program in PROGRAMS[image]]
    for file in files:
        shutil.copy(file, scratch)
    run("chroot", base, "/setup/make_root.sh", "/setup/image",
        *[f"/setup/{file.name}" for file in files])
    shutil.move(scratch / "image", target)
    shutil.rmtree(scratch)
    files = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    print(f"{image}: {len(files)} files, {size / 2**20:.0f} MiB")
    names = {path.name for path in files if path.stat().st_mode & 0o111}
    assert not names & set(UNWANTED), f"{image} has {sorted(names & set(UNWANTED))}"
    assert not [path for path in files if path.stat().st_mode & 0o6000], "a setuid program"


def containers():
    """{image: (arguments, probes)} of the example's manifests; the test pod's arguments too."""
    found = {}
    for _, _, spec in manifests.pods(manifests.objects(EXAMPLE)):
        container = spec["containers"][0]
        found[container["name"]] = container
    return found


def mount_root(root, model, hosts):
    """The root as a container would see it: read-only, with its own /proc, /dev and model."""
    run("mount", "--bind", root, root)
    run("mount", "-t", "proc", "proc", root / "proc")
    run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", root / "dev")
    (root / "dev" / "shm").mkdir()
    for device in ("null", "zero", "urandom"):
        (root / "dev" / device).touch()
        run("mount", "--bind", f"/dev/{device}", root / "dev" / device)
    run("mount", "-t", "tmpfs", "tmpfs", root / "models")
    folder = root / "models" / "smollm2-135m-awq"
    folder.mkdir()
    run("mount", "--bind", "-o", "ro", model, folder)
    run("mount", "--bind", hosts, root / "etc" / "hosts")
    run("mount", "-o", "remount,ro,bind", root)
    try:
        (root / "written").touch()
    except OSError:
        return
    raise AssertionError(f"{root} can be written")


def enter(root):
    """In the child: the chart's security context. Runs before exec."""
    libc = ctypes.CDLL(None)
    os.chroot(root)
    os.chdir("/")
    for capability in range(CAPABILITIES_MAX):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def contained(root, words, **options):
    return subprocess.Popen(words, preexec_fn=lambda: enter(root), env={},
                            stdin=subprocess.DEVNULL, **options)


def in_namespace(image, *words, **options):
    """A command of this machine on the image's side of the network."""
    prefix = ["ip", "netns", "exec", "worker"] if image == "worker" else []
    return subprocess.run([*prefix, *map(str, words)], text=True, capture_output=True,
                          check=False, timeout=harness.HTTP_SECONDS_MAX, **options)


def make_network():
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    run("ip", "netns", "add", "worker")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "gateway0", "type", "veth", "peer", "name", "worker0", "netns",
        "worker")
    run("ip", "addr", "add", f"{ADDRESSES['gateway']}/24", "dev", "gateway0")
    run("ip", "link", "set", "gateway0", "up")
    for words in (("addr", "add", f"{ADDRESSES['worker']}/24", "dev", "worker0"),
                  ("link", "set", "worker0", "up"), ("link", "set", "lo", "up")):
        run("ip", "-n", "worker", *words)


def probe(image, container, kind):
    """Whether a probe of the manifest says yes."""
    asked = container[kind]
    if "grpc" in asked:
        return in_namespace(image, "grpc-health-probe",
                            f"-addr={ADDRESSES[image]}:{asked['grpc']['port']}",
                            f"-service={asked['grpc'].get('service', '')}").returncode == 0
    port = next(port["containerPort"] for port in container["ports"]
                if port["name"] == asked["httpGet"]["port"])
    url = f"http://{ADDRESSES[image]}:{port}{asked['httpGet']['path']}"
    return in_namespace(image, sys.executable, "-c",
                        f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
                        ).returncode == 0


def check_process(image, process):
    """No capability, no way to get one, nobody's user."""
    status = dict(line.split(":\t", 1) for line in pathlib.Path(
        f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines() if ":\t" in line)
    assert status["Uid"].split() == [str(USER)] * 4, f"{image}: {status['Uid']}"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, image
    assert status["NoNewPrivs"] == "1", image


def check_connections():
    """Gateway and group talk to each other and to nobody else."""
    known = set(ADDRESSES.values()) | {"127.0.0.1"}
    for image in ADDRESSES:
        listed = in_namespace(image, "ss", "-Htan", "state", "established", "state", "syn-sent")
        for line in listed.stdout.splitlines():
            peer = line.split()[-1].rsplit(":", 1)[0].removeprefix("[::ffff:").strip("[]")
            assert peer in known, f"{image} is connected to {peer}"


def start(image, container, root, folder):
    words = [f"/usr/bin/nibble-{image}", *container["args"]]
    log = open(folder / f"{image}.log", "ab")  # pylint: disable=consider-using-with
    if image == "gateway":
        return contained(root, words, stdout=log, stderr=log)
    enters = ["ip", "netns", "exec", "worker", sys.executable, __file__, "--contained", str(root)]
    return subprocess.Popen([*enters, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def write_hosts(path, name):
    path.write_text(f"127.0.0.1 localhost\n{ADDRESSES['worker']} {name}\n"
                    "127.0.0.1 nibble-gateway\n", encoding="utf-8")


class Pods:
    """The example's gateway and group, as they run."""

    def __init__(self, folder, model):
        self.folder = folder
        self.found = containers()
        groups = next(word for word in self.found["gateway"]["args"]
                      if word.startswith("--groups="))
        self.group = groups.split("=")[1].rsplit(":", 1)[0]
        self.hosts = folder / "hosts"
        write_hosts(self.hosts, self.group)
        self.processes = {}
        for image in PROGRAMS:
            (folder / image / "etc" / "hosts").touch()
            mount_root(folder / image, model, self.hosts)

    def start(self, image):
        self.processes[image] = start(image, self.found[image], self.folder / image, self.folder)

    def await_probe(self, image, kind, seconds=READY_SECONDS):
        process = self.processes[image]
        harness.wait_until(lambda: process.poll() is not None or
                           probe(image, self.found[image], kind), seconds, f"{image}: {kind}")
        assert process.poll() is None, f"{image} ended with {process.returncode}"

    def generate(self):
        """What `helm test` does."""
        container = self.found["generate"]
        answer = contained(self.folder / "gateway", [*container["command"], *container["args"]],
                           stdout=subprocess.PIPE)
        text, _ = answer.communicate(timeout=harness.CALL_SECONDS)
        assert answer.returncode == 0 and text.strip(), f"the test pod: {answer.returncode}"
        return text.decode().strip()

    def drain(self, image):
        self.processes[image].send_signal(signal.SIGTERM)
        code = self.processes[image].wait(timeout=harness.END_SECONDS_MAX)
        assert code == 0, f"{image} drained with {code}"

    def move_group(self):
        """The group ends and comes back with another address; how long until it is found."""
        self.drain("worker")
        for verb, address in (("del", ADDRESSES["worker"]), ("add", NEXT_ADDRESS)):
            run("ip", "-n", "worker", "addr", verb, f"{address}/24", "dev", "worker0")
        ADDRESSES["worker"] = NEXT_ADDRESS
        write_hosts(self.hosts, self.group)
        self.start("worker")
        self.await_probe("worker", "readinessProbe")
        begin = time.monotonic()
        self.await_probe("gateway", "readinessProbe", FOUND_SECONDS)
        return time.monotonic() - begin

    def close(self, failed):
        for image, process in self.processes.items():
            if process.poll() is None:
                process.kill()
                process.wait()
            if failed:
                log = (self.folder / f"{image}.log").read_text(encoding="utf-8", errors="replace")
                print(f"{image}:\n{log[-3000:]}")


def refuse_without_a_driver(root, model, hosts):
    """A worker of the image for GPUs has all that it needs but the driver, and says so."""
    (root / "etc" / "hosts").touch()
    mount_root(root, model, hosts)
    worker = contained(root, ["/usr/bin/nibble-worker", "--model=/models/smollm2-135m-awq",
                              "--device=cuda", "--log-level=warn"], stderr=subprocess.PIPE)
    _, said = worker.communicate(timeout=harness.CALL_SECONDS)
    assert worker.returncode == 4 and b"no NVIDIA driver" in said and said.count(b"\n") == 1, (
        f"worker-cuda: {worker.returncode}: {said.decode()}")
    print(f"worker-cuda: {said.decode().strip()}")


def fetches(folder):
    """The chart's init container: the gateway's image fetches over HTTPS from whom its list of
    authorities knows, and from nobody else."""
    root = folder / "gateway"
    (folder / "ca").mkdir()
    authority = secured.Authority(folder / "ca")
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4096}
    server = model_servers.folder(files, tls=authority.issue("server"))
    os.chown(root / "models", USER, USER)
    words = ["/usr/bin/nibble", "fetch", f"{server.url}/m", "/models/fetched"]

    def fetch():
        with contained(root, words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            return process.communicate(timeout=harness.CALL_SECONDS)[1].decode(), process.returncode

    said, code = fetch()
    assert code == 1 and "certificate" in said, f"fetch from a stranger: {code}: {said}"
    run("mount", "--bind", authority.certificate,
        root / "etc" / "ssl" / "certs" / "ca-certificates.crt")
    said, code = fetch()
    assert code == 0, f"fetch: {code}: {said}"
    for name, content in files.items():
        assert (root / "models" / "fetched" / name).read_bytes() == content, name
    server.close()
    print("the gateway's image fetches a folder over HTTPS")


def inside(folder, model):
    """In namespaces of our own: everything that runs."""
    make_network()
    running = Pods(folder, model)
    failed = True
    try:
        fetches(folder)
        for image in ("worker", "gateway"):
            running.start(image)
        for image, process in running.processes.items():
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                running.await_probe(image, kind)
            check_process(image, process)
        print(f"the test pod printed {running.generate()!r}")
        check_connections()
        print(f"a group at another address is found after {running.move_group():.0f} s")
        running.generate()
        for image in ("gateway", "worker"):
            running.drain(image)
        if (folder / "worker-cuda").exists():
            refuse_without_a_driver(folder / "worker-cuda", model, running.hosts)
        failed = False
    finally:
        running.close(failed)


def main():
    if sys.argv[1:2] == ["--contained"]:
        enter(sys.argv[2])
        os.execve(sys.argv[3], sys.argv[3:], {})
    if sys.argv[1:2] == ["--inside"]:
        inside(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
        return 0
    model = harness.find_model()
    missing = [tool for tool in ("debootstrap", "ip", "unshare", "helm", "grpc-health-probe")
               if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing or model is None:
        print(f"NOT RUN: image_roots (needs root, a model and {' '.join(missing) or 'its tools'})")
        return 0
    begin = time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nibble-roots-"))
    folder.chmod(0o755)
    try:
        base = base_root()
        for image in PROGRAMS:
            build_root(base, image, folder / image)
        if all(file.exists() for file in cuda_files()):
            build_root(base, "worker-cuda", folder / "worker-cuda")
        else:
            print("NOT RUN: the image for GPUs (no build/cuda; make cuda makes it)")
        run("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
            sys.executable, __file__, "--inside", folder, model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"image_roots: ok ({time.monotonic() - begin:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
