"""Run tests at the oldest torch that pyproject.toml allows and at the newest that the index offers.

    python3 .ci/other_torch.py

On Linux the index has torch for CUDA alone, with gigabytes of libraries. Here only torch itself is fetched, into a
folder outside the tree, and empty libraries stand for the others: `torch.cuda.is_available()` is then False, and all
that runs on the CPU does. Whatever cannot be fetched in time is "not run", which is no failure.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradbalance"
SECONDS = 1080  # for both; all of `.ci/run` takes less than 1,200
# The oldest numpy beside the oldest torch.
NUMPY = {"oldest": "numpy==1.26.*", "newest": "numpy"}
# What is about one torch more than about another; compiling takes minutes.
TESTS = (
    "tests/rules tests/engine tests/statistics tests/recorder tests/optimizer tests/package "
    "tests/contract/test_optimizers.py tests/contract/test_amp.py tests/contract/test_schedulers.py "
    "tests/contract/test_checkpoints.py tests/contract/test_delegation.py tests/contract/test_graphs.py gradbalance"
)
DESELECTED = "not compile"
TOOLS = ("pytest", "hypothesis", "matplotlib")

# The functions of each library, by their first letters.
LIBRARIES = {
    "libcublasLt": "cublasLt",
    "libcublas.so": "cublas(?!Lt)",
    "libcudart": "(cuda|__cuda)",
    "libcudnn": "cudnn",
    "libcufft": "cufft",
    "libcufile": "cuFile",
    "libcupti": "cupti",
    "libcurand": "curand",
    "libcusolver": "cusolver",
    "libcusparseLt": "cusparseLt",
    "libcusparse.so": "cusparse(?!Lt)",
    "libnccl": "(nccl|pnccl)",
    "libnvrtc": "nvrtc",
    "libnvshmem": "nvshmem",
    "libnvToolsExt": "nvtx",
}


class NotRunError(Exception):
    """Why the tests could not be run; no fault of theirs."""


def main():
    """Both, one after the other; the exit status says whether tests failed."""
    deadline = time.monotonic() + SECONDS
    failed = False
    for which in ("oldest", "newest"):
        try:
            version = oldest() if which == "oldest" else newest(deadline)
            print(f"=== torch {version}, the {which} ===", flush=True)
            python = prepared(version, NUMPY[which], deadline)
            command = [python, "-m", "pytest", "-q", *TESTS.split(), "-k", DESELECTED]
            status = run(command, deadline, cwd=ROOT).returncode
        except NotRunError as reason:
            print(f"=== the {which} torch: not run: {reason} ===", flush=True)
            continue
        failed |= status != 0
        print(
            f"=== torch {version}, the {which}: {'failed' if status else 'passed'} ===", flush=True
        )
    return failed


def oldest():
    """The lower bound of torch in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'"torch>=([\d.]+)"', text)[1]


def newest(deadline):
    """The newest release of torch that the index offers."""
    found = output([sys.executable, "-m", "pip", "index", "versions", "torch"], deadline)
    match = re.search(r"^torch \(([\d.]+)", found, re.MULTILINE)
    if match is None:
        raise NotRunError("the index does not tell its versions")
    return match[1]


def prepared(version, numpy, deadline):
    """The interpreter of an environment with this torch; what is there of it already is kept."""
    place = CACHE / f"torch-{version}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    if not (place / "ready").exists():
        if sys.platform != "linux" or not (shutil.which("gcc") and shutil.which("readelf")):
            raise NotRunError("it takes Linux, gcc and binutils")
        shutil.rmtree(place, ignore_errors=True)
        output([sys.executable, "-m", "venv", place], deadline)
        output([*pip, "--no-deps", "--no-compile", f"torch=={version}"], deadline)
        output([*pip, numpy, *pure_requirements(python, deadline)], deadline)
        [library] = place.glob("lib/python*/site-packages/torch/lib")
        stand_in(library, deadline)
        output([python, "-c", "import torch"], deadline)
        (place / "ready").touch()
    output([*pip, *TOOLS], deadline)
    return python


def pure_requirements(python, deadline):
    """What torch needs but for the libraries of CUDA and Triton."""
    code = "from importlib.metadata import requires; print(*requires('torch'), sep='\\n')"
    names = []
    for line in output([python, "-c", code], deadline).splitlines():
        requirement = re.sub(r"[\s()]", "", line.partition(";")[0])
        if "extra ==" not in line and not re.match("nvidia|cuda|triton", requirement):
            names.append(requirement)
    return names


def stand_in(folder, deadline):
    """Compile an empty function for each that torch calls in a library of CUDA that is not there."""
    objects = [path for path in folder.glob("*.so*") if not path.is_symlink()]
    needed, symbols = set(), set()
    for path in objects:
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", output(["readelf", "-d", path], deadline)))
        undefined = output(["nm", "-D", "--undefined-only", path], deadline)
        symbols |= set(re.findall(r" U (\S+)", undefined))
    for name in sorted(needed - {path.name for path in objects}):
        prefix = next((LIBRARIES[key] for key in LIBRARIES if name.startswith(key)), None)
        if prefix is not None:
            compile_stub(folder, name, [s for s in symbols if re.match(prefix, s)], deadline)


def compile_stub(folder, name, symbols, deadline):
    """A library whose functions all report an error; each symbol may bring its version after an @."""
    versions = {}
    for symbol in symbols:
        function, _, version = symbol.replace("@@", "@").partition("@")
        versions.setdefault(version, set()).add(function)
    lines = []
    for function in sorted(set().union(*versions.values())):
        if function in ("cudaGetErrorString", "cudaGetErrorName"):
            lines.append(f'const char *{function}(int error) {{ return "no CUDA"; }}')
        else:
            lines.append(f"int {function}(void) {{ return 100; }}")  # cudaErrorNoDevice
    source, script = folder / "stub.c", folder / "stub.map"
    source.write_text("\n".join(lines) + "\n")
    versions.pop("", None)
    parts = [f"{version} {{ global: {'; '.join(names)}; }};" for version, names in versions.items()]
    script.write_text("\n".join(parts) + "\n")
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        "-fno-builtin",
        f"-Wl,-soname,{name}",
        "-o",
        folder / name,
        source,
    ]
    if versions:
        command.append(f"-Wl,--version-script={script}")
    output(command, deadline)
    source.unlink()
    script.unlink()


def run(command, deadline, **options):
    """What a command did, as `subprocess.run` gives it.

    Raises:
        NotRunError: If it does not end in time, or cannot be started.
    """
    # A constraint of this machine would hide the newest version.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull, "OMP_NUM_THREADS": "1"}
    left = max(1, deadline - time.monotonic())
    try:
        return subprocess.run(
            command, timeout=left, check=False, text=True, env=environment, **options
        )
    except subprocess.TimeoutExpired:
        raise NotRunError(f"out of time in `{shown(command)}`") from None
    except OSError as error:
        raise NotRunError(str(error)) from None


def output(command, deadline):
    """What a command prints that must succeed."""
    done = run(command, deadline, stdout=subprocess.PIPE)
    if done.returncode:
        raise NotRunError(f"`{shown(command)}` failed")
    return done.stdout


def shown(command):
    """The beginning of a command."""
    return " ".join(map(str, command[:5]))


if __name__ == "__main__":
    sys.exit(main())
