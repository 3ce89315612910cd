# SPDX-License-Identifier: Apache-2.0
"""Machine code of NVIDIA and AMD as a list of instructions, and its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    opcode: str
    kind: str  # load, store (global memory), spill, special, barrier, shuffle, shared, other
    width: int = 0  # bytes of a load or store
    target: str | None = None  # label that a branch goes to
    registers: tuple[str, ...] = ()  # all that it names; a load's first destination comes first


@dataclass
class Code:
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> index of the instruction after it
    registers: int
    spills: int

    def loops(self) -> list[list[Instruction]]:
        """Bodies of the innermost loops. A loop reaches from a label to the last branch back to it."""
        spans = {}
        for i, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target) if instruction.target else None
            if start is not None and start <= i:
                spans[start] = i
        inner = [
            (a, b)
            for a, b in spans.items()
            if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans.items())
        ]
        return [self.instructions[a : b + 1] for a, b in inner]

    def main_loop(self) -> list[Instruction] | None:
        """The innermost loop that loads the most bytes a pass; None if no loop loads."""
        loops = [(sum(i.width for i in loop if i.kind == "load"), loop) for loop in self.loops()]
        bytes_loaded, loop = max(loops, key=lambda pair: pair[0], default=(0, None))
        return loop if bytes_loaded else None


def bytes_in_flight(loop: list[Instruction]) -> int:
    """Most bytes of loads that one thread has in flight at once, in steady state.

    A load is in flight until an instruction names a register that the load fills.
    """
    out: list[tuple[set[str], int]] = []
    most = 0
    for instruction in [*loop, *loop]:
        named = set(instruction.registers)
        out = [(filled, width) for filled, width in out if not filled & named]
        if instruction.kind == "load" and instruction.registers:
            first = instruction.registers[0]
            last = int(first[1:]) + max(instruction.width // 4, 1)
            out.append(({f"{first[0]}{n}" for n in range(int(first[1:]), last)}, instruction.width))
            most = max(most, sum(width for _, width in out))
    return most


def widths(instructions: list[Instruction], kind: str) -> dict[int, int]:
    """Bytes wide -> how many."""
    return dict(sorted(Counter(i.width for i in instructions if i.kind == kind).items(), reverse=True))


def nvidia(cubin: bytes) -> Code:
    """The machine code of a cubin that has one function."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = nvidia_functions(Path(file.name)).values()
    return code


def nvidia_functions(cubin: Path) -> dict[str, Code]:
    """Mangled name -> machine code of every function in a cubin."""
    import triton  # its wheel brings the two tools

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(tool: str, option: str) -> str:
        return subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True).stdout

    registers = dict(re.findall(r"Function (\w+):\s*REG:(\d+)", run("cuobjdump", "--dump-resource-usage")))
    functions: dict[str, Code] = {}
    code = None
    for line in run("nvdisasm", "-c").splitlines():
        if section := re.match(r"^\s*\.section\s+\.text\.(\w+)", line):
            code = functions[section[1]] = Code([], {}, int(registers.get(section[1], 0)), 0)
        elif code is None:
            continue
        elif label := re.match(r"^(\.L_x_\d+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            code.instructions.append(nvidia_instruction(found[1], found[2], target and target[1]))
    # A function without an entry is called by the others and is no kernel.
    functions = {name: code for name, code in functions.items() if name in registers}
    for code in functions.values():
        code.spills = sum(i.kind == "spill" for i in code.instructions)
    return functions


_NVIDIA_KINDS = {
    "LDG": "load", "LDGSTS": "load", "STG": "store", "LDL": "spill", "STL": "spill", "MUFU": "special",
    "BAR": "barrier", "SHFL": "shuffle", "LDS": "shared", "STS": "shared",
}  # fmt: skip


def nvidia_instruction(opcode: str, operands: str, target: str | None) -> Instruction:
    base, *modifiers = opcode.split(".")
    kind = _NVIDIA_KINDS.get(base, "other")
    width = 0
    if kind in ("load", "store"):
        sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        width = next((sizes[m] for m in modifiers if m in sizes), 4)
    return Instruction(opcode, kind, width, target, tuple(re.findall(r"\bR\d+", operands)))


def amd(text: str) -> Code:
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\t([a-z]\w+)(.*)", line):
            target = re.search(r"(\.LBB\w+)", found[2]) if found[1].startswith(("s_cbranch", "s_branch")) else None
            instructions.append(_amd_instruction(found[1], found[2], target and target[1]))
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    assert registers is not None
    return Code(
        instructions, labels, int(registers[1]), sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)))
    )


def _amd_instruction(opcode: str, operands: str, target: str | None) -> Instruction:
    if memory := re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode):
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "sshort": 2}
        size = memory[2].removesuffix("_d16_hi").removesuffix("_d16")
        return Instruction(opcode, memory[1], sizes.get(size, 1), target, _amd_registers(operands))
    if "dpp" in opcode or opcode.startswith(("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane")):
        kind = "shuffle"
    elif re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", opcode):
        kind = "special"
    else:
        kind = "barrier" if opcode == "s_barrier" else "shared" if opcode.startswith("ds_") else "other"
    return Instruction(opcode, kind, 0, target, _amd_registers(operands))


def _amd_registers(operands: str) -> tuple[str, ...]:
    ranges = re.findall(r"\bv(?:\[(\d+):(\d+)\]|(\d+))", operands.split(";")[0])
    return tuple(f"v{n}" for a, b, one in ranges for n in range(int(a or one), int(b or one) + 1))
