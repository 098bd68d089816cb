"""Build krul._core, and krul._cuda where nvcc is; what is not code stands in pyproject.toml.

Switches, read from the environment: ``KRUL_CUDA`` (1: must be built; 0: not; auto, the default:
where nvcc is found and does its work), ``KRUL_CUDA_ARCHS`` (``"80;90"``, or ``native`` for the
GPUs of this machine), ``NVCC``, ``KRUL_SANITIZE`` (a list for ``-fsanitize=``), ``KRUL_WERROR=1``
(warnings are errors), ``KRUL_COVERAGE=1`` (count lines for gcov). Each variant has a build
directory of its own, so that none packs the objects of another.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

CUDA = os.environ.get("KRUL_CUDA", "auto")
CUDA_ARCHS = os.environ.get("KRUL_CUDA_ARCHS", "80;86;89;90;100;120")
SANITIZE = os.environ.get("KRUL_SANITIZE", "")
COVERAGE = os.environ.get("KRUL_COVERAGE") == "1"
WERROR = os.environ.get("KRUL_WERROR") == "1"
VARIANT = "-".join(filter(None, [SANITIZE.replace(",", "-"), "coverage" if COVERAGE else ""]))

# -ffp-contract=off: a product and a sum must round alike on every instruction set. -fno-math-errno:
# nobody asks errno, and rounding is one instruction.
COMPILE = ["-std=c11", "-O3", "-g1", "-ffp-contract=off", "-fno-math-errno"]
COMPILE += ["-fvisibility=hidden", "-pthread"]
WARN = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wformat=2"]
LINK = ["-pthread"]
if WERROR:
    WARN.append("-Werror")
if SANITIZE:
    COMPILE += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    LINK += [f"-fsanitize={SANITIZE}"]
if COVERAGE:
    COMPILE += ["--coverage", "-O1"]
    LINK += ["--coverage"]


def find_nvcc():
    """Return the path of nvcc, or None."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    for place in filter(None, places):
        found = found or shutil.which("nvcc", path=os.path.join(place, "bin"))
    return found


def architecture_flags(nvcc):
    """Return what makes nvcc compile for each architecture that it knows, and PTX for the rest."""
    if CUDA_ARCHS == "native":
        return ["-arch=native"]
    wanted = [word for word in CUDA_ARCHS.replace(",", ";").split(";") if word]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [arch for arch in wanted if f"compute_{arch}" in listed.stdout.split()]
    if not known or ("KRUL_CUDA_ARCHS" in os.environ and known != wanted):
        raise RuntimeError(f"{nvcc} does not know all of the architectures {wanted}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[0]},code=compute_{known[0]}"]


def cuda_libraries(nvcc):
    """Return the folders in which this nvcc's static runtime may be."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False
    ).stderr
    prefix = "#$ TOP="
    tops = [x.removeprefix(prefix).strip() for x in dry.splitlines() if x.startswith(prefix)]
    tops.append(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))))
    found = [
        os.path.join(top, name)
        for top in tops
        for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    ]
    return [folder for folder in found if os.path.exists(f"{folder}/libcudart_static.a")]


class VariantBuild(build):
    """Keep the objects of each variant in ``build/<variant>``."""

    def initialize_options(self):
        """Choose the folder before the command line does."""
        super().initialize_options()
        self.build_base = os.path.join("build", VARIANT or "plain")


class CudaBuild(build_ext):
    """Have nvcc compile what the compiler for C does not know, or leave krul._cuda out."""

    def run(self):
        """Compile the .cu files first."""
        for extension in [each for each in self.extensions if each.name == "krul._cuda"]:
            try:
                self.compile_cuda(extension)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                if CUDA == "1":
                    raise
                print(f"krul._cuda is left out: {error}")
                self.extensions.remove(extension)
        super().run()

    def compile_cuda(self, extension):
        """Add the objects of the .cu files, made anew where something is newer."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("no nvcc was found")
        command = [nvcc, "-std=c++17", "-O3", "-Icsrc", "-Icuda", "--threads=2"]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions"]
        command += architecture_flags(nvcc)
        if WERROR:
            command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
        folder = os.path.join(self.build_temp, "cuda")
        os.makedirs(folder, exist_ok=True)
        noted = os.path.join(folder, "command")
        known = ""
        if os.path.exists(noted):
            with open(noted) as file:
                known = file.read()
        newest = max(map(os.path.getmtime, extension.depends))
        sources, objects = sorted(glob("cuda/*.cu")), []
        pending = []
        for source in sources:
            target = os.path.join(folder, os.path.basename(source) + ".o")
            objects.append(target)
            is_made = os.path.exists(target) and known == " ".join(command)
            if not is_made or os.path.getmtime(target) < max(newest, os.path.getmtime(source)):
                pending.append([*command, "-c", source, "-o", target])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(subprocess.check_call, pending))
        with open(noted, "w") as file:
            file.write(" ".join(command))
        extension.extra_objects = objects
        extension.library_dirs = cuda_libraries(nvcc)
        if not extension.library_dirs:
            raise RuntimeError(f"the folders of {nvcc} hold no libcudart_static.a")


library_sources = sorted(glob("csrc/*.c") + glob("csrc/kernels/*.c"))
binding_sources = sorted(set(glob("csrc/python/*.c")) - {"csrc/python/py_cuda.c"})
headers = glob("csrc/*.h") + glob("csrc/*/*.h")
extensions = [
    Extension(
        "krul._core",
        sources=library_sources + binding_sources,
        depends=sorted(headers + glob("csrc/kernels/*.inc")),
        include_dirs=[numpy.get_include()],
        define_macros=[("_GNU_SOURCE", None)],
        extra_compile_args=COMPILE + WARN,
        extra_link_args=LINK,
        libraries=["m", "dl"],
    )
]
if CUDA != "0":
    extensions.append(
        Extension(
            "krul._cuda",
            # The library once more: what the kernels' host side needs of it is hidden in _core.
            sources=["csrc/python/py_cuda.c", *library_sources],
            depends=sorted(
                headers + glob("csrc/kernels/*.inc") + glob("cuda/*.cuh") + glob("cuda/*.h")
            ),
            define_macros=[("_GNU_SOURCE", None)],
            extra_compile_args=COMPILE + WARN,
            extra_link_args=LINK,
            # nvcc's launches have static variables, whose guards are C++'s.
            libraries=["cudart_static", "rt", "m", "dl", "stdc++"],
            optional=CUDA != "1",
        )
    )

setup(cmdclass={"build": VariantBuild, "build_ext": CudaBuild}, ext_modules=extensions)
