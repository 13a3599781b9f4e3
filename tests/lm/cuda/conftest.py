"""Kernels are interpreted here: this comes before whatever imports Triton."""

import tests.lm.interpreter  # noqa: F401
