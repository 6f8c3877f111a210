#!/usr/bin/env python3
"""Writes docs/API.md from the comments of the wire contracts.

    tools/gen_api.py            writes the page
    tools/gen_api.py --check    fails when the page in the tree is not what would be written

Needs protoc and the Python package protobuf.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from google.protobuf import descriptor_pb2

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONTRACTS = [
    ("nibble/inference/v1/inference.proto", "Public contract, on the gateway"),
    ("nibble/admin/v1/admin.proto", "Admin contract, on a port of its own"),
    ("nibble/worker/v1/worker.proto", "Gateway to worker, internal"),
]
INTRO = """# API

Written by `tools/gen_api.py` from the comments in `proto/`; edit those.
Statuses and their details: [OPERATIONS](OPERATIONS.md).
"""
SCALARS = {
    value: name[len("TYPE_") :].lower()
    for name, value in descriptor_pb2.FieldDescriptorProto.Type.items()
}


def load(path):
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(
            ["protoc", "--include_source_info", f"--descriptor_set_out={out.name}",
             "-I", ROOT / "proto", path],
            check=True, cwd=ROOT / "proto")
        files = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(out.name).read_bytes())
    return files.file[0]


class Page:
    def __init__(self, proto):
        self.proto = proto
        self.lines = []
        self.comments = {
            tuple(location.path): " ".join(location.leading_comments.split())
            for location in proto.source_code_info.location
        }

    def comment(self, path):
        return self.comments.get(tuple(path), "").replace("|", "\\|")

    def type_of(self, field, message):
        for nested in message.nested_type:
            if nested.options.map_entry and field.type_name.endswith("." + nested.name):
                key, value = nested.field
                return f"map of {SCALARS[key.type]} to {SCALARS[value.type]}"
        name = field.type_name.split(".")[-1] if field.type_name else SCALARS[field.type]
        repeated = field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
        return f"repeated {name}" if repeated else name

    def services(self):
        for index, service in enumerate(self.proto.service):
            self.lines += [f"### {service.name}", "", self.comment([6, index]), "",
                           "| call | request | response | |", "|---|---|---|---|"]
            for number, method in enumerate(service.method):
                request, response = (name.split(".")[-1]
                                     for name in (method.input_type, method.output_type))
                stream = "stream of " if method.server_streaming else ""
                self.lines.append(f"| {method.name} | {request} | {stream}{response} | "
                                  f"{self.comment([6, index, 2, number])} |")
            self.lines.append("")

    def messages(self):
        for index, message in enumerate(self.proto.message_type):
            self.lines += [f"### {message.name}", ""]
            if self.comment([4, index]):
                self.lines += [self.comment([4, index]), ""]
            if not message.field:
                self.lines += ["No fields.", ""]
                continue
            self.lines += ["| # | field | type | |", "|---|---|---|---|"]
            for number, field in enumerate(message.field):
                optional = "optional " if field.proto3_optional else ""
                self.lines.append(f"| {field.number} | {field.name} | "
                                  f"{optional}{self.type_of(field, message)} | "
                                  f"{self.comment([4, index, 2, number])} |")
            self.lines.append("")

    def enums(self):
        for index, enum in enumerate(self.proto.enum_type):
            self.lines += [f"### {enum.name}", "", "| # | value | |", "|---|---|---|"]
            for number, value in enumerate(enum.value):
                self.lines.append(f"| {value.number} | {value.name} | "
                                  f"{self.comment([5, index, 2, number])} |")
            self.lines.append("")


def render():
    parts = [INTRO]
    for path, title in CONTRACTS:
        page = Page(load(path))
        page.lines += [f"## {page.proto.package}: {title}", ""]
        page.services()
        page.messages()
        page.enums()
        parts.append("\n".join(page.lines))
    return "\n".join(parts).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    target = ROOT / "docs" / "API.md"
    text = render()
    if not arguments.check:
        target.write_text(text)
        return 0
    if target.read_text() == text:
        return 0
    print("docs/API.md is not what tools/gen_api.py writes; run it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
