"""What kube-linter asks by default and neither manifests.py nor kube-score does, in the manifests
of the examples. planted_faults.py names which of its checks is held by what."""

import re

import manifests

PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
FIRST_ORDINARY_PORT = 1024
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
HOSTNAME = "kubernetes.io/hostname"
CONTROLLERS = ("Deployment", "StatefulSet")


def containers(found_objects):
    """(pod, spec, container) of every container, those that run first included."""
    for name, _, spec in manifests.pods(found_objects):
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            yield f"{name} {container['name']}", spec, container


def by_kind(found_objects, *kinds):
    """(kind and name, spec) of objects of these kinds."""
    for found in found_objects:
        if found["kind"] in kinds:
            yield f"{found['kind']} {found['metadata']['name']}", found["spec"]


def version_faults(found_objects):
    for found in found_objects:
        if "beta" in found["apiVersion"]:
            yield f"{found['kind']} {found['metadata']['name']}: {found['apiVersion']} will go"


def environment_faults(found_objects):
    for name, _, container in containers(found_objects):
        variables = [variable["name"] for variable in container.get("env", [])]
        for twice in sorted({one for one in variables if variables.count(one) > 1}):
            yield f"{name}: {twice} is set twice"
        for variable in container.get("env", []):
            if re.search("secret|token|password|key$", variable["name"], re.IGNORECASE) \
                    and variable.get("value"):
                yield f"{name}: {variable['name']} stands in the manifest"


def probe_port(probe):
    for how in ("httpGet", "grpc", "tcpSocket"):
        if how in probe:
            return probe[how]["port"]
    return None


def port_faults(found_objects):
    """Ports have names that a Service can carry, are ordinary, and are what probes ask."""
    for name, _, container in containers(found_objects):
        ports = container.get("ports", [])
        open_ports = {port[key] for port in ports for key in ("name", "containerPort")}
        for port in ports:
            if not PORT_NAME.fullmatch(port["name"]):
                yield f"{name}: {port['name']} is no name for a port"
            if port["containerPort"] < FIRST_ORDINARY_PORT:
                yield f"{name}: port {port['containerPort']} is root's"
        for probe in PROBES:
            if probe in container and probe_port(container[probe]) not in open_ports:
                yield f"{name}: {probe} asks a port that is not open"
    for name, spec in by_kind(found_objects, "Service"):
        offered = {port["name"] for _, labels, pod in manifests.pods(found_objects)
                   if manifests.matches(spec["selector"], labels)
                   for container in pod["containers"] for port in container.get("ports", [])}
        for port in spec["ports"]:
            if port["targetPort"] not in offered:
                yield f"{name}: no pod has a port {port['targetPort']}"
            if port["port"] < FIRST_ORDINARY_PORT:
                yield f"{name}: port {port['port']} is root's"


def controller_faults(found_objects):
    """Controllers know their own pods, and those are spread over nodes."""
    for name, spec in by_kind(found_objects, *CONTROLLERS):
        labels = spec["template"]["metadata"]["labels"]
        if not manifests.matches(spec["selector"]["matchLabels"], labels):
            yield f"{name}: its selector does not select its pods"
    for name, labels, spec in manifests.pods(found_objects):
        spread = [constraint for constraint in spec.get("topologySpreadConstraints", [])
                  if constraint["topologyKey"] == HOSTNAME
                  and manifests.matches(constraint["labelSelector"]["matchLabels"], labels)]
        if not name.startswith("Pod ") and not spread:
            yield f"{name}: its pods are not spread over nodes"


def account_faults(found_objects):
    accounts = {found["metadata"]["name"] for found in found_objects
                if found["kind"] == "ServiceAccount"}
    for name, _, spec in manifests.pods(found_objects):
        if "serviceAccount" in spec:
            yield f"{name}: serviceAccount is an old name of serviceAccountName"
        if spec.get("serviceAccountName") not in accounts:
            yield f"{name}: there is no account {spec.get('serviceAccountName')}"
    for found in found_objects:
        if "Role" in found["kind"]:
            yield f"{found['kind']} {found['metadata']['name']}: the programs ask no cluster"


def scalers(found_objects):
    """What is scaled → (by what, the least number of pods)."""
    found = {}
    for name, spec in by_kind(found_objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = spec["scaleTargetRef"]
        least = spec["minReplicas"] if "minReplicas" in spec else spec["minReplicaCount"]
        found[f"{target['kind']} {target['name']}"] = (name, least)
    return found


def budget_faults(found_objects):
    """A budget lets at least one pod go, and any that serves nobody."""
    scaled = scalers(found_objects)
    for name, spec in by_kind(found_objects, "PodDisruptionBudget"):
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{name}: keeps pods that are not ready"
        if spec.get("maxUnavailable") in (0, "0%") or spec.get("minAvailable") == "100%":
            yield f"{name}: lets no pod go"
        kept = spec.get("minAvailable", 0)
        for whose, controller in by_kind(found_objects, *CONTROLLERS):
            labels = controller["template"]["metadata"]["labels"]
            least = scaled[whose][1] if whose in scaled else controller.get("replicas", 1)
            if manifests.matches(spec["selector"]["matchLabels"], labels) \
                    and isinstance(kept, int) and kept >= least:
                yield f"{name}: lets no pod go of {least}"


def target_faults(found_objects):
    """What scales, watches or lets in something finds it."""
    controllers = {name for name, _ in by_kind(found_objects, *CONTROLLERS)}
    for target, (name, _) in scalers(found_objects).items():
        if target not in controllers:
            yield f"{name}: scales {target}, which is not there"
    pods = [labels for _, labels, _ in manifests.pods(found_objects)]
    services = [found["metadata"]["labels"] for found in found_objects
                if found["kind"] == "Service"]
    for kind, there in (("ServiceMonitor", services), ("PodMonitor", pods)):
        for name, spec in by_kind(found_objects, kind):
            if not any(manifests.matches(spec["selector"]["matchLabels"], one) for one in there):
                yield f"{name}: watches nothing"
    for name, spec in by_kind(found_objects, "NetworkPolicy"):
        for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
            for peer in (*rule.get("from", []), *rule.get("to", [])):
                wanted = peer.get("podSelector", {}).get("matchLabels", {})
                if "namespaceSelector" not in peer and \
                        not any(manifests.matches(wanted, one) for one in pods):
                    yield f"{name}: names a peer that is not there"


def kernel_faults(found_objects):
    for name, spec, container in containers(found_objects):
        if spec.get("securityContext", {}).get("sysctls"):
            yield f"{name}: sets the node's sysctls"
        if "procMount" in container.get("securityContext", {}):
            yield f"{name}: takes the mask off /proc"
    for name, spec in by_kind(found_objects, "Job"):
        if "ttlSecondsAfterFinished" not in spec:
            yield f"{name}: stays for ever when it is done"


def object_faults(found_objects):
    for faults in (version_faults, environment_faults, port_faults, controller_faults,
                   account_faults, budget_faults, target_faults, kernel_faults):
        yield from faults(found_objects)


def all_faults():
    for example in manifests.EXAMPLES:
        for fault in object_faults(manifests.objects(example)):
            yield f"{example}: {fault}"
