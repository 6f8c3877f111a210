"""The chart's manifests: rendering them, and what must hold in every one."""

import functools
import json
import pathlib
import re
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "nibble"
GOLDENS = ROOT / "tests" / "deploy" / "goldens"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
KUBERNETES = "1.34.0"
NAMESPACE = "serving"
COMMAND_SECONDS = 60


def helm(*words):
    """A run of helm, without what it says of links inside the chart."""
    result = subprocess.run(["helm", *map(str, words)], cwd=CHART, capture_output=True, text=True,
                            check=False, timeout=COMMAND_SECONDS)
    result.stderr = "\n".join(line for line in result.stderr.splitlines()
                              if "found symbolic link" not in line)
    return result


def render(example, *more):
    return helm("template", "nibble", ".", "--namespace", NAMESPACE, "--kube-version", KUBERNETES,
                "--values", f"examples/{example}.yaml", *more)


@functools.cache
def manifests(example):
    """Text of an example's manifests. The boards stand in deploy/grafana: here only their name."""
    result = render(example)
    if result.returncode != 0:
        raise RuntimeError(f"{example}: {result.stderr}")
    return re.sub(r"^  nibble-(\S+)\.json: \|-\n    .*$",
                  r"  nibble-\1.json: deploy/grafana/\1.json", result.stdout, flags=re.MULTILINE)


def objects(example):
    return [found for found in yaml.safe_load_all(manifests(example)) if found]


def golden_faults(update):
    for example in EXAMPLES:
        path = GOLDENS / f"{example}.yaml"
        text = manifests(example)
        if update:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            yield (f"{example}: not what tests/deploy/goldens/{example}.yaml has; if it should be "
                   "so: tests/deploy/lint_deploy.py --update")
    left_over = {path.stem for path in GOLDENS.glob("*.yaml")} - set(EXAMPLES)
    if left_over:
        yield f"goldens without an example: {sorted(left_over)}"


def board_faults():
    """The config maps carry the boards themselves."""
    whole = [found for found in yaml.safe_load_all(render("tp4").stdout) if found]
    carried = {}
    for found in whole:
        if found["kind"] == "ConfigMap":
            carried.update({key: json.loads(text) for key, text in found["data"].items()})
    for path in sorted((ROOT / "deploy" / "grafana").glob("*.json")):
        if carried.get(f"nibble-{path.name}") != json.loads(path.read_text(encoding="utf-8")):
            yield f"{path.name} is not what the chart carries"


def pods(found_objects):
    """(name, labels, spec) of every pod."""
    for found in found_objects:
        name = f"{found['kind']} {found['metadata']['name']}"
        if found["kind"] in ("Deployment", "StatefulSet"):
            template = found["spec"]["template"]
            yield name, template["metadata"]["labels"], template["spec"]
        elif found["kind"] == "LeaderWorkerSet":
            for part in ("leaderTemplate", "workerTemplate"):
                template = found["spec"]["leaderWorkerTemplate"][part]
                yield f"{name} {part}", template["metadata"]["labels"], template["spec"]
        elif found["kind"] == "Pod":
            yield name, found["metadata"]["labels"], found["spec"]


def container_faults(container, serves):
    security = container.get("securityContext", {})
    if not security.get("readOnlyRootFilesystem") or not security.get("runAsNonRoot"):
        yield "root file system or user"
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "privileges"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities"
    resources = container.get("resources", {})
    if not {"cpu", "memory"} <= set(resources.get("requests", {})):
        yield "no requests"
    if "memory" not in resources.get("limits", {}):
        yield "no limit of memory"
    if re.search(r"(:latest|/[^:@]+)$", container["image"]):
        yield f"image {container['image']}"
    if serves and not {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container):
        yield "probes"
    if serves and container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
        yield "last words are lost"


def pod_faults(spec, serves):
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0:
        yield "runs as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccomp"
    if spec.get("automountServiceAccountToken") is not False:
        yield "has a token of the cluster"
    if spec.get("enableServiceLinks") is not False:
        yield "NIBBLE_ variables of services would be read as options"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    if serves and len(spec.get("topologySpreadConstraints", [])) < 2:
        yield "not spread"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"host path {volume['name']}"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"{volume['name']} has no bound"
    for container in spec.get("initContainers", []):
        yield from container_faults(container, serves=False)
    for container in spec["containers"]:
        yield from container_faults(container, serves)
        drains = [int(match[1]) for match in
                  (re.match(r"--drain-timeout=(\d+)s", word) for word in container["args"])
                  if match]
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if serves and spec["terminationGracePeriodSeconds"] <= sum(drains) + sleep:
            yield "is killed before its drain ends"


def secret_faults(found_objects):
    """Every Secret is mounted read-only and not for everybody; programs' files stand in a mount;
    ports with TLS are not asked by Kubernetes' gRPC probes."""
    for name, _, spec in pods(found_objects):
        for volume in spec.get("volumes", []):
            if "secret" in volume and volume["secret"].get("defaultMode") != 0o440:
                yield f"{name}: Secret {volume['name']} is readable for all"
        for container in spec["containers"]:
            mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
            for word in container["args"]:
                path = word.partition("=")[2]
                if path.startswith("/etc/nibble/"):
                    mount = mounts.get(path.rsplit("/", 1)[0])
                    if mount is None or not mount.get("readOnly"):
                        yield f"{name}: {word} is in no read-only mount"
            speaks_tls = any(word.startswith("--tls-cert=") for word in container["args"])
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if speaks_tls and "grpc" in container.get(probe, {}):
                    yield f"{name}: {probe} speaks no TLS"


def gpu_faults(found_objects):
    """A pod that computes on GPUs gets one for each of its ranks and the image for them."""
    sizes = {f"LeaderWorkerSet {found['metadata']['name']}":
             found["spec"]["leaderWorkerTemplate"]["size"]
             for found in found_objects if found["kind"] == "LeaderWorkerSet"}
    for name, _, spec in pods(found_objects):
        machines = sizes.get(name.rsplit(" ", 1)[0], 1)
        for container in spec["containers"]:
            options = dict(word.split("=", 1) for word in container["args"] if "=" in word)
            gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
            wanted = int(options["--tp"]) // machines if options.get("--device") == "cuda" else 0
            if gpus != wanted or ("cuda" in container["image"]) != (wanted > 0):
                yield f"{name}: {gpus} GPUs for {wanted} ranks on {container['image']}"


def model_faults(found_objects):
    """Where a model is read there is a volume, written to by what fetches it alone."""
    for name, _, spec in pods(found_objects):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        fetches = [container for container in spec.get("initContainers", [])
                   if container["name"] == "fetch"]
        for container in spec["containers"]:
            path = next((word.split("=", 1)[1] for word in container["args"]
                         if word.startswith("--model=/")), None)
            if path is None:
                continue
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            mount = mounts.get("/models", {})
            if mount.get("name") not in volumes or not mount.get("readOnly"):
                yield f"{name}: {path} is in no read-only mount"
            elif fetches and [fetch["args"][2] for fetch in fetches] != [path]:
                yield f"{name}: another folder is fetched than {path}"
            claim = volumes.get("models", {}).get("persistentVolumeClaim")
            if claim and claim.get("readOnly", False) == bool(fetches):
                yield f"{name}: the claim must be fetched into, or need not be written"


def matches(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def selector_faults(found_objects):
    """Everything that selects pods selects some, every serving pod is covered, and no pod at all
    is without a NetworkPolicy."""
    labels = [(name, labels) for name, labels, _ in pods(found_objects)]
    covered = {kind: set() for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy")}
    for found in found_objects:
        if found["kind"] not in covered:
            continue
        selector = found["spec"].get("podSelector", found["spec"].get("selector", {}))
        selector = selector.get("matchLabels", selector)
        hits = {name for name, has in labels if matches(selector, has)}
        if not hits:
            yield f"{found['kind']} {found['metadata']['name']} selects nothing"
        covered[found["kind"]] |= hits
    for kind, hits in covered.items():
        for name, _ in labels:
            once = name.startswith("Pod ") and kind != "NetworkPolicy"
            if name not in hits and not once:
                yield f"{name} has no {kind}"


def object_faults(found_objects):
    """What must hold in the manifests of any values."""
    names = [(found["kind"], found["metadata"]["name"]) for found in found_objects]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        yield f"{twice} twice"
    for name, _, spec in pods(found_objects):
        serves = not name.startswith("Pod ")
        for fault in pod_faults(spec, serves):
            yield f"{name}: {fault}"
    for faults in (selector_faults, secret_faults, gpu_faults, model_faults):
        yield from faults(found_objects)


def policy_faults():
    for example in EXAMPLES:
        for fault in object_faults(objects(example)):
            yield f"{example}: {fault}"


# (what is set, a part of what helm says)
REFUSED = [
    (["models[0].tp=4", "models[0].machines=3"], "no multiple of machines"),
    (["models[0].tp=2", "models[0].machines=2", "models[0].autoscaling.enabled=true"],
     "several machines"),
    (["models[0].tp=0"], "tp"),
    (["models[0].device=tpu"], "device"),
    (["models[0].device=cuda", r"models[0].resources.limits.nvidia\.com/gpu=1"],
     "is counted from tp"),
    (["models[1].name=m", "models[1].claim=c", "models[1].path=p",
      "models[1].resources.limits.memory=3Gi"], "memoryPerRank is not set"),
    (["models[0].memoryFraction=1.5"], "memoryFraction"),
    (["models[0].source=s3://b/m"], "source"),
    (["models[1].name=m", "models[1].source=hf://a/b", "models[1].path=p",
      "models[1].memoryPerRank=1GiB", "models[1].resources.limits.memory=3Gi"],
     "neither a claim nor a sourceSize"),
    (["models[1].name=m", "models[1].path=p", "models[1].memoryPerRank=1GiB",
      "models[1].resources.limits.memory=3Gi"], "claim"),
    (["models[0].source=oci://r/m:1"], "take out the claim"),
    (["models[0].source=hf://a/b", "models[0].path=a/b"], "is one folder"),
    (["fetch.proxy=socks5://h:1"], "proxy"),
    (["models[0].path=../secrets"], "path"),
    (["models[0].path=/etc"], "path"),
    (["models[0].memoryPerRank=4"], "memoryPerRank"),
    (["models[0].memoryPerRank=2GiB"], "more than limits.memory"),
    (["models[0].sharedMemory=2Gi"], "more than limits.memory"),
    (["models[0].logStorage.limit=lots"], "logStorage"),
    (["models[0].resources.limits.memory="], "resources.limits.memory is not set"),
    (["models[0].resources.limits.memory=3Gb"], "is no size"),
    (["models[0].autoscaling.enabled=true", "models[0].autoscaling.minGroups=9"],
     "above maxGroups"),
    (["models[1].name=SmolLM2_135M", "models[1].claim=c",
      "models[1].path=p", "models[1].memoryPerRank=1GiB",
      "models[1].resources.limits.memory=3Gi"], "would both be called"),
    (["models=null"], "models"),
    (["image.tag=latest"], "tag"),
    (["gateway.replicaz=2"], "replicaz"),
    (["gateway.extraArgs={rm}"], "extraArgs"),
    (["tls.clients.enabled=true"], "no Secret is named for gateway-tls"),
    (["tls.internal.enabled=true", "tls.internal.gatewaySecret=s"],
     "no Secret is named for worker-internal-tls"),
    (["tls.clients.secret=Not/A/Name"], "secret"),
    (["tls.clients.on=true"], "'on' not allowed"),
    (["tls.certManager.issuer.kind=Authority"], "kind"),
    (["apiKeys.secret=s", "apiKeys.file=../keys.toml"], "file"),
]


def refusal_faults():
    for settings, said in REFUSED:
        words = [word for setting in settings for word in ("--set", setting)]
        result = render("laptop", *words)
        if result.returncode == 0:
            yield f"{' '.join(settings)} is taken"
        elif said not in result.stderr:
            yield f"{' '.join(settings)}: refused with: {result.stderr.strip()[:300]}"


def disk_faults():
    """A model that is fetched into its pod's own folder is counted among what the pod takes of its
    node's disk."""
    model = {"name": "m", "path": "m", "source": "hf://a/b", "sourceSize": "2Gi",
             "memoryPerRank": "1GiB", "resources": {"limits": {"memory": "2Gi"}},
             "logStorage": {"request": "1Mi", "limit": "3Mi"}}
    result = render("laptop", "--set-json", f"models={json.dumps([model])}")
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    group = next(found for found in yaml.safe_load_all(result.stdout)
                 if found and found["kind"] == "StatefulSet")
    resources = group["spec"]["template"]["spec"]["containers"][0]["resources"]
    for part, megabytes in (("requests", 1), ("limits", 3)):
        if int(resources[part]["ephemeral-storage"]) != (2 << 30) + (megabytes << 20):
            yield f"{part}: {resources[part]}"


def option_faults(binaries):
    """Every flag in a manifest is one that the program knows."""
    known = {}
    for program in ("nibble-gateway", "nibble-worker", "nibble"):
        if not (binaries / program).exists():
            return
        for command in ("generate", "fetch") if program == "nibble" else ("",):
            text = subprocess.run([binaries / program, *command.split(), "--help"],
                                  capture_output=True, text=True, check=False,
                                  timeout=COMMAND_SECONDS).stdout
            known[command or program] = set(
                re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", text, re.MULTILINE))
    programs = {"gateway": "nibble-gateway", "worker": "nibble-worker", "generate": "generate",
                "fetch": "fetch"}
    for example in EXAMPLES:
        for name, _, spec in pods(objects(example)):
            for container in (*spec.get("initContainers", []), *spec["containers"]):
                program = programs[container["name"]]
                for word in container["args"]:
                    flag = word.split("=")[0]
                    if flag.startswith("--") and flag not in known[program]:
                        yield f"{example}: {name}: {program} has no {flag}"
