"""The package as a whole: its layout, its imports, its public names, its environment, and the wheel built from it."""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import minimind_o_hf
from minimind_o_hf import environment

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = ("minimind_o_hf", "modeling", "processing")
SUBPACKAGES = ("modeling", "processing")

TOP_LEVEL = {
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "docs",
    "minimind_o_hf",
    "modeling",
    "processing",
    "pyproject.toml",
    "setup.py",
    "tests",
    "training_scripts",
}

# Whoever adds a name here promises to keep it.
PUBLIC_NAMES = [
    "CamPlusPlusConfig",
    "CamPlusPlusFeatureExtractor",
    "CamPlusPlusModel",
    "Conversation",
    "MimiStreamState",
    "MimiStreamingDecoder",
    "MimiStreamingEncoder",
    "MiniMindOAnswer",
    "MiniMindOCache",
    "MiniMindOConfig",
    "MiniMindOFeatureExtractor",
    "MiniMindOForConditionalGeneration",
    "MiniMindOGenerateOutput",
    "MiniMindOIteratorStreamer",
    "MiniMindOOutputWithPast",
    "MiniMindOPreTrainedModel",
    "MiniMindOProcessor",
    "MiniMindOStackOutput",
    "MiniMindOStreamEvent",
    "MiniMindOStreamer",
    "MiniMindOTalkerModel",
    "MiniMindOThinkerModel",
    "Voice",
    "VoiceLibrary",
    "apply_delay_pattern",
    "default_checkpoint",
    "load_audio",
    "place_voice",
    "read_mark",
    "revert_delay_pattern",
]

# Declared in setup.py and imported by no file of the package, with what would fail without it.
NEEDED_INDIRECTLY = {
    "accelerate": "`device_map` of `from_pretrained`",
    "jinja2": "chat templates, rendered by transformers",
    "onnx": "written by torch's exporter",
    "onnxscript": "torch's exporter",
    "pillow": "pictures, loaded by name, as the model loads without it too",
    "python-multipart": "uploads, parsed by FastAPI",
    "resemble-perth": "network and weights of the watermark, read from its folder",
    "silero-vad": "its network, read from its folder",
    "tensorboard": "logs of the Trainer",
    "torchvision": "the any-to-any pipeline of transformers",
    "websockets": "the protocol, spoken by uvicorn",
}
IMPORT_NAMES = {"pillow": "PIL", "prometheus-client": "prometheus_client", "pyyaml": "yaml"}


PICKLERS = {"pickle", "cloudpickle", "dill", "joblib"}


def package_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """`modeling/x.py` -> `minimind_o_hf.modeling.x`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "minimind_o_hf" else ("minimind_o_hf", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> list[tuple[int, str]]:
    """All imports of a file, those inside functions included, as (number of leading dots, dotted name)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is None:  # from . import x
            found += [(node.level, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module))
    return found


def unsafe_loading(tree: ast.Module) -> list[str]:
    """What in a file could run code out of a downloaded file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS - {"pickle"}]
            found += [
                f"{alias.name} as {alias.asname}" for alias in node.names if alias.asname and "pickle" in alias.name
            ]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module or "").split(".")[0] in PICKLERS and names != {"UnpicklingError"}:
                found.append(ast.unparse(node))
            if node.module == "torch" and "load" in names:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute):
            if ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            found += [f"{name}=True" for name in ("allow_pickle", "trust_remote_code") if options.get(name) == "True"]
    return found


@pytest.fixture(scope="module")
def metadata() -> dict:
    """What setup.py passes to `setup`, without building anything."""
    arguments = {}
    setuptools = ModuleType("setuptools")
    setuptools.setup = arguments.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", setuptools)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def distribution(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement).group().lower()


def python(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, as `python -c` does: `cwd` comes first on its path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )


@pytest.fixture(scope="module")
def repository_files() -> list[Path]:
    """Files that are tracked, or would be by `git add .`, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if listing.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


# --- Layout


def test_top_level_has_nothing_unexpected(repository_files):
    assert {path.parts[0] for path in repository_files if not path.parts[0].startswith(".")} == TOP_LEVEL


def test_no_path_of_somebodys_machine(repository_files):
    local = re.compile(rb"(?<![\w.~:/-])/(?:home|root|Users|work|farm|workspace|tmp/w)/")
    assert local.search(b'open("/%s/me/x")' % b"home")
    assert not local.search(b"see ../work/ and https://host/home/")
    assert [str(path) for path in repository_files if local.search((ROOT / path).read_bytes())] == []


# --- Imports


def test_each_source_file_is_loaded_once_from_the_repositorys_root():
    """From the root, `import modeling` would work too, and yield a second copy of every class."""
    expected = {
        str(path): [module_name(path)] for path in package_files(*PACKAGE_FOLDERS) if path.name != "__main__.py"
    }
    folders = tuple(str(ROOT / folder) + os.sep for folder in PACKAGE_FOLDERS)
    result = python(
        f"""
import collections, importlib, json, sys
for (name,) in {list(expected.values())}:
    importlib.import_module(name)
files = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    if str(getattr(module, "__file__", "")).startswith({folders}):
        files[module.__file__].append(name)
print(json.dumps(files))
""",
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_the_root_serves_its_own_subpackages_whatever_is_installed():
    result = python(
        """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import minimind_o_hf.modeling, minimind_o_hf.processing
print(minimind_o_hf.modeling.__file__, minimind_o_hf.processing.__file__, sep="\\n")
""",
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [str(ROOT / name / "__init__.py") for name in SUBPACKAGES]


def test_nothing_imports_the_folders_as_roots():
    files = package_files(*PACKAGE_FOLDERS, "tests", "benchmarks", "training_scripts", "docs")
    assert len(files) > 10
    guilty = {
        str(path): name
        for path in files
        for level, name in imports(syntax_tree(path))
        if level == 0 and name.split(".")[0] in SUBPACKAGES
    }
    assert guilty == {}


@pytest.mark.parametrize("folder", SUBPACKAGES)
def test_subpackages_import_only_their_own_files_and_other_packages(folder):
    """Arrows point from the face to the subpackages. Files are copied by `register_for_auto_class`, which follows
    imports with one dot only."""
    files = package_files(folder)
    assert files
    for path in files:
        for level, name in imports(syntax_tree(path)):
            if level == 0:
                assert name.split(".")[0] not in PACKAGE_FOLDERS, f"{path}: {name}"
            else:
                assert level == 1, f"{path}: {name} with {level} dots"
                assert (path.parent / f"{name}.py").is_file(), f"{path}: .{name} is no sibling"


@pytest.mark.parametrize(
    "code",
    [
        "import dill",
        "from pickle import loads",
        "import pickle\npickle.load(file)",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_unsafe_loading_is_recognised(code):
    assert unsafe_loading(ast.parse(code)) != []


def test_nothing_is_unpickled():
    assert (
        unsafe_loading(ast.parse("import pickle\npickle.UnpicklingError\ntorch.load(path, weights_only=True)")) == []
    )
    files = package_files(*PACKAGE_FOLDERS, "benchmarks", "training_scripts")
    assert {str(path): found for path in files if (found := unsafe_loading(syntax_tree(path)))} == {}


# --- Public names and metadata


def test_public_names():
    assert sorted(minimind_o_hf.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(minimind_o_hf, name).__module__.startswith("minimind_o_hf"), name


def test_every_module_says_what_it_offers():
    for path in package_files(*PACKAGE_FOLDERS):
        if path.name not in ("__init__.py", "__main__.py"):
            last = next(node for node in reversed(syntax_tree(path).body) if not isinstance(node, ast.If))
            assert isinstance(last, ast.Assign), path
            assert ast.unparse(last.targets[0]) == "__all__", path


def test_declared_and_imported_packages_agree(metadata):
    declared = {distribution(requirement) for requirement in metadata["install_requires"]}
    extras = metadata["extras_require"]
    optional = {
        distribution(requirement)
        for extra in ("pipeline", "train", "play", "watermark", "evaluation", "onnx", "server")
        for requirement in extras[extra]
    }
    imported = {
        name.split(".")[0]
        for path in package_files(*PACKAGE_FOLDERS)
        for level, name in imports(syntax_tree(path))
        if level == 0
    }
    imported -= set(sys.stdlib_module_names) | set(PACKAGE_FOLDERS)
    importable = {IMPORT_NAMES.get(name, name) for name in declared | optional}
    assert imported - importable == set(), "imported, but not in setup.py"
    unused = {name for name in declared | optional if IMPORT_NAMES.get(name, name) not in imported}
    assert unused - NEEDED_INDIRECTLY.keys() == set(), "in setup.py, but not imported"


def test_torch_bounds_agree_with_setup(metadata):
    bounds = [item for item in metadata["install_requires"] if distribution(item) in ("torch", "torchaudio")]
    assert bounds == [environment.TORCH, environment.TORCHAUDIO]
    assert metadata["extras_require"]["pipeline"] == [environment.TORCHVISION]


# --- A torch pair that does not load


def test_broken_pair_is_named_before_transformers_is_imported(tmp_path):
    """The error is the real one of a CUDA build of torchaudio beside a CPU-only torch."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text(
        "try:\n"
        "    raise OSError('libc10_cuda.so: cannot open shared object file: No such file or directory')\n"
        "except OSError as error:\n"
        "    raise OSError('Could not load this library: lib/_torchaudio.abi3.so') from error\n",
        encoding="utf-8",
    )
    code = """
import sys
try:
    import minimind_o_hf
except ImportError as error:
    print(error)
    print("transformers" in sys.modules)
"""
    result = python(code, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert result.returncode == 0, result.stderr
    *message, transformers_imported = result.stdout.splitlines()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchaudio")}
    assert transformers_imported == "False"
    assert message[0].startswith("`import torchaudio` failed: OSError: libc10_cuda.so: cannot open shared object file")
    assert f"torch {versions['torch']}, torchaudio {versions['torchaudio']}" in message[1]
    uninstall, install = message[-1].strip().split(" && ")
    assert uninstall.startswith(f"{sys.executable} -m pip uninstall -y torch torchaudio")
    assert install.startswith(f'{sys.executable} -m pip install "{environment.TORCH}" "{environment.TORCHAUDIO}"')


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (("torch", "torchaudio", "torchvision"), '-m pip install "torch>='),
        (("torchaudio", "torchvision"), "-m pip uninstall -y torch && "),
    ],
)
def test_missing_package_is_named(monkeypatch, missing, command):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    monkeypatch.setattr(environment, "_installed_version", lambda name: None if name in missing else "2.14.1")
    with pytest.raises(ImportError) as error:
        environment.check_torch_pair()
    assert error.value.name == missing[0]
    assert f"{missing[0]} (not installed)" in str(error.value)
    assert str(error.value).splitlines()[-1].strip().startswith(f"{sys.executable} {command}")
    assert "torchvision>=" not in str(error.value)


def test_missing_torchvision_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(environment, "_installed_version", lambda name: None if name == "torchvision" else "2.14.1")
    assert environment.check_torch_pair() is None


# --- The wheel


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_works_alone_and_beside_the_repository(tmp_path, repository_files):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in repository_files:  # a copy: a build leaves files behind, and an old build/ would slip into the wheel
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())

    def pip(*arguments: str) -> str:
        command = [sys.executable, "-m", "pip", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    log = pip("wheel", "--verbose", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    assert "Deprecat" not in log
    (wheel,) = tmp_path.glob("*.whl")
    expected = {
        str(path if path.parts[0] == "minimind_o_hf" else "minimind_o_hf" / path)
        for path in repository_files
        if path.parts[0] in PACKAGE_FOLDERS
    }
    with zipfile.ZipFile(wheel) as archive:
        contents = set(archive.namelist())
    info = f"{wheel.name.rsplit('-', 3)[0]}.dist-info"
    assert {name for name in contents if not name.startswith(info)} == expected
    assert {f"{info}/{name}" for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")} <= contents

    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    code = """
import sys, minimind_o_hf
for name in minimind_o_hf.__all__:
    getattr(minimind_o_hf, name)
print(*{sys.modules[name].__file__ for name in sys.modules if name.split(".")[0] == "minimind_o_hf"}, sep="\\n")
"""
    for cwd, origin in ((elsewhere, site), (source, source)):
        result = python(code, cwd=cwd, PYTHONPATH=str(site))
        assert result.returncode == 0, result.stderr
        files = [Path(line) for line in result.stdout.splitlines() if line.endswith(".py")]
        assert len(files) > 5
        assert {file for file in files if not file.is_relative_to(origin)} == set()

    program = subprocess.run(
        [site / "bin" / "minimind-o", "--help"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )
    assert program.returncode == 0, program.stderr
    assert "chat" in program.stdout
