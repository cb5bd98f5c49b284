"""The two pictures of the documentation's first page, from benchmarks/results, as SVG that is light or dark.

python benchmarks/headline.py [--out docs/images]
"""

import argparse
import json
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STYLE = """text { font: 13px system-ui, sans-serif; fill: #333 } .head { font-weight: 600 } .note { fill: #777 }
.bar { fill: #009485 } .other { fill: #9aa5a3 } .one { stroke: #777; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .note { fill: #999 } .bar { fill: #3fbfae } .other { fill: #6b7775 } .one { stroke: #999 } }"""
LABEL, WIDTH, ROW = 240, 640, 24

Bars = list[tuple[str, float, str]]  # label, times faster than dense, class


def svg(groups: list[tuple[str, Bars]], note: str) -> str:
    """Horizontal bars in groups; a dashed line is the speed of the dense model."""
    most = max(value for _, bars in groups for _, value, _ in bars)
    unit, y, body = (WIDTH - LABEL - 60) / most, 8, []
    for title, bars in groups:
        body.append(f'<text class="head" x="0" y="{y + 14}">{escape(title)}</text>')
        y += ROW
        top = y
        for label, value, kind in bars:
            width = value * unit
            body.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
            body.append(f'<rect class="{kind}" x="{LABEL}" y="{y + 3}" width="{width:.0f}" height="16" rx="2"/>')
            body.append(f'<text x="{LABEL + width + 6:.0f}" y="{y + 15}">{value:.1f}x</text>')
            y += ROW
        body.append(f'<line class="one" x1="{LABEL + unit:.0f}" x2="{LABEL + unit:.0f}" y1="{top}" y2="{y}"/>')
        y += 8
    body.append(f'<text class="note" x="0" y="{y + 12}">{escape(note)}</text>')
    size = f'viewBox="0 0 {WIDTH} {y + 20}" width="{WIDTH}" height="{y + 20}"'
    body = "\n".join(body)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def gpu() -> str:
    plans = {
        "VectorNM(1, 4, 128) in the MLPs": "vector-mlp fused",
        "and NM(2, 4) in attention": "vector-mlp+2:4 fused",
        "BSR 128, 80 %, in the MLPs": "bsr80-mlp fused",
        "NM(2, 4) everywhere": "2:4 fused",
    }
    prefill = json.loads((RESULTS / "gpu_model_llama-8b.json").read_text())["columns"]["prefill 1x4096 eager"]
    decode = json.loads((RESULTS / "gpu_model_llama-8b_decode.json").read_text())["columns"]["decode 1 compiled+graph"]
    one, many = ([(name, column[plan]["ratio"], "bar") for name, plan in plans.items()] for column in (decode, prefill))
    one.append(("4-bit weights, for comparison", decode["int4"]["ratio"], "other"))
    groups = [("A prompt of 4096 tokens", many), ("One token, compiled and in a CUDA graph", one)]
    return svg(groups, "Llama of 8B shapes, bfloat16, one H100; the dashed line is the dense model")


def cpu() -> str:
    names = {
        "CSR, 75 %": "csr75",
        "CSR, 90 %": "csr90",
        "CSR, 95 %": "csr95",
        "GroupedNM(1, 4, 16), 75 %": "1:4:16",
        "GroupedNM(1, 10, 8), 90 %": "1:10:8",
    }
    rows = json.loads((RESULTS / "cpu_linear.json").read_text())["results"]

    def bars(tokens: int) -> Bars:
        found = {r["layout"]: r["hot"]["ratio"] for r in rows if (r["tokens"], r["in"]) == (tokens, 768)}
        return [(label, found[name], "bar") for label, name in names.items()]

    groups = [("A linear layer, 1024 tokens", bars(1024)), ("A linear layer, one token", bars(1))]
    return svg(groups, "768 to 3072, float32, two cores of an AVX-512 Xeon; the dashed line is dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, make in (("gpu", gpu), ("cpu", cpu)):
        (arguments.out / f"speed_{name}.svg").write_text(make())


if __name__ == "__main__":
    main()
