"""kube-score over the examples' manifests, and what it finds that is meant to be so."""

import json
import subprocess

import yaml

import manifests

GOOD = 10  # the best grade
# Its checks that are not asked, and why.
IGNORED = {
    "container-image-pull-policy":
        "tags are versions and never move; a pod that starts again must not need the registry",
    "deployment-has-host-podantiaffinity":
        "pods are spread by topologySpreadConstraints, which its pod-topology-spread-constraints "
        "sees; more of them than nodes must still run",
    "statefulset-has-host-podantiaffinity": "the same",
}
# Checks that it does not ask by itself. Requests that equal limits, of which three more speak, are
# a node's matter: examples with cores of their own have them.
ALSO_ASKED = ["container-ports-check", "container-seccomp-profile"]
# (example, check) of which one finding is meant, and why.
MEANT = {
    ("laptop", "deployment-replicas"): "one node: a second gateway would fall with the first",
    ("two-models", "horizontalpodautoscaler-replicas"):
        "a group costs its model's memory; one waits, others come with the queue",
}


def with_known_kinds(found_objects):
    """The same objects with each LeaderWorkerSet, which kube-score does not know, as the two
    StatefulSets that its controller makes of it."""
    for found in found_objects:
        if found["kind"] != "LeaderWorkerSet":
            yield found
            continue
        group = found["spec"]["leaderWorkerTemplate"]
        for suffix, part in (("", "leaderTemplate"), ("-0", "workerTemplate")):
            labels = group[part]["metadata"]["labels"]
            yield {"apiVersion": "apps/v1", "kind": "StatefulSet",
                   "metadata": {**found["metadata"], "name": found["metadata"]["name"] + suffix},
                   "spec": {"serviceName": found["metadata"]["name"],
                            "replicas": found["spec"]["replicas"],
                            "selector": {"matchLabels": labels}, "template": group[part]}}


def findings(found_objects):
    """(check, object, check and what) of everything that is less than good."""
    words = ["kube-score", "score", "--output-format", "json", "--ignore-container-cpu-limit",
             "--kubernetes-version", "v" + manifests.KUBERNETES.rpartition(".")[0]]
    for check in IGNORED:
        words += ["--ignore-test", check]
    for check in ALSO_ASKED:
        words += ["--enable-optional-test", check]
    text = yaml.safe_dump_all(with_known_kinds(found_objects))
    result = subprocess.run([*words, "-"], input=text, capture_output=True, text=True,
                            check=False, timeout=manifests.COMMAND_SECONDS)
    if not result.stdout.startswith("["):
        raise RuntimeError(result.stderr)
    for scored in json.loads(result.stdout):
        for check in scored["checks"]:
            for comment in check.get("comments") or []:
                if not check["skipped"] and check["grade"] < GOOD:
                    yield (check["check"]["id"],
                           f"{scored['object_name']}: {check['check']['id']}: "
                           f"{comment.get('path', '')} {comment['summary']}")


def object_faults(found_objects):
    return (what for _, what in findings(found_objects))


def all_faults():
    meant_and_found = set()
    for example in manifests.EXAMPLES:
        for check, what in findings(manifests.objects(example)):
            if (example, check) in MEANT:
                meant_and_found.add((example, check))
            else:
                yield f"{example}: {what}"
    for example, check in sorted(set(MEANT) - meant_and_found):
        yield f"{example}: {check} finds nothing any more: take it out of MEANT"
