"""What ptxas makes of our kernels, without a GPU: `python -m tests.lm.cuda.ptxas` prints a line of JSON a kernel.

Runs in a process of its own, since Triton either compiles or interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from lm.cuda.attention import kernel_constants
from lm.cuda.attention_kernels import attend_split, combine_splits
from lm.cuda.elementwise_kernels import copy_entries, gate_rows, norm_rows, rotate_and_store, round_rows
from lm.cuda.sampling import CUT_BLOCK, DRAW_BLOCK
from lm.cuda.sampling_kernels import find_cuts, perturb_rows

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"mixed": "fp32", "sums": "fp32", "words": "i32", "positions": "i32", "table": "i32", "sequences": "i32"}
POINTERS |= {"queries": "i32", "turns": "fp32", "slots": "i64", "logits": "fp32", "fields": "fp64", "top_ks": "i32"}
POINTERS |= {"cuts": "i32", "seeds": "i64", "scales": "fp32"}
"""Element types of pointers; others point to numbers of the model's type."""
ALIGNED = ("_ptr", "_stride")

ATTENTION = {  # (group, head dimension, type, tokens of a block, architectures)
    "llama-3, qwen3": (4, 128, "bf16", 128, (80, 89, 90)),
    "head 256": (8, 256, "bf16", 128, (80, 89, 90)),
    "head 256, float32": (8, 256, "fp32", 128, (89,)),
    "small blocks": (3, 80, "bf16", 16, (90,)),
    "group 4, head 256, float32": (4, 256, "fp32", 128, (89,)),
    "mpt, bloom": (1, 136, "bf16", 128, (89,)),
    "head 64": (1, 64, "bf16", 128, (89,)),
}


def main() -> None:
    for name, (group, dim, dtype, block_tokens, architectures) in ATTENTION.items():
        constants = kernel_constants(group, dim, dim, {"bf16": 2, "fp32": 4}[dtype], block_tokens, capped=False)
        for architecture in architectures:
            for kernel in (attend_split, combine_splits):
                compiled = _compiled(kernel, dtype, constants, architecture)
                print(json.dumps({"name": name, "architecture": architecture, **_use(compiled)}), flush=True)
    for architecture in (80, 89, 90):
        rounds = architecture > 80
        rounding = {round_rows: {"SIZE": 14336, "PAD": 16384, "num_warps": 16, "num_stages": 2}} if rounds else {}
        for kernel, constants in (_elementwise(rounds) | _sampling() | rounding).items():
            compiled = _compiled(kernel, "bf16", constants, architecture)
            print(json.dumps({"name": "layer", "architecture": architecture, **_use(compiled)}), flush=True)


def _elementwise(rounds: bool) -> dict[Any, dict[str, Any]]:
    """Kernels of a layer as large as Llama 3 8B's with all that Qwen3 and Gemma add, and what they are compiled for."""
    run = {"num_warps": 8, "num_stages": 2}
    return {
        norm_rows: {"SIZE": 4096, "PAD": 4096, "ADDS": True, "POST": True, "NORMS": True, "ROUNDS": rounds, **run},
        copy_entries: {"SIZE": 1024, "BLOCK": 1024, "BACK": True, **run},
        gate_rows: {"SIZE": 14336, "BLOCK": 1024, "GELU": True, **run},
        rotate_and_store: {"QUERIES": 32, "KEYS": 8, "DIM": 128, "PAD": 64, "NORMS": True, **run, "num_warps": 1},
    }


def _sampling() -> dict[Any, dict[str, Any]]:
    """Whose vocabulary is no constant."""
    return {
        find_cuts: {"BLOCK": CUT_BLOCK, "num_warps": 16, "num_stages": 2},
        perturb_rows: {"CUTS": True, "BLOCK": DRAW_BLOCK, "num_warps": 4, "num_stages": 2},
    }


def _compiled(kernel: Any, dtype: str, constants: dict[str, Any], architecture: int) -> CompiledKernel:
    names = kernel.arg_names
    own = {name: value for name, value in constants.items() if name in names}
    rounds = kernel is round_rows or own.get("ROUNDS", False)
    types = {name: "constexpr" if name in own else _type(name, dtype, rounds) for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name.endswith(ALIGNED)}
    source = ASTSource(kernel, types, own, aligned)
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _type(name: str, dtype: str, rounds: bool) -> str:
    if rounds and name == "out_ptr":
        return "*fp8e4nv"
    stem, pointer, _ = name.partition("_ptr")
    if pointer:
        return "*" + POINTERS.get(stem, dtype)
    return "fp32" if name in ("scale", "softcap", "epsilon") else "i32"


def _use(compiled: CompiledKernel) -> dict[str, Any]:
    """Registers and bytes; what does not fit into registers is spilled to the stack or to local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {part: int(number) for part, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)}
    return {"kernel": compiled.metadata.name, "shared_bytes": compiled.metadata.shared, **found}


if __name__ == "__main__":
    main()
