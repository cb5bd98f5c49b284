"""What notebooks show: tables as HTML, patterns as pictures whose pixels are the mask."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import pytest
import torch
from small import every_layout, mlp, rate
from torch import nn

import sten
from sten import markup


def pixels(uri: str) -> torch.Tensor:
    """The numbers of a picture of `markup.png`, read as the format says: gray, 8 bits, no filter."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 0, 0, 0, 0]
    lines = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


@every_layout
@pytest.mark.parametrize("parameter", [False, True])
def test_the_picture_of_a_weight_is_its_mask(layout, parameter):
    dense = torch.randn(20, 24)
    w = sten.from_dense(dense, layout, layout.mask(dense.abs(), rate(layout)))
    w = nn.Parameter(w) if parameter else w
    shown = w._repr_html_()
    whole, corner = re.findall(r'src="([^"]+)"', shown)
    for picture in (whole, corner):
        assert torch.equal(pixels(picture) < 128, w.mask())
    assert repr(w) in shown


def test_a_large_weight_is_shown_by_density():
    mask = torch.zeros(200, 300, dtype=torch.bool)
    mask[:99] = True
    share = markup.densities(mask)
    assert share.shape == (66, 75) and torch.equal(share[:33], torch.ones(33, 75)) and not share[33:].any()
    assert markup.densities(torch.rand(7, 3) < 2).shape == (7, 3)


def test_what_has_no_numbers_or_entries_has_no_picture():
    w = sten.from_dense(torch.eye(4), sten.CSR())
    assert "img" in w._repr_html_() and "img" not in w.to("meta")._repr_html_()
    assert markup.pattern_figure(torch.empty(0, 4, dtype=torch.bool)) == ""


def test_tables_and_plans_are_escaped_html():
    model = sten.sparsify(nn.ModuleDict({"<a>": nn.Linear(12, 8)}), sten.NM(2, 4))
    table = sten.summary(model)
    assert "&lt;a&gt;.weight" in table._repr_html_() and "<a>" not in table._repr_html_()
    assert table._repr_html_().count("<tr") == 3  # titles, one weight, total
    plan = sten.which("linear", (2, 12), model["<a>"].weight)
    assert plan.kernel in plan._repr_html_() and plan.reason in plan._repr_html_()
    recipe = sten.Recipe({"fc*": sten.NM(2, 4), "*": None})
    assert all(text in recipe._repr_html_() for text in ("fc*", "NM(n=2, m=4)", "Magnitude"))


def test_a_sensitivity_is_a_table():
    table = sten.sensitivity(mlp(), [sten.NM(2, 4), None], [torch.randn(8, 12)])
    assert "effect of" in table._repr_html_() and len(table.records()) == 4
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame["effect"].tolist() == [row.effect for row in table.rows]


def test_ipython_finds_them():
    formatters = pytest.importorskip("IPython.core.formatters")
    html = formatters.HTMLFormatter()
    model = sten.sparsify(mlp(), sten.NM(2, 4))
    for thing in (model[0].weight, sten.summary(model), sten.which("linear", (2, 12), model[0].weight)):
        assert html(thing) == thing._repr_html_()
