"""What importing does: nothing but define, without torch where torch is not needed."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import subprocess
import sys

import pytest

import wanoffload
from wanoffload import errors


def run_python(code: str) -> str:
    """What a fresh interpreter prints; its error is the test's."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_nothing_happens_at_import() -> None:
    """Rule 11: no CUDA call, no thread, no environment variable read by any module of the package.

    Except `__main__`, which is there to be run, and the kernels, which need triton.
    """
    run_python("""
import importlib, os, pkgutil, sys, threading, torch, psutil, tqdm
reads = []
real = os.environ.__class__.__getitem__
os.environ.__class__.__getitem__ = lambda self, key: (reads.append(key), real(self, key))[1]
before = len(psutil.Process().threads())
import wanoffload
from wanoffload import *
for module in pkgutil.iter_modules(wanoffload.__path__):
    if module.name not in ("__main__", "kernels"):
        importlib.import_module(f"wanoffload.{module.name}")
assert len(psutil.Process().threads()) == before, "a thread was started"
assert not torch.cuda.is_initialized()
assert not reads, reads
assert "triton" not in sys.modules and "diffusers" not in sys.modules
with open("/proc/self/maps") as maps:
    mapped = maps.read()
assert "libcuda.so" not in mapped or torch.version.cuda, "the driver was opened"
""")


@pytest.mark.parametrize(
    "use",
    [
        "wanoffload.Workload(480, 832, 81)",
        "wanoffload.Hardware(device_memory='24GiB')",
        "wanoffload.ModelFacts(family='wan')",
        "wanoffload.plan('Wan-AI/Wan2.2-TI2V-5B-Diffusers').explain()",
        "wanoffload.Plan",
        "wanoffload.OffloadError",
        "dir(wanoffload)",
    ],
)
def test_torch_is_not_loaded_for_what_does_not_need_it(use: str) -> None:
    run_python(f"import sys, wanoffload; {use}; assert 'torch' not in sys.modules")


def test_every_public_name_is_there_and_defined_in_the_module_it_is_loaded_from() -> None:
    for name in wanoffload.__all__:
        value = getattr(wanoffload, name)
        assert value.__name__ == name
        assert name in dir(wanoffload)
    assert wanoffload.__all__ == sorted(wanoffload.__all__)
    with pytest.raises(AttributeError, match="no attribute 'warp'"):
        wanoffload.warp  # noqa: B018


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(wanoffload.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(wanoffload, name), wanoffload.OffloadError)


def test_type_checkers_are_told_of_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(wanoffload))
    told = [
        alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]
    assert sorted(told) == wanoffload.__all__


def test_no_module_hides_a_public_name() -> None:
    """Importing `wanoffload.wrap` as a module would make `wanoffload.wrap` that module."""
    modules = {module.name for module in pkgutil.iter_modules(wanoffload.__path__)}
    assert "wrapping" in modules
    assert not modules & set(wanoffload.__all__)


@pytest.mark.parametrize(
    "first",
    ["import wanoffload.wrapping", "from wanoffload import wrap", "import wanoffload.hooks"],
)
def test_wrap_is_the_function_in_every_order_of_imports(first: str) -> None:
    code = "import wanoffload, wanoffload.wrapping; print(wanoffload.wrap.__qualname__)"
    assert run_python(f"{first}; {code}") == "wrap\n"
