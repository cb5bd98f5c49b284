"""inspect: what a file of `sten.save` holds."""

from __future__ import annotations

from .. import io


def inspect(path: str) -> None:
    """Print what a file of `sten.save` holds, from its header."""
    about = io.inspect(path)
    print(f"{path}: format version {about['version']}")
    for name, weight in about["sparse"].items():
        fields = ", ".join(f"{key}={value}" for key, value in weight["fields"].items())
        parts = ", ".join(f"{key} {part['dtype']} {tuple(part['shape'])}" for key, part in weight["parts"].items())
        transposed = ", transposed" if weight["transposed"] else ""
        print(f"  {name}: {weight['layout']}({fields}), shape {tuple(weight['shape'])}{transposed}, density ", end="")
        print(f"{weight['density']:.3g}, {weight['bytes']:,} bytes: {parts}")
    for name, tensor in about["tensors"].items():
        print(f"  {name}: {tensor['dtype']} {tuple(tensor['shape'])}, {tensor['bytes']:,} bytes")
    for name, other in about["ties"].items():
        print(f"  {name}: tied to {other}")
    for site in about["sites"]:
        stored = "dense with zeros" if site["layout"] is None else _call(site["layout"])
        print(f"  {site['site']} of {site['module'] or 'the model'}: {_call(site['method'])}, {stored}")


def _call(described: dict) -> str:
    """A method or layout of a file as Python writes it."""
    fields = ", ".join(f"{name}={value!r}" for name, value in described.get("fields", {}).items())
    return f"{described.get('name')}({fields})"
