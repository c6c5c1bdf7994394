"""Put the compiled kernel into a wheel where a C++ compiler is; without one, or where it fails, the wheel is as before.

``MOEOPT_NATIVE=off pip wheel .`` makes the wheel without it.
"""

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernel(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or os.environ.get("MOEOPT_NATIVE") == "off":
            return
        self._aside = tempfile.mkdtemp(prefix="moeopt-")
        try:
            spec = importlib.util.spec_from_file_location("native", Path(self.root, "moeopt/ops/native/compile.py"))
            assert spec is not None and spec.loader is not None
            native = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(native)
            compiler = native.compiler_named(os.environ.get("MOEOPT_CXX") or os.environ.get("CXX"))
            if compiler is None:
                self.app.display_info("moeopt: no C++ compiler, so the wheel carries the kernel's sources only")
                return
            library, isas = native.compile_most(compiler, Path(self._aside))
            inside = native.PREBUILT.relative_to(self.root)
            build_data["force_include"][str(library)] = str(inside / native.prebuilt_name(isas))
        except Exception as err:  # whatever it is, the sources are in the wheel, and are compiled at first use
            self.app.display_warning(f"moeopt: the kernel was not compiled ({type(err).__name__}: {err})")
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        self.app.display_info(f"moeopt: the wheel carries the kernel for {', '.join(isas)}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_aside"):
            shutil.rmtree(self._aside, ignore_errors=True)
