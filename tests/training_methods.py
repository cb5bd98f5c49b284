"""Every training method, small enough for a test, and the table of docs/training.md."""

from pathlib import Path

import sten

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
METHODS = [
    sten.Static(), sten.SET(24, every=4), sten.RigL(24, every=4), sten.DSTEE(24, every=4), sten.SRigL(24, every=4),
    sten.SparseMomentum(24, every=4), sten.Gradual(2, 14, 4), sten.BlockPruneGrow(2, 14, 4), sten.STE(), sten.SRSTE(),
    sten.DecayingMask(20, rate=0.2), sten.DecayingStructure(20), sten.Transposable(refresh=3), sten.BDWP(),
    sten.BiMask(refresh=3, tries=3), sten.CAST(20, 1e-2, 3),
]  # fmt: skip


def table():
    """{(method, layout): yes or no}, of the page."""
    lines = PAGE[PAGE.index("| method | Masked |") :].split("\n\n")[0].splitlines()
    names = [cell.strip() for cell in lines[0].strip("|").split("|")][1:-1]
    supported = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for method in cells[0].split(", "):
            supported |= {(method, name): cell for name, cell in zip(names, cells[1:-1], strict=True)}
    return supported


SUPPORTED = table()
