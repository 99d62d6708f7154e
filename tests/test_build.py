"""The build's decisions, what a broken extension says, and `moka.info`."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import moka
from moka import _native, ops
from moka.errors import NativeError
from moka.info import Info

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "_backend"), str(ROOT / ".ci")]

import cuda_kernels  # noqa: E402
from cuda_build import check_cuda_major, choose_archs, find_cuda_home, gencode_flags, nvcc_release  # noqa: E402

# --- decisions about CUDA


def test_cuda_major_mismatch_names_both_versions():
    with pytest.raises(
        RuntimeError, match=r"nvcc is CUDA 13\.0 but this torch was built for CUDA 12\.8"
    ) as raised:
        check_cuda_major("13.0", "12.8")
    assert "point CUDA_HOME at a toolkit of major 12" in str(raised.value)


def test_same_cuda_major_is_accepted():
    check_cuda_major("12.4", "12.8")


def test_cuda_home_needs_headers_beside_nvcc(tmp_path, monkeypatch):
    """A wrapper on PATH (here: `wrapper`) is passed over for a whole toolkit."""
    for home in ("wrapper", "toolkit"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "nvcc").write_text("#!/bin/sh")
        (tmp_path / home / "bin" / "nvcc").chmod(0o755)
    (tmp_path / "toolkit" / "include").mkdir()
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper" / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    assert find_cuda_home() == str(tmp_path / "toolkit")


def test_nvcc_release_is_read_from_its_banner():
    assert nvcc_release("Cuda compilation tools, release 13.0, V13.0.88") == "13.0"
    with pytest.raises(ValueError, match="expected 'release"):
        nvcc_release("gcc 12")


@pytest.mark.parametrize(
    ("requested", "visible", "expected"),
    [
        pytest.param(None, [], ["80", "86", "89", "90a"], id="no GPU: the release list"),
        pytest.param("", [(9, 0), (9, 0)], ["90a"], id="two Hopper GPUs"),
        pytest.param(None, [(8, 9), (8, 0)], ["80", "89"], id="mixed GPUs"),
        pytest.param("sm_90a,80", [(8, 6)], ["80", "90a"], id="requested"),
        pytest.param(" 80; 100a ", [], ["80", "100a"], id="sorted by number"),
    ],
)
def test_choose_archs(requested, visible, expected):
    assert choose_archs(requested, visible) == expected


def test_unknown_arch_is_refused():
    with pytest.raises(ValueError, match="MOKA_CUDA_ARCHS: got 'hopper', expected"):
        choose_archs("80;hopper", [])


def test_gencode_flags():
    assert gencode_flags(["90a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]


# --- register spills, as `make kernels` counts them

PTXAS = """ptxas info    : Compiling entry function '_Z4fastv' for 'sm_80'
ptxas info    : Function properties for _Z4fastv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Function properties for _Z4slowi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


@pytest.mark.parametrize(
    ("allowed", "problems"),
    [
        pytest.param([], ["sm_80: 12 bytes spilled, 8 loaded: slow"], id="not listed"),
        pytest.param([("90a", "slow", 12, "")], ["sm_80: 12 bytes"], id="listed for another"),
        pytest.param([("80 90a", "^slow$", 8, "")], ["sm_80: 12 bytes"], id="more than listed"),
        pytest.param([("80", "^slow$", 12, "")], [], id="listed"),
    ],
)
def test_spills_are_found(allowed, problems, monkeypatch):
    kernels = cuda_kernels.functions(PTXAS, "80")
    assert kernels == [("80", "fast", 40, 0, 0), ("80", "slow", 255, 12, 8)]
    monkeypatch.setattr(cuda_kernels, "ALLOWED", allowed)
    got = cuda_kernels.unlisted(kernels)
    assert len(got) == len(problems)
    assert all(problem.startswith(start) for problem, start in zip(got, problems, strict=True))


# --- a missing or broken extension


def test_extension_says_what_it_was_built_for():
    path = _native.extension_path()
    assert path is not None
    assert _native.built_for(path) == torch.__version__ == moka.info().built["torch"]


def test_missing_extension(monkeypatch):
    monkeypatch.setattr(_native, "extension_path", lambda: None)
    error = _native.load()
    assert isinstance(error, NativeError)
    assert "missing" in str(error)
    assert _native.REBUILD in str(error)


def test_extension_for_another_torch_is_not_loaded(monkeypatch):
    monkeypatch.setattr(_native, "built_for", lambda path: "1.0.0+cpu")
    monkeypatch.setattr(_native.importlib, "import_module", lambda name: pytest.fail("it was loaded"))
    message = str(_native.load())
    assert f"built for torch 1.0.0+cpu, found torch {torch.__version__}" in message
    assert _native.REBUILD in message


def test_first_use_raises_and_info_reports(monkeypatch):
    monkeypatch.setattr(ops, "_load_error", NativeError("not loaded; rebuild"))
    with pytest.raises(NativeError, match="not loaded; rebuild"):
        moka.nf4.quantize(torch.randn(8, 64))
    with pytest.raises(NativeError, match="not loaded; rebuild"):
        factors = torch.randn(4), torch.randn(4), torch.randn(1)
        moka.functional.kron_mixture(torch.randn(2, 4), *factors, [(2, 2, 2, 2)])
    assert moka.info().extension == "not loaded; rebuild"
    assert moka.info().cpu_isa is None


BREAKAGES = {
    "undefined symbol": lambda data: data.replace(b"_ZN3c10", b"_ZN3c99"),
    "empty": lambda data: b"",
    "not a library": lambda data: b"text\n",
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_extension_in_a_fresh_process(tmp_path, breakage):
    """Import works; the first use names versions and the rebuild command instead of a raw loader error."""
    package = shutil.copytree(Path(moka.__file__).parent, tmp_path / "moka")
    library = next(package.glob("_C*.so"))
    library.write_bytes(BREAKAGES[breakage](library.read_bytes()))
    script = (
        "import torch, moka\n"
        "print('imported', moka.__file__)\n"
        "try: moka.nf4.quantize(torch.randn(8, 64))\n"
        "except moka.errors.NativeError as error: print('refused:', error)\n"
        "print(moka.info())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"imported {tmp_path}" in done.stdout
    assert "refused: moka's compiled extension does not load" in done.stdout
    assert f"found torch {torch.__version__}" in done.stdout
    assert _native.REBUILD in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


# --- moka.info


def test_info_is_complete_and_readable():
    found = moka.info()
    assert isinstance(found, Info)
    assert found.extension == "loaded"
    assert found.moka == moka.__version__
    assert found.torch == torch.__version__
    assert found.cpu_isa in ("avx512", "avx2", "scalar")
    for name in ("moka", "torch", "compiler", "CUDA archs", "CPU kernels", "bitsandbytes", "transformers"):
        assert f"\n{name} " in "\n" + str(found)


# --- installing


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "install torch first"),
        ("2.8.1+cu128", "needs torch 2.9 or newer, got 2.8.1+cu128: upgrade it"),
    ],
)
def test_building_without_a_torch_that_serves_stops_with_one_sentence(version, message, tmp_path):
    """Run as pip runs the backend: without site-packages, but with the target's Python."""
    packages = []
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").touch()
        (tmp_path / "torch-0.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        (tmp_path / "torch-0.dist-info" / "METADATA").write_text(metadata)
        packages = [str(tmp_path)]
    print_path = f"print({json.dumps(packages)!r})"
    script = (
        "import sys; sys.path.insert(0, '_backend'); import moka_build\n"
        f"moka_build.PRINT_PATH = {print_path!r}\n"
        "sys.path = [path for path in sys.path if not path.endswith('-packages')]\n"
        "moka_build.get_requires_for_build_wheel()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr and '"torch>=2.9"' in (ROOT / "pyproject.toml").read_text()
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def tree(tmp_path):
    """A copy of the source as it is in a fresh clone."""
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=unwanted)


def test_source_archive_holds_what_the_build_needs(tree, tmp_path):
    folders = ("csrc", "_backend", "moka")
    expected = {folder: {path.relative_to(tree) for path in (tree / folder).rglob("*")} for folder in folders}
    script = "import sys; sys.path.insert(0, '_backend'); import moka_build; moka_build.build_sdist('..')"
    subprocess.run([sys.executable, "-c", script], cwd=tree, check=True, capture_output=True)
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    for folder in folders:
        assert expected[folder] == {path.relative_to(unpacked) for path in (unpacked / folder).rglob("*")}


def torch_and_its_requirements() -> set[str]:
    """Names of the distributions that an environment with nothing but torch holds."""
    found, wanted = set(), ["torch"]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
            wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def link_distribution(name: str, site_packages: Path) -> None:
    """Makes one installed distribution part of another environment, by links."""
    files = importlib.metadata.distribution(name).files or []
    for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
        target = site_packages / top
        if not target.exists():
            target.symlink_to(files[0].locate().parents[len(files[0].parts) - 1] / top)


def test_torch_requirement_keeps_the_torch_that_is_there():
    requirements = map(Requirement, importlib.metadata.requires("moka") or [])
    (wanted,) = [requirement for requirement in requirements if requirement.name == "torch"]
    assert wanted.specifier.contains(torch.__version__)


@pytest.mark.slow
def test_pip_install_into_an_environment_with_only_torch(tree, tmp_path):
    """Under pip's build isolation: compiled against that torch, which stays; the operators work."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run = partial(subprocess.run, check=True, capture_output=True, text=True, cwd=tmp_path)
    site_packages = Path(run([python, "-c", "import site; print(site.getsitepackages()[0])"]).stdout.strip())
    for name in torch_and_its_requirements():
        link_distribution(name, site_packages)
    run([python, "-m", "pip", "install", "--no-deps", str(tree)])
    for name in ("numpy", "safetensors"):  # what pip would have fetched without --no-deps
        link_distribution(name, site_packages)
    script = (
        "import torch, moka\n"
        "moka.nf4.quantize(torch.ones(8, 64))\n"
        "print(moka.__file__, torch.__file__, torch.__version__, moka.info().built['torch'], sep='\\n')"
    )
    moka_file, torch_file, *versions = run([python, "-c", script]).stdout.splitlines()
    assert Path(moka_file).is_relative_to(site_packages)
    assert Path(torch_file).is_relative_to(site_packages)
    assert (site_packages / "torch").is_symlink(), "torch was replaced"
    assert versions == [torch.__version__] * 2
