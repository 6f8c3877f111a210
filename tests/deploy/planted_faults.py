"""Faults planted into an example's manifests, each of which must be found. All of kube-linter's
default checks are among them, by their names there; the program itself is not needed."""

import copy

import manifest_faults
import kube_score
import manifests

EXAMPLE = "tp4"
# kube-linter 0.8, those that are on unless somebody says otherwise.
DEFAULTS = {
    "dangling-service", "deprecated-service-account-field", "docker-sock",
    "drop-net-raw-capability", "duplicate-env-var", "env-var-secret", "host-ipc", "host-network",
    "host-pid", "invalid-target-ports", "job-ttl-seconds-after-finished", "latest-tag",
    "liveness-port", "mismatching-selector", "no-anti-affinity", "no-extensions-v1beta",
    "no-read-only-root-fs", "non-existent-service-account", "pdb-max-unavailable",
    "pdb-min-available", "pdb-unhealthy-pod-eviction-policy", "privilege-escalation-container",
    "privileged-container", "readiness-port", "run-as-non-root", "sensitive-host-mounts",
    "ssh-port", "startup-port", "unsafe-sysctls", "unset-cpu-requirements",
    "unset-memory-requirements",
}
PDB, HPA = "PodDisruptionBudget", "HorizontalPodAutoscaler"


def security(**settings):
    return lambda part: part["securityContext"].update(settings)


def capability(name):
    return lambda container: container["securityContext"]["capabilities"].update(add=[name])


def host_path(path):
    return lambda pod: pod.setdefault("volumes", []).append(
        {"name": "host", "hostPath": {"path": path}})


def variables(*names):
    return lambda container: container.setdefault("env", []).extend(
        {"name": name, "value": "planted"} for name in names)


def probe(which, port):
    return lambda container: container.update({which: {"tcpSocket": {"port": port}}})


def spec(**settings):
    return lambda found: found["spec"].update(settings)


def selecting(**labels):
    return lambda found: found["spec"]["selector"].update(matchLabels=labels)


# Where: a kind (its first object), "pod" and "container" of the first Deployment, or "all".
# who must find it → (which check, where, what is done there, a part of what must be said)
PLANTED = {
    manifests.object_faults: [
        ("dangling-service", "Service", spec(selector={"a": "b"}), "selects nothing"),
        ("dangling-networkpolicy", "NetworkPolicy",
         spec(podSelector={"matchLabels": {"a": "b"}}), "selects nothing"),
        ("non-isolated-pod", "all", lambda found: found.remove(
            next(one for one in found if one["metadata"]["name"] == "nibble-test")),
         "has no NetworkPolicy"),
        ("docker-sock", "pod", host_path("/run/docker.sock"), "host path"),
        ("sensitive-host-mounts", "pod", host_path("/etc"), "host path"),
        ("drop-net-raw-capability", "container", security(capabilities={}), "capabilities"),
        ("drop-net-raw-capability", "container", capability("NET_RAW"), "capabilities"),
        ("privilege-escalation-container", "container", capability("SYS_ADMIN"), "capabilities"),
        ("privilege-escalation-container", "container", security(allowPrivilegeEscalation=True),
         "privileges"),
        ("privileged-container", "container", security(privileged=True), "privileges"),
        ("no-read-only-root-fs", "container", security(readOnlyRootFilesystem=False), "root file"),
        ("run-as-non-root", "container", security(runAsNonRoot=False), "user"),
        ("run-as-non-root", "pod", security(runAsUser=0), "runs as root"),
        ("host-ipc", "pod", lambda pod: pod.update(hostIPC=True), "namespaces"),
        ("host-network", "pod", lambda pod: pod.update(hostNetwork=True), "namespaces"),
        ("host-pid", "pod", lambda pod: pod.update(hostPID=True), "namespaces"),
        ("latest-tag", "container", lambda one: one.update(image="r/gateway:latest"), "image r/"),
        ("latest-tag", "container", lambda one: one.update(image="r/gateway"), "image r/"),
        ("unset-cpu-requirements", "container",
         lambda one: one["resources"]["requests"].pop("cpu"), "no requests"),
        ("unset-memory-requirements", "container",
         lambda one: one["resources"]["limits"].pop("memory"), "no limit of memory"),
    ],
    manifest_faults.object_faults: [
        ("deprecated-service-account-field", "pod", lambda pod: pod.update(serviceAccount="nibble"),
         "old name"),
        ("non-existent-service-account", "pod", lambda pod: pod.update(serviceAccountName="other"),
         "no account other"),
        ("wildcard-in-rules", "all", lambda found: found.append(
            {"kind": "ClusterRole", "apiVersion": "rbac.authorization.k8s.io/v1",
             "metadata": {"name": "planted"}, "rules": [{"verbs": ["*"]}]}), "ask no cluster"),
        ("duplicate-env-var", "container", variables("A", "A"), "A is set twice"),
        ("env-var-secret", "container", variables("CLIENT_SECRET"), "stands in the manifest"),
        ("env-var-secret", "container", variables("NIBBLE_API_KEY"), "stands in the manifest"),
        ("invalid-target-ports", "container",
         lambda one: one["ports"][0].update(name="much-too-long-a-name"), "no name for a port"),
        ("invalid-target-ports", "Service",
         lambda found: found["spec"]["ports"][0].update(targetPort="gone"), "has a port gone"),
        ("ssh-port", "container", lambda one: one["ports"][0].update(containerPort=22), "port 22"),
        ("ssh-port", "Service", lambda found: found["spec"]["ports"][0].update(port=22), "port 22"),
        ("liveness-port", "container", probe("livenessProbe", 1234), "livenessProbe asks"),
        ("readiness-port", "container", probe("readinessProbe", "gone"), "readinessProbe asks"),
        ("startup-port", "container", probe("startupProbe", 1234), "startupProbe asks"),
        ("mismatching-selector", "Deployment", selecting(a="b"), "does not select its pods"),
        ("no-anti-affinity", "pod", lambda pod: pod["topologySpreadConstraints"].pop(1),
         "not spread over nodes"),
        ("no-anti-affinity", "pod", lambda pod: pod["topologySpreadConstraints"][1].update(
            labelSelector={"matchLabels": {"a": "b"}}), "not spread over nodes"),
        ("no-extensions-v1beta", "Deployment",
         lambda found: found.update(apiVersion="extensions/v1beta1"), "will go"),
        ("pdb-max-unavailable", PDB, lambda found: found["spec"].update(maxUnavailable="0%"),
         "lets no pod go"),
        ("pdb-min-available", PDB, spec(minAvailable="100%"), "lets no pod go"),
        ("pdb-min-available", PDB, spec(minAvailable=3), "lets no pod go of 3"),
        ("pdb-unhealthy-pod-eviction-policy", PDB,
         lambda found: found["spec"].pop("unhealthyPodEvictionPolicy"), "keeps pods"),
        ("dangling-horizontalpodautoscaler", HPA, lambda found: found["spec"]["scaleTargetRef"]
         .update(name="gone"), "gone, which is not there"),
        ("dangling-servicemonitor", "ServiceMonitor", selecting(a="b"), "watches nothing"),
        ("dangling-networkpolicypeer-podselector", "NetworkPolicy", spec(
            ingress=[{"from": [{"podSelector": {"matchLabels": {"a": "b"}}}]}]), "a peer that"),
        ("unsafe-sysctls", "pod", security(sysctls=[{"name": "net.core.somaxconn", "value": "1"}]),
         "sysctls"),
        ("unsafe-proc-mount", "container", security(procMount="Unmasked"), "mask off"),
        ("job-ttl-seconds-after-finished", "all", lambda found: found.append(
            {"kind": "Job", "apiVersion": "batch/v1", "metadata": {"name": "planted"},
             "spec": {}}), "stays for ever"),
    ],
    kube_score.object_faults: [
        ("container-ephemeral-storage-request-and-limit", "container",
         lambda one: one["resources"]["limits"].pop("ephemeral-storage"), "Ephemeral Storage"),
        ("pod-probes-identical", "container",
         lambda one: one.update(readinessProbe=one["livenessProbe"]), "pod-probes-identical"),
        ("deployment-has-poddisruptionbudget", PDB, selecting(a="b"), "PodDisruptionBudget"),
    ],
}


def planted(where, plant):
    """The example's objects with something done to one of them."""
    found = copy.deepcopy(manifests.objects(EXAMPLE))
    part = found
    if where != "all":
        kind = "Deployment" if where in ("pod", "container") else where
        part = next(one for one in found if one["kind"] == kind)
    if where in ("pod", "container"):
        part = part["spec"]["template"]["spec"]
    if where == "container":
        part = part["containers"][0]
    plant(part)
    return found


def all_faults():
    names = set()
    for find, rows in PLANTED.items():
        for check, where, plant, said in rows:
            names.add(check)
            faults = list(find(planted(where, plant)))
            if not any(said in fault for fault in faults):
                yield f"{check}: planted in {where} and not found; said was: {faults}"
    for check in sorted(DEFAULTS - names):
        yield f"{check}: nothing is planted"
