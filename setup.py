"""What pyproject.toml cannot say yet: the C kernels. Everything else is there."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lm._kernels",
            sorted(glob("lm/kernels/*.c")),
            depends=glob("lm/kernels/*.h"),
            extra_compile_args=["-O3", "-fno-math-errno", "-fopenmp"],
            # Without a C compiler they are left out, and torch's own are used.
            optional=True,
        )
    ]
)
