# SPDX-License-Identifier: Apache-2.0
"""Builds sspo_ext._C, the CPU kernels.

The same kernel source is compiled once for each instruction set, with its flags. The module chooses one at run time, so
a wheel runs on every CPU of its architecture. SSPO_BUILD_CPP=0 leaves the module out: the package then runs on torch.
The CUDA kernels are built where they are asked for (build_cuda.py).
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError, PlatformError

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip's isolated build does not
import build_cuda  # noqa: E402

# GCC 12 warns of the undefined vectors inside its own intrinsics headers.
COMMON_FLAGS = ["-std=c++17", "-fvisibility=hidden", "-pthread", "-g0", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
# The kernels' error analysis relies on contraction into FMA, and compilers differ in their default.
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_FLAGS += ["-Wno-uninitialized"]  # as above

DL_FLAGS = ["-ldl"] if sys.platform == "linux" else []  # part of the C library only since glibc 2.34

SOURCES = {
    "csrc/cpu/binding.cpp": ["-O2"],
    "csrc/cpu/dispatch.cpp": ["-O2"],
    "csrc/cpu/step_loss.cpp": ["-O2"],
    "csrc/cpu/isa/baseline.cpp": KERNEL_FLAGS,
}
X86_SOURCES = {
    "csrc/cpu/isa/avx2.cpp": [*KERNEL_FLAGS, *AVX2_FLAGS],
    "csrc/cpu/isa/avx512.cpp": [*KERNEL_FLAGS, *AVX512_FLAGS],
    "csrc/cpu/isa/avx512_bf16.cpp": [*KERNEL_FLAGS, *AVX512_FLAGS],
}


def target_is_x86_64() -> bool:
    archflags = os.environ.get("ARCHFLAGS", "")  # how macOS builds for the other architecture
    return "x86_64" in archflags if archflags else platform.machine().lower() in ("x86_64", "amd64")


class BuildKernels(build_ext):
    """build_ext that compiles every source with its own flags, several sources at a time."""

    def run(self) -> None:
        # An earlier build with other switches may have left a module in the build folder, and it would be installed.
        wanted = {ext.name.rpartition(".")[2] for ext in self.extensions}
        for module in Path(self.build_lib, "sspo_ext").glob("_C*.so"):
            if module.name.partition(".")[0] not in wanted:
                module.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, build_cuda.CudaExtension):
            return build_cuda.build(self, ext)
        try:
            if self.compiler.compiler_type == "msvc":
                raise PlatformError("MSVC has no vector extensions; GCC or Clang is needed")
            self._build(ext)
        except (BaseError, CompileError, LinkError, OSError) as error:
            raise SystemExit(
                f"\nsspo_ext: the C++ module {ext.name} could not be built: {error}. It needs a C++17 compiler (GCC 9, "
                "Clang 10 or later) and the Python headers; the compiler's own messages stand above. To install "
                "without it (the package then runs on torch alone, several times slower on CPUs), set the environment "
                "variable SSPO_BUILD_CPP=0 and install again.\n"
            ) from error

    def _build(self, ext: Extension) -> None:
        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMMON_FLAGS, *flags_of[source]],
                depends=ext.depends,
            )

        flags_of = {**SOURCES, **X86_SOURCES}
        with ThreadPoolExecutor(max(1, min(len(ext.sources), os.cpu_count() or 1))) as pool:
            objects = [o for compiled in pool.map(compile_one, ext.sources) for o in compiled]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread", *DL_FLAGS], target_lang="c++"
        )


def extensions() -> list[Extension]:
    if os.environ.get("SSPO_BUILD_CPP", "1") == "0":
        return []
    try:
        import pybind11
    except ImportError as error:
        if not {"build_ext", "develop", "bdist_wheel", "install"} & set(sys.argv):
            return []  # this step compiles nothing, `python setup.py --version` for example
        raise SystemExit(
            f"sspo_ext: building the C++ module needs pybind11 ({error}); or set SSPO_BUILD_CPP=0"
        ) from None
    x86 = target_is_x86_64()
    return [
        Extension(
            "sspo_ext._C",
            sources=sorted({**SOURCES, **(X86_SOURCES if x86 else {})}),
            include_dirs=[pybind11.get_include(), "csrc"],
            depends=sorted(
                os.path.join(folder, name)
                for folder, _, names in os.walk("csrc")
                for name in names
                if name.endswith(".h")
            ),
            language="c++",
        )
    ]


cpu = extensions()
setup(ext_modules=cpu + build_cuda.extensions(skip_auto=not cpu), cmdclass={"build_ext": BuildKernels})
