"""Builds the extension with CMake and ninja; everything else stands in pyproject.toml.

The build folder is our own (build/cmake-<python tag>), not the temporary one that pip hands out,
so that a second install and an edit rebuild only what changed. The paths of ninja, Python and
pybind11 are passed at every configure, because an isolated build has them somewhere new each time.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def ninja_program() -> str:
    """The ninja of the build environment, or the machine's."""
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise RuntimeError("ninja is not installed: pip install ninja")
    return found


class CMakeBuild(build_ext):
    """One extension, built by the CMakeLists.txt at the root."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja_program()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            "-DWANOFFLOAD_PYTHON=ON",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new bytes in the old one: a running process may have it mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(folder / target.name, target)


setup(ext_modules=[Extension("wanoffload._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
