"""Build krul._core; everything that is not code stands in pyproject.toml.

Switches, read from the environment: ``KRUL_SANITIZE`` (a list for ``-fsanitize=``),
``KRUL_WERROR=1`` (warnings are errors), ``KRUL_COVERAGE=1`` (count lines for gcov). Each variant
has a build directory of its own, so that none packs the objects of another.
"""

import os
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build import build

SANITIZE = os.environ.get("KRUL_SANITIZE", "")
COVERAGE = os.environ.get("KRUL_COVERAGE") == "1"
VARIANT = "-".join(filter(None, [SANITIZE.replace(",", "-"), "coverage" if COVERAGE else ""]))

# -ffp-contract=off: a product and a sum must round alike on every instruction set.
COMPILE = ["-std=c11", "-O3", "-g1", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
WARN = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wformat=2"]
LINK = ["-pthread"]
if os.environ.get("KRUL_WERROR") == "1":
    WARN.append("-Werror")
if SANITIZE:
    COMPILE += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    LINK += [f"-fsanitize={SANITIZE}"]
if COVERAGE:
    COMPILE += ["--coverage", "-O1"]
    LINK += ["--coverage"]


class VariantBuild(build):
    """Keep the objects of each variant in ``build/<variant>``."""

    def initialize_options(self):
        """Choose the folder before the command line does."""
        super().initialize_options()
        self.build_base = os.path.join("build", VARIANT or "plain")


setup(
    cmdclass={"build": VariantBuild},
    ext_modules=[
        Extension(
            "krul._core",
            sources=sorted(glob("csrc/*.c") + glob("csrc/kernels/*.c") + glob("csrc/python/*.c")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.h") + glob("csrc/kernels/*.inc")),
            include_dirs=[numpy.get_include()],
            define_macros=[("_GNU_SOURCE", None)],
            extra_compile_args=COMPILE + WARN,
            extra_link_args=LINK,
            libraries=["m", "dl"],
        )
    ],
)
