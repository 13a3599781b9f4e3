"""What pyproject.toml cannot say: the C kernels, and a client of the very same version."""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

VERSION = re.findall(r'^__version__ = "(.+)"$', Path("treeline/__init__.py").read_text(), re.MULTILINE)[0]

setup(
    version=VERSION,
    install_requires=[
        f"treeline-client=={VERSION}",
        "accelerate>=1.10",
        "aiohttp>=3.14",
        "fastapi>=0.115",
        "gguf>=0.19",
        "grpcio-health-checking>=1.85.1",
        "grpcio-reflection>=1.85.1",
        "grpcio-status>=1.85.1",
        "jinja2>=3.1",
        "llguidance>=1.9,<2",
        "numpy>=2",
        "prometheus-client>=0.26",
        "psutil>=7",
        "pydantic>=2.14",
        "pyyaml>=6",
        "ray[serve]>=2.60,<2.61",
        "rich>=14",
        "safetensors>=0.5",
        "scipy>=1.17",
        "structlog>=26.1",
        "tokenizers>=0.22",
        "torch==2.13.0",
        "transformers>=5.23,<6",
        "typer>=0.29",
        "uvicorn>=0.34",
    ],
    ext_modules=[
        Extension(
            "lm._kernels",
            sorted(glob("lm/kernels/**/*.c", recursive=True)),
            depends=glob("lm/kernels/**/*.h", recursive=True),
            extra_compile_args=["-O3", "-fno-math-errno", "-fopenmp"],
            # Without a C compiler they are left out, and torch's own are used.
            optional=True,
        )
    ],
)
