"""Everything that only a GPU can tell, by one command and within a budget: `python -m bench.gpu_check --out DIR`.

Each part writes its findings to DIR/gpu_check.json as soon as it has them, so that a time-out keeps what was done. The
exit code is not zero if a number is wrong, or if a pass ran in a slower way than it should. `--toy` runs the same parts
at toy size on the CPU, where TRITON_INTERPRET=1 lets Triton interpret the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from bench.gpu_check.parts import Finding, parts
from bench.gpu_check.scale import Scale, on_device, toy


@torch.inference_mode()
def check(scale: Scale, budget_s: float, out: Path) -> list[str]:
    """Run the parts while time is left, and write what they found.

    Returns:
        What is wrong, what could not run included.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Finding] = {}
    deadline_s = time.perf_counter() + budget_s
    for name, part in parts(scale):
        started_s = time.perf_counter()
        if started_s > deadline_s:
            found[name] = {"wrong": [f"{name}: no time was left"]}
        else:
            try:
                found[name] = part()
            except Exception:
                found[name] = {"wrong": [f"{name}: {traceback.format_exc(limit=-3)}"]}
            found[name]["seconds"] = time.perf_counter() - started_s
        (out / "gpu_check.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
        print(f"{name}: {found[name].get('seconds', 0):.0f} s, {found[name]['wrong'] or 'as it should be'}", flush=True)
    return [problem for finding in found.values() for problem in finding["wrong"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=360, help="seconds after which no further part begins")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    given = parser.parse_args()
    scale = toy() if given.toy else on_device()
    print(f"parts: {', '.join(name for name, _ in parts(scale))}; none begins after {given.budget:.0f} s", flush=True)
    if not given.toy and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible: run this on a GPU, or --toy sizes on the CPU with TRITON_INTERPRET=1")
    sys.exit(1 if check(scale, given.budget, given.out) else 0)


if __name__ == "__main__":
    main()
