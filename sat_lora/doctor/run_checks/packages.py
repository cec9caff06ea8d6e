"""The packages that a run imports: all there, with the real cause where one is not, and of versions that fit.

Needs nothing but Python's own library, so that it can speak where nothing else can be imported.
"""

import builtins
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sat_lora.findings.finding import Finding, as_text, has_errors, looks_for

# What setup.py requires, and the module to try. SAT comes first: `_sat` imports it, and DeepSpeed, without remarks.
IMPORTS = {
    "SwissArmyTransformer": "sat_lora._sat",
    "triton": "triton",
    "wandb": "wandb",
    "torch": "torch",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "safetensors": "safetensors.torch",
    "webdataset": "webdataset",
    "numpy": "numpy",
    "packaging": "packaging.version",
    "pydantic": "pydantic",
    "Pillow": "PIL.Image",
    "pyarrow": "pyarrow.parquet",
    "PyYAML": "yaml",
    "tqdm": "tqdm",
    "tensorboard": "torch.utils.tensorboard",
    "matplotlib": "matplotlib",
}
_INSTALLED_AS = {"sat": "SwissArmyTransformer", "PIL": "Pillow", "cv2": "opencv-python", "yaml": "PyYAML"}
INSTALL = "pip install -c constraints.txt"


@looks_for("versions", "missing-module")
def package_findings(imports: Mapping[str, str] = IMPORTS, gpu: str | Path = "/dev/nvidia0") -> list[Finding]:
    """Return `missing-module` and `versions` of this process; what is not imported yet is imported.

    imports: module by package. gpu: there if this machine has an NVIDIA GPU.
    """
    return [*_missing(imports), *_outside_of_ranges(imports), *_without_gpu(Path(gpu))]


def report_missing() -> bool:
    """Print, once per machine, what cannot be imported; return whether there is something.

    Call it before other imports.
    """
    findings = package_findings()
    if has_errors(findings) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(as_text(findings), flush=True)
    return has_errors(findings)


def compare_versions(by_rank: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Return what differs between the ranks. by_rank: of each, version by package."""
    findings = []
    for package in dict.fromkeys(package for rank_versions in by_rank for package in rank_versions):
        where: dict[str, list[int]] = {}
        for rank, rank_versions in enumerate(by_rank):
            where.setdefault(rank_versions.get(package, "not installed"), []).append(rank)
        if len(where) > 1:
            usual = max(where, key=lambda version: len(where[version]))
            odd = tuple(rank for version, ranks in where.items() if version != usual for rank in ranks)
            seen = "; ".join(f"{version} on rank {_listed(ranks)}" for version, ranks in where.items())
            fix = "install the same versions on every machine"
            findings.append(Finding(code="versions", seen=f"{package} is {seen}", ranks=tuple(sorted(odd)), fix=fix))
    return findings


def _listed(ranks: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


# Imports


def _missing(imports: Mapping[str, str]) -> list[Finding]:
    """Return one finding per cause, since one missing module fails every package that imports it."""
    causes: dict[str, list[tuple[str, BaseException, BaseException]]] = {}
    with _failed_imports() as failed:
        for package, module in imports.items():
            del failed[:]
            try:
                loaded = importlib.import_module(module)
                if getattr(loaded, "__file__", None) is None and hasattr(loaded, "__path__"):
                    folder = next(iter(loaded.__path__), "")
                    raise ModuleNotFoundError(f"{folder} is a folder without code and takes its name", name=module)
            except Exception as error:  # a broken package may raise anything
                cause = real_cause(error, failed)
                causes.setdefault(f"{type(cause).__name__}: {cause}", []).append((package, error, cause))
    return [_finding_of(cause_text, failures) for cause_text, failures in causes.items()]


def real_cause(error: BaseException, failed: Sequence[tuple[str, ImportError]] = ()) -> BaseException:
    """Return the failed import, or the library that could not be loaded, that `error` followed from.

    It is the innermost of its causes and contexts, also those that `raise ... from None` hides. Without any, an error
    such as a NameError may stem from an import that its module tried and went on without. failed: (importing module,
    error) of all imports that failed on the way, in order.
    """
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) and all(earlier is not link for link in chain):
        chain.append(earlier)
    of_import = [link for link in chain if isinstance(link, ImportError | OSError)]
    if of_import:
        return of_import[-1]
    frames = [*_frames(chain[-1])]
    module = frames[-1][2] if frames else ""
    return next((link for importer, link in reversed(failed) if importer == module), chain[-1])


@contextmanager
def _failed_imports() -> Iterator[list[tuple[str, ImportError]]]:
    """Give a list to which import statements that fail inside are added, those too that their module survives."""
    failed: list[tuple[str, ImportError]] = []
    original = builtins.__import__

    def import_and_note(name, globals=None, *args, **kwargs):
        try:
            return original(name, globals, *args, **kwargs)
        except ImportError as error:
            failed.append(((globals or {}).get("__name__", ""), error))
            raise

    builtins.__import__ = import_and_note
    try:
        yield failed
    finally:
        builtins.__import__ = original


def _frames(error: BaseException) -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, module) of an error's traceback, without the machinery of importing."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        module = trace.tb_frame.f_globals.get("__name__", "")
        if not module.startswith("importlib") and not code.co_filename.startswith("<") and module != __name__:
            yield code.co_filename, trace.tb_lineno, module
        trace = trace.tb_next


def _finding_of(cause_text: str, failures: list[tuple[str, BaseException, BaseException]]) -> Finding:
    packages = [package for package, *_ in failures]
    _, error, cause = failures[0]
    seen = f"{', '.join(packages)} cannot be imported: {cause_text}"
    places = [*_frames(cause)]
    if places:
        seen += f" (at {places[-1][0]}:{places[-1][1]})"
    if error is not cause:
        seen += f"; what comes out of it is {type(error).__name__}: {error}"
    return Finding(code="missing-module", seen=seen, module=getattr(cause, "name", None), fix=_remedy(packages, cause))


def _remedy(packages: list[str], cause: BaseException) -> str | None:
    library = re.search(r"\S*\.so[.\d]*", str(cause))
    if library:
        return f"install {library.group().strip(':')} or the package again, built for this machine and this Python"
    if not isinstance(cause, ModuleNotFoundError) or not cause.name:
        return None
    if "without code" in str(cause):
        return f"{INSTALL} {packages[0]}, and rename the folder"
    top = cause.name.partition(".")[0]
    try:
        is_there = importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        is_there = False
    name = _INSTALLED_AS.get(top, top)
    if is_there:  # it has no such part: of another version, or damaged
        return f"{INSTALL} --force-reinstall {name}"
    return f"{INSTALL} {name}"


# Versions


def _outside_of_ranges(packages: Mapping[str, str]) -> Iterator[Finding]:
    """Yield findings on installed versions that sat_lora, or one of the packages, does not want."""
    try:
        from packaging.utils import canonicalize_name
    except ImportError:
        return
    installed = {}
    for name in packages:
        try:
            installed[canonicalize_name(name)] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for owner in ("sat_lora", *packages):
        for requirement in _requirements(owner):
            version = installed.get(canonicalize_name(requirement.name))
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                text = f"{requirement.name}{requirement.specifier}"
                seen = f"{owner} wants {text}, and {version} is installed"
                yield Finding(code="versions", seen=seen, fix=f"pip install '{text}'")


def _requirements(package: str) -> list:
    """Return a package's requirements that hold here, as `packaging` has them; none without metadata."""
    from packaging.requirements import InvalidRequirement, Requirement

    requirements = []
    try:
        for line in importlib.metadata.requires(package) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                requirements.append(requirement)
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return requirements
    return requirements


def _without_gpu(gpu: Path) -> Iterator[Finding]:
    """Yield a finding on a GPU that torch's build cannot use: the run would take the CPU, and not say so."""
    torch = sys.modules.get("torch")
    if torch is None or not gpu.exists() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        seen = f"torch {torch.__version__} is built without CUDA, and this machine has an NVIDIA GPU"
        fix = "install torch's build for the machine's CUDA, see pytorch.org/get-started"
        yield Finding(code="versions", seen=seen, fix=fix)
    elif not torch.cuda.is_available():
        seen = f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU it can use"
        fix = "compare that with the CUDA version in nvidia-smi's first line; a newer driver or an older build fits"
        yield Finding(code="versions", seen=seen, fix=fix)
