# SPDX-License-Identifier: Apache-2.0
"""Machine code of the peers' Triton kernels, read as machine_code.py reads ours.

Their own launch code compiles them, with their own block sizes, warps and specialisation on divisibility by 16. A
stand-in for Triton's driver names the architecture, and a launch only compiles. Outputs are therefore not initialised.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import disassembly, traffic
from .record import Report, add_loop

# The first is divisible by 16, the second is not.
VOCABULARIES = (128256, 50257)

PEERS = {
    "Liger cross_entropy": ("liger_kernel", traffic.liger_cross_entropy),
    "Liger selective_log_softmax": ("liger_kernel", traffic.liger_log_probs),
    "TRL selective_log_softmax_and_entropy": ("trl", traffic.trl_log_probs),
}

_LIGER_NAMES = {"80": "ampere_ada", "90": "hopper", "100": "blackwell"}


class _Driver:
    """The part of a driver that Triton uses to compile."""

    def __init__(self, arch: str):
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)

    def get_current_device(self) -> str:
        return str(self.target.arch)  # the key by which kernels are cached

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def compiled_instead_of_launched(arch: str) -> Iterator[list]:
    """Within it, a launch compiles its kernel and appends (name, compiled kernel) to the list."""
    run, found = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))
        return kernel

    before = driver._active  # not `active`, which would look for a GPU
    driver.set_active(_Driver(arch))  # pyright: ignore[reportArgumentType]  # the rest of a driver is not used
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield found
    finally:
        driver._active = before


@contextlib.contextmanager
def _liger_sees(arch: str) -> Iterator[None]:
    """Lets Liger see a GPU of this architecture: it chooses its number of warps by it."""
    if importlib.util.find_spec("liger_kernel") is None:
        yield
        return
    from liger_kernel.ops import cross_entropy  # pyright: ignore[reportMissingImports]  # need not be installed

    with (
        mock.patch.object(cross_entropy, "is_hip", lambda: arch.startswith("gfx")),
        mock.patch.object(cross_entropy, "infer_device_arch", lambda: _LIGER_NAMES.get(arch, "cdna3")),
    ):
        yield


def reports(archs: list[str], dtypes: list[str]) -> list[Report]:
    made = []
    for arch in archs:
        for name, (package, method) in PEERS.items():
            if importlib.util.find_spec(package) is None:
                print(f"{name}: {package} is not installed")
                continue
            for V in VOCABULARIES:
                for dtype in dtypes:
                    work = traffic.Work(V, getattr(torch, dtype))
                    with _liger_sees(arch), compiled_instead_of_launched(arch) as kernels:
                        out = method(work, work.logits.clone().requires_grad_())
                        if out.requires_grad:
                            out.backward(torch.ones_like(out))
                    for kernel_name, kernel in kernels:
                        made += _read(f"{name}: {kernel_name}", dtype, f"V = {V}", arch, kernel)
    return made


def _read(name: str, dtype: str, facts: str, arch: str, kernel) -> list[Report]:
    """A report for each loop that loads at least half as many bytes a pass as the main loop."""
    code = disassembly.amd(kernel.asm["amdgcn"]) if arch.startswith("gfx") else disassembly.nvidia(kernel.asm["cubin"])
    loops = [(sum(i.width for i in loop if i.kind == "load"), loop) for loop in code.loops()]
    most = max((loaded for loaded, _ in loops), default=0)
    chosen = [loop for loaded, loop in loops if most and 2 * loaded >= most]
    if not chosen:  # A program has one block of a row, so the kernel is the loop's body.
        facts += ", whole kernel"
        chosen = [[i for i in code.instructions if i.opcode not in ("NOP", "s_nop")]]
    made = []
    for number, loop in enumerate(chosen, 1):
        which = f", loop {number}" if len(chosen) > 1 else ""
        report = Report(
            name, dtype, f"{facts}, {kernel.metadata.num_warps} warps{which}", arch, kernel.metadata.num_warps,
            code.registers, kernel.metadata.shared, code.spills,
            disassembly.widths(code.instructions, "load"), disassembly.widths(code.instructions, "store"),
        )  # fmt: skip
        add_loop(report, loop)
        made.append(report)
    return made
