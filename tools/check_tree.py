#!/usr/bin/env python3
"""Checks sizes and habits of every file that git knows or would add.

Limits: files 500 lines (kernels 700, headers of both the same), functions 70 lines (GPU kernels
120), lines 100 columns. No file called a utility, no TODO, no commented-out include, no path of
somebody's machine, no address of a package registry.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

FILE_LINES_MAX = 500
KERNEL_FILE_LINES_MAX = 700
FUNCTION_LINES_MAX = 70
GPU_FUNCTION_LINES_MAX = 120
COLUMNS_MAX = 100

CPP = {".h", ".cc", ".cu", ".cuh"}
CODE = CPP | {".py", ".rs", ".sh", ".cmake", ".proto"}
# Data and lock files, and other projects' contracts.
SKIPPED = ("proto/google/", "proto/grpc/", "tests/fuzz/corpus/", "tests/data/", "deploy/grafana/")
SKIPPED_SUFFIXES = (".lock", ".json", ".txt", ".svg", ".png", ".bin", ".gz", ".safetensors")

BAD_NAME = re.compile(r"(^|[_/])(utils?|helpers?|misc|common)([_.]|$)")
BANNED = [
    (re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b"), "an open end belongs in an issue"),
    (re.compile(r"^\s*//\s*#\s*include"), "commented-out code"),
    (re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/"), "a path of somebody's machine"),
    (re.compile(r"\b(?:pypi\.org|crates\.io|npmjs\.(?:org|com)|proxy\.golang\.org|"
                r"deb\.debian\.org|files\.pythonhosted\.org)"), "names a registry's host"),
]
# A checker names what it looks for.
BANNED_EXEMPT = {"tools/check_tree.py"}

NOT_A_FUNCTION = re.compile(
    r"^(?:namespace|class|struct|union|enum|extern|requires|if|for|while|switch|do|else|try|"
    r"catch)\b")


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in sorted(set(listing.splitlines())):
        if (ROOT / name).is_file() and not name.startswith(SKIPPED):
            yield name


def blank_out(text):
    """C++ text with comments, strings and preprocessor lines blanked, line breaks kept."""
    pattern = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|'
        r"(?<![0-9A-Fa-f])'(?:\\.|[^'\\\n])+'|^[ \t]*#(?:\\\n|[^\n])*",
        re.DOTALL | re.MULTILINE)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group(0)), text)


def starts_function(header):
    """Whether the text between the last ; { } and a { declares a function."""
    header = re.sub(r"^\s*template\s*<[^{}]*?>\s*(?=\w)", "", header.strip())
    header = re.sub(r"^(?:public|private|protected)\s*:\s*", "", header)
    if "(" not in header or NOT_A_FUNCTION.match(header):
        return False
    return re.search(r"=\s*$", header) is None


def functions_of(text):
    """(first line, length, is a GPU kernel) of every outermost function body."""
    code = blank_out(text)
    stack = []  # (is a function, its first line, GPU)
    inside = 0
    header_start = 0
    for match in re.finditer(r"[{};]", code):
        char, at = match.group(0), match.start()
        if char == "{":
            header = code[header_start:at]
            function = inside == 0 and starts_function(header)
            first = header_start + len(header) - len(header.lstrip())
            line = code.count("\n", 0, first) + 1
            stack.append((function, line, "__global__" in header))
            inside += function
        elif char == "}" and stack:
            function, line, gpu = stack.pop()
            if function:
                inside -= 1
                yield line, code.count("\n", 0, at) + 2 - line, gpu
        header_start = at + 1


def python_functions(text):
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = re.match(r"(\s*)(?:async )?def \w", line)
        if not match:
            continue
        end = number + 1
        for later in range(number + 1, len(lines)):
            body = lines[later]
            if body.strip() and len(body) - len(body.lstrip()) <= len(match.group(1)):
                if not body.lstrip().startswith(")"):
                    break
            if body.strip():
                end = later + 1
        yield number + 1, end - number, False


def check_file(name):
    path = ROOT / name
    if BAD_NAME.search(name):
        yield f"{name}: says nothing about what is in it"
    if path.suffix in SKIPPED_SUFFIXES:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if path.suffix in CODE - {".rs"} and len(line) > COLUMNS_MAX:  # rustfmt keeps its own
            yield f"{name}:{number}: {len(line)} columns, at most {COLUMNS_MAX}"
        if name in BANNED_EXEMPT:
            continue
        for pattern, reason in BANNED:
            if pattern.search(line):
                yield f"{name}:{number}: {reason}: {line.strip()[:80]}"
    if path.suffix not in CODE:
        return
    limit = KERNEL_FILE_LINES_MAX if name.startswith("kernels/") else FILE_LINES_MAX
    if len(lines) > limit:
        yield f"{name}: {len(lines)} lines, at most {limit}"
    functions = functions_of(text) if path.suffix in CPP else (
        python_functions(text) if path.suffix == ".py" else ())
    for line, length, gpu in functions:
        gpu = gpu or name.startswith("tests/gpu/")
        most = GPU_FUNCTION_LINES_MAX if gpu else FUNCTION_LINES_MAX
        if length > most:
            yield f"{name}:{line}: function of {length} lines, at most {most}"


def main():
    names = list(tracked_files())
    errors = [error for name in names for error in check_file(name)]
    print("\n".join(errors) if errors else f"tree is tidy: {len(names)} files")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
