"""Run the tests that face transformers with the releases that krul is tested with.

    python tests/run_versions.py [--folder FOLDER] [--only 4.57.6 ...] [pytest arguments]

Each release is installed beside the environment, into a folder of its own that is put in front of
PYTHONPATH; what the environment itself has is the newest and is run too. Afterwards the
fingerprints of the same weights under all of them are compared. Exits 0 when everything passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# With the hub and tokeniser libraries that each release accepts; the rest is the environment's.
RELEASES = {
    "4.57.6": ["huggingface_hub>=0.34,<1.0", "tokenizers>=0.22,<=0.23.0"],
    "5.17.0": ["huggingface_hub>=1.5,<2.0", "tokenizers>=0.23.1,<0.24", "httpx", "httpcore"],
}
INSTALLED = "installed"

TESTS = [
    "test_model.py",
    "test_families.py",
    "test_cache.py",
    "test_hooks.py",
    "test_generate.py",
    "test_observe.py",
    "test_recompute.py",
    "test_source.py",
]

# Families whose parameters or KV transformers itself has rearranged, so that no fingerprint can be
# equal: experts became one parameter in 5.0, gemma3n and apertus gained or lost parameters, the
# latent attention of DeepSeek stores other tensors since 5.15. The head of gpt_neox was renamed,
# and the zoo draws numbers by name.
REARRANGED = frozenset(
    (
        "apertus",
        "deepseek_v2",
        "deepseek_v3",
        "gemma3n",
        "glm4_moe",
        "gpt_neox",
        "granitemoe",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
    )
)

# Families that compute something else: doge's mask was wrong up to 5.17, gemma2 ran without its
# soft cap under sdpa, and modernbert-decoder's local rotary base has another default since 5.0.
CORRECTED = frozenset(("doge", "gemma2", "modernbert_decoder"))


def install(release: str, folder: Path) -> Path:
    """Return the folder that holds `release`, made on first use."""
    target = folder / release
    stamp = target / ".complete"
    if stamp.is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--target", str(target), f"transformers=={release}", *RELEASES[release]]
    subprocess.run(command, check=True)
    stamp.touch()
    return target


def environment(target: Path | None) -> dict[str, str]:
    """Return the variables under which `target` is imported first and this tree's krul next."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    path = ([str(target)] if target is not None else []) + [entry for entry in path if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def imported(target: Path | None) -> str:
    """Return the version that is imported, after checking that it is the one in `target`."""
    code = "import transformers; print(transformers.__version__); print(transformers.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(target),
        check=True,
        capture_output=True,
        text=True,
    )
    version, file = done.stdout.split()[-2:]
    if target is not None and not Path(file).is_relative_to(target):
        raise SystemExit(f"transformers was imported from {file} but should be below {target}")
    return version


_WRITE_FINGERPRINTS = """
import json, sys, models
from krul import fingerprint as prints
out = {}
for name in models.workable():
    found = prints.fingerprint(models.tiny(name))
    out[name] = [found.exact, found.parts, found.behaviour.tolist()]
json.dump(out, open(sys.argv[1], "w"))
"""


def fingerprints(target: Path | None, file: Path) -> dict[str, list]:
    """Return the fingerprints of the zoo under the release in `target`."""
    command = [sys.executable, "-c", _WRITE_FINGERPRINTS, str(file)]
    subprocess.run(command, env=environment(target), check=True)
    return json.loads(file.read_text())


def compare(known: dict[str, dict[str, list]]) -> list[str]:
    """Return what differs between releases though the weights are the same."""
    sys.path.insert(0, str(ROOT))
    from krul.fingerprint import behaviour_distance, behaviour_tolerance

    problems = []
    releases = list(known)
    newest = known[releases[-1]]
    for release in releases[:-1]:
        n_equal, worst = 0, 0.0
        for name, (exact, parts, behaviour) in known[release].items():
            if name in REARRANGED | CORRECTED or name not in newest:
                continue
            now_exact, now_parts, now_behaviour = newest[name]
            if exact != now_exact:
                groups = [g for g in {*parts, *now_parts} if parts.get(g) != now_parts.get(g)]
                problems.append(f"{name}: {release} and {releases[-1]} differ in {sorted(groups)}")
                continue
            distance = behaviour_distance(behaviour, now_behaviour)
            if distance > behaviour_tolerance("float32"):
                problems.append(f"{name}: {release} behaves {distance:.1e} from {releases[-1]}")
                continue
            n_equal, worst = n_equal + 1, max(worst, distance)
        print(
            f"fingerprints of {release} and {releases[-1]}: {n_equal} families equal, "
            f"behaviour within {worst:.1e}"
        )
    return problems


def main() -> int:
    """Install what is missing, run the tests under each release, compare the fingerprints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "transformers")
    parser.add_argument("--only", nargs="*", choices=[*RELEASES, INSTALLED])
    arguments, rest = parser.parse_known_args()
    failed = []
    known: dict[str, dict[str, list]] = {}
    for release in arguments.only or [*RELEASES, INSTALLED]:
        target = None
        if release != INSTALLED:
            target = install(release, arguments.folder.resolve())
        version = imported(target)
        print(f"== transformers {version}", flush=True)
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", *(rest or []), *tests]
        if subprocess.run(command, env=environment(target), cwd=ROOT).returncode != 0:
            failed.append(f"tests under {version}")
        file = arguments.folder / f"fingerprints-{version}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        known[version] = fingerprints(target, file)
    failed += compare(known)
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
