#!/usr/bin/env python3
"""Checks that folders use only the folders that they may use.

Two sources are compared with the table below: the #include lines of every file, and the nibble::
targets that each folder's CMakeLists.txt links. An include whose target is not linked, directly
or through another, is an error as well.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The folder on the left may use the folders on its right, and nothing else. `base` stands for
# itself in every list but those of kernels/.
ARROWS = {
    "base": ["proto"],
    "proto": [],
    "kernels/layout": [],
    "kernels/sampling": [],
    "kernels/cpu": ["kernels/layout"],
    "kernels/cuda": ["kernels/layout", "kernels/sampling"],
    "services/text": ["base"],
    "services/gateway": ["base", "proto", "services/text"],
    "services/fetch": ["base"],
    "services/cli": ["base", "proto", "services/fetch", "services/text", "worker/collectives",
                     "worker/execution/cpu", "worker/execution/cuda", "worker/model",
                     "worker/quantize", "worker/weights"],
    "worker/model": ["base"],
    "worker/weights": ["base", "kernels/layout", "worker/model"],
    "worker/collectives": ["base", "kernels/cpu", "kernels/layout"],
    "worker/step": ["base"],
    "worker/execution/cpu": ["base", "kernels/cpu", "kernels/layout", "kernels/sampling",
                             "worker/collectives", "worker/model", "worker/step",
                             "worker/weights"],
    # The host's side of sampling and the check of plans are the CPU executor's.
    "worker/execution/cuda": ["base", "kernels/cpu", "kernels/cuda", "kernels/layout",
                              "kernels/sampling", "worker/collectives", "worker/execution/cpu",
                              "worker/model", "worker/step", "worker/weights"],
    "worker/constraints": ["base", "services/text", "worker/step"],
    "worker/scheduling": ["base", "worker/step"],
    "worker/engine": ["base", "worker/constraints", "worker/scheduling", "worker/step"],
    "worker/quantize": ["base", "kernels/cpu", "kernels/layout", "services/text",
                        "worker/execution/cpu", "worker/model", "worker/weights"],
    "worker/group": ["base", "proto", "worker/step"],
    # The engine's interface speaks in the structs of the narrow waist.
    "worker/rpc": ["base", "proto", "worker/engine", "worker/step"],
}
WORKER = sorted(folder for folder in ARROWS if folder.startswith(("worker/", "kernels/")))
ARROWS["worker"] = ["base", "proto", *WORKER]

SOURCE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
DECLARATION = re.compile(r"\bnibble_(?:module|binary)\(([^)]*)\)", re.DOTALL)
LINK = re.compile(r"\btarget_link_libraries\(([^)]*)\)", re.DOTALL)
TARGET = re.compile(r"nibble::([a-z0-9_]+)")


def folder_of(path):
    """The longest folder of the table that holds `path`, or None."""
    parts = path.split("/")
    for length in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:length])
        if folder in ARROWS:
            return folder
    return None


def targets_declared():
    """{target: folder} of every nibble_module; nibble_proto declares its own way."""
    found = {"proto": "proto"}
    for folder in ARROWS:
        path = ROOT / folder / "CMakeLists.txt"
        if path.exists():
            text = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
            found.update(dict.fromkeys(re.findall(r"\bnibble_module\(\s*(\w+)", text), folder))
    return found


def proto_include(header):
    return header.endswith((".pb.h", ".grpc.pb.h"))


def includes_of(folder):
    """(file, line, included folder) of every include that crosses folders."""
    for path in sorted((ROOT / folder).rglob("*")):
        relative = path.relative_to(ROOT).as_posix()
        if path.suffix not in SOURCE_SUFFIXES or folder_of(relative) != folder:
            continue
        text = path.read_text(encoding="utf-8")
        for match in INCLUDE.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            header = match.group(1)
            target = "proto" if proto_include(header) else folder_of(header)
            if target and target != folder:
                yield relative, line, target


def links_of(folder, declared):
    """Folders of the nibble:: targets that the folder's CMakeLists.txt links."""
    path = ROOT / folder / "CMakeLists.txt"
    if not path.exists():
        return set(), []
    text = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
    found, unknown = set(), []
    for body in DECLARATION.findall(text) + LINK.findall(text):
        for target in TARGET.findall(body):
            linked = declared.get(target)
            if linked is None:
                unknown.append(target)
            elif linked != folder:
                found.add(linked)
    return found, unknown


def reachable(start, links):
    seen, queue = set(), list(links[start])
    while queue:
        folder = queue.pop()
        if folder not in seen:
            seen.add(folder)
            queue.extend(links.get(folder, ()))
    return seen


def main():
    errors = []
    links = {}
    declared = targets_declared()
    for folder in ARROWS:
        links[folder], unknown = links_of(folder, declared)
        errors += [f"{folder}/CMakeLists.txt: nibble::{target} is no folder's target"
                   for target in unknown]
        for linked in sorted(links[folder] - set(ARROWS[folder])):
            errors.append(f"{folder}/CMakeLists.txt: {folder} may not use {linked}")
    # Folders of headers alone have no target.
    targets = {folder for folder in ARROWS if (ROOT / folder / "CMakeLists.txt").exists()}
    for folder in ARROWS:
        linked = reachable(folder, links)
        built = folder in targets
        for path, line, target in includes_of(folder):
            if target not in ARROWS[folder]:
                errors.append(f"{path}:{line}: {folder} may not use {target}")
            elif built and target in targets and target not in linked:
                errors.append(f"{path}:{line}: uses {target}, which {folder} does not link")
    for top in ("base", "kernels", "services", "worker"):
        for path in sorted((ROOT / top).rglob("CMakeLists.txt")):
            folder = path.parent.relative_to(ROOT).as_posix()
            if folder not in ARROWS:
                errors.append(f"{folder}: is not in the table of tools/check_arrows.py")
    print("\n".join(errors) if errors else f"arrows hold: {len(ARROWS)} folders")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
