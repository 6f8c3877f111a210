#!/usr/bin/env python3
"""Tables and plots of docs/benchmarks/gpu.md out of the records of `nibble bench --device cuda`.

usage: tools/bench/gpu_page.py [--check]
       tools/bench/gpu_page.py --join RECORDS.json... > docs/benchmarks/GPU-SHAPE.json

Between `<!-- table: NAME of GPU-SHAPE -->` and `<!-- end -->` the page holds what is made here; a
NAME that no records stand for is left out. Of records of the same conditions the last counts.
--check writes nothing and fails where page or plots are not what the records give.
"""

import json
import math
import pathlib
import re
import sys

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"
PAGE = FOLDER / "gpu.md"
TARGETS = FOLDER / "gpu-targets.json"
PLOTTED = "h200-mistral-7b"
COLORS = ("#1b6ca8", "#c8553d", "#588157", "#7a5195")


class Records:
    """What was measured of a shape on a GPU: `name` is h200-mistral-7b, say."""

    def __init__(self, name):
        self.targets = json.loads(TARGETS.read_text())[name]
        self.all = json.loads((FOLDER / f"{name}.json").read_text())
        self.headers = [record for record in self.all if record.get("record") == "header"]
        lines = False  # of the table of fused modules, which has models of its own for every line
        for record in self.all:
            if record.get("record") == "header":
                lines = "--table autoawq" in record["command"]
            record["lines"] = lines

    def find(self, metric, lines=False, **wanted):
        """The last record of every condition, in the order of the first."""
        found = {}
        for record in self.all:
            if record.get("metric") != metric or record["lines"] != lines:
                continue
            if record.get("activations", "fp16") != "fp16":
                continue  # the page is about what AWQ tools write
            if any(record.get(key) != value for key, value in wanted.items()):
                continue
            found[tuple(record.get(key) for key in ("tp", "batch", "prompt", "depth", "fusion",
                                                    "owner", "operation"))] = record
        return list(found.values())

    def value(self, metric, **wanted):
        found = self.find(metric, **wanted)
        return found[-1]["value"] if found else None


def number(value, digits=0):
    if value is None:
        return ""
    text = f"{value:,.{digits}f}".replace(",", " ")
    return text if abs(value) >= 10000 else text.replace(" ", "")


def table(rows):
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def conditions(records):
    lines = []
    for header in records.headers:
        state = f"{header['gpu']}, driver {header['driver']}, CUDA {header['cuda']}"
        lines.append(f"- `{header['command']}`: {state}, SM {header['sm_clock']}, memory "
                     f"{header['memory_clock']}, commit {header['commit'][:7]}")
    return "\n".join(lines)


def figures(records):
    targets = records.targets
    columns = []
    for name in targets["columns"]:
        kind, count = name.split()
        if kind == "batch":
            value = records.value("decode_tokens_per_s", batch=int(count), depth=128, fusion="on",
                                  tp=1)
        elif kind == "prefill":
            value = records.value("prefill_tokens_per_s", prompt=int(count), fusion="on", tp=1)
        else:
            value = records.value("decode_tokens_per_s", batch=1, depth=int(count), fusion="on",
                                  tp=1)
        columns.append(value)
    titles = [name.replace("batch ", "").replace("depth ", "B = 1 at depth ")
              for name in targets["columns"]]
    rows = [["tokens/s", *titles], ["nibble", *(f"**{number(value)}**" if value else ""
                                                for value in columns)]]
    for line in targets["rows"]:
        rows.append([line["name"], *(number(value) for value in line["values"])])
    for line in targets["rows"]:
        if line["name"] == "aimed at":
            shares = [f"{100 * value / aim:.0f} %" if value and aim else ""
                      for value, aim in zip(columns, line["values"])]
            rows.append(["of what is aimed at", *shares])
    return table(rows)


def first_tokens(records):
    rows = [["prompt", "first token, ms", "tokens/s", "spread"]]
    for record in sorted(records.find("ttft_ms", fusion="on", tp=1), key=lambda r: r["prompt"]):
        rate = records.value("prefill_tokens_per_s", prompt=record["prompt"], fusion="on", tp=1)
        rows.append([record["prompt"], number(record["value"], 2), number(rate),
                     f"{100 * record['spread']:.1f} %"])
    return table(rows)


def memory(records):
    found = records.find("device_bytes", fusion="on", tp=1, owner="all")
    if not found:
        return None
    of = {key: found[-1][key] for key in ("batch", "prompt", "depth")}
    rows = [["owner", "GB", "planned"]]
    for record in records.find("device_bytes", fusion="on", tp=1, **of):
        planned = records.value("planned_bytes", fusion="on", tp=1, owner=record["owner"], **of)
        rows.append([record["owner"], number(record["value"] / 1e9, 3), number(planned / 1e9, 3)])
    many = "sequence" if of["batch"] == 1 else "sequences"
    return (f"Room for {of['batch']} {many}, {of['depth']} positions and {of['prompt']} tokens a "
            "step; beside the context.\n\n" + table(rows))


def operations(records):
    bandwidth = records.value("read_bytes_per_s")
    steps = {}
    for record in records.find("operation_us", fusion="on", tp=1):
        step = (record["depth"] > 0, record["batch"], record["prompt"])
        steps.setdefault(step, []).append(record)
    parts = []
    for (decode, batch, prompt), lines in steps.items():
        title = f"decode, {batch} at depth {prompt}" if decode else f"a prompt of {prompt}"
        rows = [[title, "calls", "µs each", "µs", "MB read", "of the read's rate", "TFLOP/s"]]
        total = {key: sum(line[key] for line in lines)
                 for key in ("value", "calls", "bytes", "flops")}
        for line in [*lines, {"operation": "all", **total}]:
            us = line["value"]
            share = 100 * line["bytes"] / (us * 1e-6) / bandwidth
            rows.append([line["operation"], line["calls"], number(us / line["calls"], 2),
                         number(us, 1), number(line["bytes"] / 1e6, 1), f"{share:.1f} %",
                         number(line["flops"] / us / 1e6)])
        parts.append(table(rows))
    if not parts:
        return None
    note = ("Each operation alone, by events, without graphs and overlap: launch, beginning and "
            "end are in its time, and a step is shorter than the sum. A plain read: "
            f"{bandwidth / 1e12:.2f} TB/s.")
    return "\n\n".join([note, *parts])


def fusion(records):
    parts = []
    for mode in ("on", "off"):
        rows = [[f"fusion {mode}, length", "prefill tokens/s", "published", "decode tokens/s",
                 "published", "times", "GiB", "published"]]
        for line in records.find("published_decode_tokens_per_s", lines=True, fusion=mode):
            of = {"lines": True, "fusion": mode, "prompt": line["prompt"]}
            length = line["prompt"]
            decode = records.value("decode_tokens_per_s", batch=1, depth=length, **of)
            if decode is None:
                continue
            used = records.find("device_bytes", lines=True, fusion=mode, owner="all", batch=1)
            used = [r["value"] for r in used if 2 * length - 32 <= r["depth"] <= 2 * length + 32]
            rows.append([length, number(records.value("prefill_tokens_per_s", **of)),
                         number(records.value("published_prefill_tokens_per_s", **of)),
                         number(decode, 1), number(line["value"], 1),
                         number(decode / line["value"], 1), number(used[-1] / 2 ** 30, 2),
                         number(records.value("published_gibibytes", **of), 2)])
        if len(rows) > 1:
            parts.append(table(rows))
    return "\n\n".join(parts) if parts else None


class Plot:
    """A chart of lines as SVG; axes are logarithmic, y not where it is linear."""

    W, H, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 70, 40, 150, 50

    def __init__(self, title, x_name, y_name, linear=False):
        self.title, self.x_name, self.y_name, self.lines = title, x_name, y_name, []
        self.linear = linear

    def line(self, name, points, dots=True, dashed=False):
        points = [(x, y) for x, y in points if y]
        if points:
            self.lines.append((name, points, dots, dashed))

    def svg(self):
        xs = [x for _, points, _, _ in self.lines for x, _ in points]
        ys = [y for _, points, _, _ in self.lines for _, y in points]
        x0, x1 = math.log10(min(xs)), math.log10(max(xs))
        scale = (lambda y: y) if self.linear else math.log10
        y0 = 0 if self.linear else math.floor(math.log10(min(ys)))
        y1 = math.ceil(scale(max(ys)))
        wide = self.W - self.LEFT - self.RIGHT
        high = self.H - self.TOP - self.BOTTOM

        def at(x, y):
            return (self.LEFT + wide * (math.log10(x) - x0) / max(x1 - x0, 1e-9),
                    self.TOP + high * (1 - (scale(y) - y0) / max(y1 - y0, 1e-9)))

        out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.W}" height="{self.H}" '
               'font-family="sans-serif" font-size="12">',
               f'<rect width="{self.W}" height="{self.H}" fill="white"/>',
               f'<text x="{self.LEFT}" y="22" font-size="14">{self.title}</text>',
               f'<text x="{self.LEFT + wide / 2:.0f}" y="{self.H - 12}" text-anchor="middle">'
               f'{self.x_name}</text>',
               f'<text transform="translate(16 {self.TOP + high / 2:.0f}) rotate(-90)" '
               f'text-anchor="middle">{self.y_name}</text>']
        powers = [10 ** power for power in range(y0, y1 + 1)]
        for value in range(y1 + 1) if self.linear else powers:
            _, y = at(min(xs), value)
            out.append(f'<line x1="{self.LEFT}" x2="{self.LEFT + wide}" y1="{y:.1f}" '
                       f'y2="{y:.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{self.LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                       f'{value:g}</text>')
        counts = len(set(xs)) <= 12 and all(x == int(x) for x in xs)
        marks = sorted(set(xs)) if counts else [
            10 ** power for power in range(math.ceil(x0), math.floor(x1) + 1)]
        for x in marks:
            px, _ = at(x, max(ys))
            out.append(f'<text x="{px:.1f}" y="{self.TOP + high + 18}" text-anchor="middle">'
                       f'{x:g}</text>')
        for index, (name, points, dots, dashed) in enumerate(self.lines):
            color = COLORS[index % len(COLORS)]
            places = [at(x, y) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            if dashed or not dots or len(points) > 1 and "," not in name:
                dash = ' stroke-dasharray="5 4"' if dashed else ""
                out.append(f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>')
            if dots:
                out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
                        for x, y in places]
            y = self.TOP + 10 + 18 * index
            out.append(f'<text x="{self.LEFT + wide + 10}" y="{y}" fill="{color}">{name}</text>')
        return "\n".join([*out, "</svg>", ""])


def plot_throughput(records):
    plot = Plot("Decode, 128 prompt and 128 generated tokens", "sequences", "tokens/s")
    for mode in ("on", "off"):
        plot.line(f"fusion {mode}", sorted(
            (r["batch"], r["value"])
            for r in records.find("decode_tokens_per_s", fusion=mode, tp=1, depth=128)))
    targets = records.targets
    for line in targets["rows"]:
        if line["name"] in ("peer", "limit"):
            plot.line(line["name"], [
                (int(name.split()[1]), value)
                for name, value in zip(targets["columns"], line["values"])
                if name.startswith("batch")], dots=False, dashed=True)
    return plot


def plot_latency(records):
    plot = Plot("First token of one prompt", "prompt tokens", "ms")
    for mode in ("on", "off"):
        plot.line(f"fusion {mode}", sorted(
            (r["prompt"], r["value"]) for r in records.find("ttft_ms", lines=True, fusion=mode)))
    return plot


def plot_memory(records):
    plot = Plot("Device memory of one sequence", "positions", "GB", linear=True)
    for mode in ("on", "off"):
        plot.line(f"fusion {mode}", sorted(
            (r["depth"], r["value"] / 1e9)
            for r in records.find("device_bytes", lines=True, fusion=mode, owner="all")))
    return plot


def plot_roofline(records):
    plot = Plot("Products against the memory and the tensor cores", "operations a byte", "TFLOP/s")
    bandwidth, peak = records.value("read_bytes_per_s"), 790e12
    if bandwidth is None:
        return plot
    ridge = peak / bandwidth
    plot.line("roof", [(1, bandwidth / 1e12), (ridge, peak / 1e12), (10000, peak / 1e12)],
              dots=False)
    for name in ("qkv", "gate and up", "down"):
        points = sorted((r["flops"] / r["bytes"], r["flops"] / r["value"] / 1e6)
                        for r in records.find("operation_us", operation=name, tp=1, fusion="on"))
        plot.line(name, points)
    return plot


TABLES = {"conditions": conditions, "figures": figures, "first tokens": first_tokens,
          "memory": memory, "operations": operations, "fusion": fusion}
PICTURES = {"throughput": plot_throughput, "latency": plot_latency, "memory": plot_memory,
            "roofline": plot_roofline}


def filled(text, measured):
    def fill(match):
        name, of = match[1], match[2]
        if of not in measured:
            measured[of] = Records(of)
        made = TABLES[name](measured[of])
        start = f"<!-- table: {name} of {of} -->"
        return match[0] if made is None else f"{start}\n{made}\n<!-- end -->"
    return re.sub(r"<!-- table: ([a-z ]+) of ([a-z0-9.-]+) -->\n.*?<!-- end -->", fill, text,
                  flags=re.S)


def main():
    if sys.argv[1:2] == ["--join"]:
        joined = [record for path in sys.argv[2:]
                  for record in json.loads(pathlib.Path(path).read_text())]
        print("[\n" + ",\n".join(json.dumps(record) for record in joined) + "\n]")
        return 0
    measured = {PLOTTED: Records(PLOTTED)}
    made = {PAGE: filled(PAGE.read_text(), measured)}
    for name, plot in PICTURES.items():
        drawn = plot(measured[PLOTTED])
        if drawn.lines:
            made[FOLDER / f"{PLOTTED}-{name}.svg"] = drawn.svg()
    stale = [path for path, text in made.items()
             if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is not what the records give; run tools/bench/gpu_page.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path])
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
