"""What a user installs: a complete wheel; the core needs torch and numpy only, and no compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDDEN = "rich safetensors triton matplotlib sklearn tqdm transformers accelerate hypothesis scipy"


def run(command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a clean copy, built where no C++ compiler can be found."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("a clean copy comes from a git checkout")
    for name in files:
        if (ROOT / name).exists() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    empty = base / "bin"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(base), "."]
    run(pip, source, CXX="/nonexistent/g++", CC="/nonexistent/gcc", PATH=str(empty))
    (found,) = base.glob("*.whl")
    return found


def test_the_wheel_has_every_module(wheel):
    names = {name.split(".data/purelib/")[-1] for name in zipfile.ZipFile(wheel).namelist()}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "sten").rglob("*.py")}
    expected |= {"sten/kernels/" + p.name for p in (ROOT / "kernels").glob("*.py")} | {"sten/py.typed"}
    expected |= {"sten/kernels/cuda/" + p.name for p in (ROOT / "kernels" / "cuda").iterdir()}
    assert not {n for n in expected if n not in names}
    assert not [n for n in names if n.startswith(("tests", "kernels/", "benchmarks"))]


def test_without_a_compiler_and_extras(wheel, tmp_path):
    """The core alone: reference and expanding kernels, one warning, plain tables; extras are asked for by name."""
    site = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], tmp_path)
    program = f"""
import sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]  # it would find the checkout's _C
for name in {HIDDEN!r}.split():
    sys.modules[name] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, sten
    layers = [torch.nn.Linear(32, 16), torch.nn.Linear(16, 8)]
    for layout, sparsity in ((sten.CSR(), 0.5), (sten.GroupedNM(1, 4, 4), None)):
        model = sten.sparsify(torch.nn.Sequential(*layers), layout=layout, sparsity=sparsity)
        model(torch.randn(2, 32)).sum().backward()
        print(sten.summary(model))
        layers = list(sten.densify(model))
said = [str(w.message) for w in seen if "sten" in str(w.message)]
assert len(said) == 1, said
sten.testing.check_layout(sten.NM(2, 4), shapes=[(5, 8)])
sten.save(model, "x")
print("loaded", type(sten.load(model, "x")).__name__)
print(sten.__file__)
"""
    out = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(site))
    assert "energy kept" in out and "loaded Sequential" in out
    assert str(site) in out


def test_the_source_distribution_has_all_that_its_tests_read(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("a clean copy comes from a git checkout")
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    program = f"""
import sys
import tarfile
sys.modules["torch"] = None  # needed for the library alone, which no source distribution has
import setuptools.build_meta as backend
backend.build_sdist({str(tmp_path)!r})
"""
    run([sys.executable, "-c", program], tmp_path / "source")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    missing = {name for name in files if name not in names and not name.startswith(".")}
    assert missing <= {"sten/kernels"}, missing  # a link in the checkout, here a copy
    assert "sten/kernels/__init__.py" in names and "kernels/__init__.py" in names


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_extension_is_c_plus_plus_17():
    """The language in which torch 2.11 compiles extensions; later versions take C++20. What knows nothing of torch is
    compiled in it by csrc/sanitize/run.sh."""
    from torch.utils.cpp_extension import include_paths

    folders = ["-I" + folder for folder in (*include_paths(), sysconfig.get_paths()["include"])]
    for file in sorted((ROOT / "csrc").glob("register*.cpp")):
        command = ["g++", "-std=c++17", "-fsyntax-only", "-w", *folders, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
