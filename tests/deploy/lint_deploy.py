#!/usr/bin/env python3
"""Checks deploy/ without a cluster: the chart against its goldens, Kubernetes' schemas and the
programs' flags; rules with promtool; boards; Dockerfiles.

usage: tests/deploy/lint_deploy.py [--update]   (--update writes the goldens anew)
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ["PATH"] = os.pathsep.join([str(ROOT / ".cache" / "bin"), str(ROOT / ".venv" / "bin"),
                                      os.environ["PATH"]])

import boards  # noqa: E402  pylint: disable=wrong-import-position
import manifest_faults  # noqa: E402  pylint: disable=wrong-import-position
import kube_score  # noqa: E402  pylint: disable=wrong-import-position
import manifests  # noqa: E402  pylint: disable=wrong-import-position
import planted_faults  # noqa: E402  pylint: disable=wrong-import-position
import rules  # noqa: E402  pylint: disable=wrong-import-position

SCHEMAS = ROOT / "build" / "deploy-schemas"
OWN_SCHEMAS = ROOT / "tests" / "deploy" / "crd-schemas"
BINARIES = pathlib.Path(os.environ.get("NIBBLE_BINARY_DIR", ROOT / "build" / "release")) / "bin"
DEFINITIONS = "_definitions.json"


def run(*words, text=None):
    """(succeeded, output) of a command."""
    result = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True,
                            text=True, input=text, check=False,
                            timeout=manifests.COMMAND_SECONDS)
    return result.returncode == 0, (result.stdout + result.stderr).strip()


def make_schemas():
    """Kubernetes' strict schemas with references that stay inside the folder: the package's own
    lead to the network."""
    import kubernetes_validate  # pylint: disable=import-outside-toplevel
    source = (pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" /
              f"v{manifests.KUBERNETES}-local-strict")
    stamp = SCHEMAS / f"made-{kubernetes_validate.__version__}-{manifests.KUBERNETES}"
    if stamp.exists():
        return
    shutil.rmtree(SCHEMAS, ignore_errors=True)
    SCHEMAS.mkdir(parents=True)
    kinds = r"^(_definitions|(serviceaccount|service|pod|configmap|deployment-apps|" \
            r"statefulset-apps|poddisruptionbudget-policy|networkpolicy-networking|" \
            r"horizontalpodautoscaler-autoscaling)-v\d)\.json$"
    for path in source.iterdir():
        if re.match(kinds, path.name):
            schema = json.loads(path.read_text(encoding="utf-8").replace(
                f'"/api/{DEFINITIONS}', f'"{DEFINITIONS}'))
            schema.pop("$id", None)
            (SCHEMAS / path.name).write_text(json.dumps(schema), encoding="utf-8")
    stamp.touch()


def schema_faults():
    """All examples in one run, which reads the schemas once."""
    make_schemas()
    ok, output = run(
        "kubeconform", "-strict", "-kubernetes-version", manifests.KUBERNETES,
        "-schema-location", f"{SCHEMAS}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json",
        "-schema-location",
        f"{OWN_SCHEMAS}/{{{{ .ResourceKind }}}}_{{{{ .ResourceAPIVersion }}}}.json",
        text="\n---\n".join(manifests.manifests(example) for example in manifests.EXAMPLES))
    if not ok:
        yield output


def helm_lint_faults():
    for example in manifests.EXAMPLES:
        result = manifests.helm("lint", ".", "--strict", "--kube-version", manifests.KUBERNETES,
                                "--values", f"examples/{example}.yaml")
        if result.returncode != 0 or re.search(r"\[(WARNING|ERROR)\]", result.stdout):
            yield f"{example}: {result.stdout}{result.stderr}"


def dockerfile_faults():
    for path in sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile")):
        ok, output = run("hadolint", "--no-color", path)
        if not ok:
            yield output


def generated_faults():
    ok, output = run(sys.executable, "tools/gen_boards.py", "--check")
    if not ok:
        yield output


def checks(update):
    """(name, tools without which it is not run, faults)."""
    yield "boards as generated", [], generated_faults
    yield "boards", [], boards.all_faults
    yield "rules", ["promtool"], rules.all_faults
    yield "goldens", ["helm"], lambda: manifests.golden_faults(update)
    yield "boards in the chart", ["helm"], manifests.board_faults
    yield "policy", ["helm"], manifests.policy_faults
    yield "refusals", ["helm"], manifests.refusal_faults
    yield "disk", ["helm"], manifests.disk_faults
    yield "options", ["helm"], lambda: manifests.option_faults(BINARIES)
    yield "helm lint", ["helm"], helm_lint_faults
    yield "kubeconform", ["helm", "kubeconform"], schema_faults
    yield "kube-score", ["helm", "kube-score"], kube_score.all_faults
    yield "manifests' faults", ["helm"], manifest_faults.all_faults
    yield "planted faults", ["helm", "kube-score"], planted_faults.all_faults
    yield "hadolint", ["hadolint"], dockerfile_faults


def main():
    failed = 0
    for name, tools, find in checks("--update" in sys.argv[1:]):
        missing = [tool for tool in tools if shutil.which(tool) is None]
        faults = ([f"{tool} is not installed; tools/setup installs it" for tool in missing]
                  or list(find()))
        print(f"{'FAILED' if faults else 'ok    '} {name}")
        for fault in faults:
            print(f"  {fault}")
        failed += bool(faults)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
