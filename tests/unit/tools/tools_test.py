"""The checks find what they are for."""

import pathlib
import tempfile
import unittest
from unittest import mock

import check_arrows
import check_tree


class FunctionLengthTest(unittest.TestCase):

    def lengths(self, text):
        return [(line, length) for line, length, _ in check_tree.functions_of(text)]

    def test_finds_functions_in_namespaces_and_classes(self):
        text = ("namespace a {\n"                       # 1
                "int One() {\n  return 1;\n}\n"         # 2-4
                "class B : public C {\n"                # 5
                " public:\n"
                "  B() : c_{1}, d_(2) {}\n"             # 7
                "  template <typename T>\n"             # 8
                "  int Two(T t) const {\n    if (t) {\n      return 2;\n    }\n    return 0;\n  }\n"
                "};\n"
                "}  // namespace a\n")
        self.assertIn((2, 3), self.lengths(text))
        self.assertIn((8, 7), self.lengths(text))

    def test_lambdas_and_blocks_belong_to_their_function(self):
        text = "void F() {\n  auto g = [](int x) {\n    return x;\n  };\n  for (;;) {\n  }\n}\n"
        self.assertEqual(self.lengths(text), [(1, 7)])

    def test_braces_in_strings_and_comments_do_not_count(self):
        text = 'void F() {\n  Use("{", \'{\');  // {\n  /* { */\n}\nvoid G() {\n}\n'
        self.assertEqual(self.lengths(text), [(1, 4), (5, 2)])

    def test_data_is_no_function(self):
        self.assertEqual(self.lengths("constexpr int kA[] = {\n  F(1),\n};\nstruct S {\n};\n"), [])

    def test_python_functions(self):
        text = "def f(\n    a,\n):\n    return a\n\n\nclass C:\n    def g(self):\n        pass\n"
        self.assertEqual([(line, length) for line, length, _ in
                          check_tree.python_functions(text)], [(1, 4), (8, 2)])


class ArrowTest(unittest.TestCase):

    def run_on(self, files):
        """The check's exit code and lines for a tree of these files."""
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name, text in files.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            lines = []
            with mock.patch.object(check_arrows, "ROOT", root), \
                    mock.patch("builtins.print", lines.append):
                return check_arrows.main(), "\n".join(lines)

    def test_permitted_arrows_hold(self):
        code, _ = self.run_on({
            "base/CMakeLists.txt": "nibble_module(base SRCS a.cc)",
            "worker/model/CMakeLists.txt":
                "nibble_module(worker_model SRCS m.cc DEPS nibble::base)",
            "worker/model/m.cc": '#include "base/status.h"\n#include "worker/model/m.h"\n'})
        self.assertEqual(code, 0)

    def test_forbidden_include_is_found(self):
        code, lines = self.run_on({"kernels/cpu/k.cc": '#include "base/status.h"\n'})
        self.assertEqual(code, 1)
        self.assertIn("kernels/cpu/k.cc:1: kernels/cpu may not use base", lines)

    def test_forbidden_link_is_found(self):
        code, lines = self.run_on({
            "worker/engine/CMakeLists.txt": "nibble_module(worker_engine SRCS e.cc)",
            "services/gateway/CMakeLists.txt":
                "nibble_module(services_gateway SRCS g.cc DEPS nibble::worker_engine)"})
        self.assertEqual(code, 1)
        self.assertIn("services/gateway may not use worker/engine", lines)

    def test_include_without_link_is_found(self):
        code, lines = self.run_on({
            "base/CMakeLists.txt": "nibble_module(base SRCS a.cc)",
            "worker/step/CMakeLists.txt": "nibble_module(worker_step SRCS s.cc)",
            "worker/step/s.cc": '\n#include "base/status.h"\n'})
        self.assertEqual(code, 1)
        self.assertIn("worker/step/s.cc:2: uses base, which worker/step does not link", lines)


if __name__ == "__main__":
    unittest.main()
