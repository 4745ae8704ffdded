"""Builds extension modules that only tests need, and keeps them by the content of their sources."""

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def missing():
    """What this machine lacks to build anything, in words, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def build(name, sources, flags, built_from, root=ROOT, folder=None):
    """The path of the extension module ``name``, under ``build/`` unless another folder is given.

    ``sources`` has the flags of each file, and ``built_from`` all files whose content matters; both are paths below
    the repository, of which ``root`` is a copy.
    """
    import pybind11

    digest = hashlib.sha256(repr((flags, sources, sys.version, pybind11.__version__)).encode())
    for path in built_from:
        digest.update((root / path).read_bytes())
    place = (folder or ROOT / "build") / f"{name}-for-tests-{digest.hexdigest()[:16]}"
    target = place / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
            objects, running = [], []
            for source, own in sources.items():
                objects.append(str(place / (source.replace("/", "-") + ".o")))
                words = ["g++", *flags, *own, *includes, "-c", "-x", "c++", str(root / source), "-o", objects[-1]]
                running.append(subprocess.Popen(words))
            if sum(process.wait() != 0 for process in running):
                raise RuntimeError(f"{name} does not compile; the compiler's words are above")
            part = target.with_suffix(".part")
            subprocess.run(["g++", *flags, "-shared", *objects, "-o", str(part)], check=True)
            part.rename(target)
    return target


def load(path, name):
    """The module at ``path``, as ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def address_sanitizer():
    """Environment variables under which Python runs a sanitized extension, or None where g++ has no such library."""
    found = []
    # With the second one the sanitizer finds the function that throws exceptions, which it replaces.
    for name in ("libasan.so", "libstdc++.so"):
        words = ["g++", f"-print-file-name={name}"]
        found.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
    if not all(Path(library).is_absolute() for library in found):
        return None
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
