"""Publishing: what is uploaded, what is refused, and that it loads where the package is not installed. The Hub is a
server on this machine; its client is the real one."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from local_hub import TOKEN, Repository, serve
from packaging.requirements import Requirement
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from minimind_o_hf import Voice, VoiceLibrary, default_checkpoint
from minimind_o_hf.adapters import carry_voices, get_peft_model, lora_config, publish_adapter
from minimind_o_hf.cli import main
from minimind_o_hf.publishing import publish

NAME = "somebody/nano"
GENERATE = """
chat = [{"role": "user", "content": "Hello"}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True, voice="awb")
outputs = model.generate(**inputs, seeds=[1], max_new_tokens=24)
"""
LOAD = """
import sys
sys.modules["minimind_o_hf"] = None  # an import of it fails
from transformers import AutoModelForMultimodalLM, AutoProcessor
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
"""
SHOW = "print(outputs.sequences.tolist(), outputs.audio_codes.tolist())\n"


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    """What is published of the package's checkpoint."""
    target = tmp_path_factory.mktemp("staged") / "nano"
    assert main(["publish", str(default_checkpoint()), NAME, "--dry-run", str(target)]) == 0
    return target


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the package's checkpoint, to be spoilt."""
    return shutil.copytree(default_checkpoint(), tmp_path / "checkpoint", copy_function=shutil.copyfile)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which the client in this process takes for the real one."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # Xet's storage speaks a protocol of its own; without it the client uploads by LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def answer() -> str:
    """What the package's own classes generate."""
    path = default_checkpoint()
    model, processor = AutoModelForMultimodalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)
    names = {"model": model, "processor": processor}
    exec(GENERATE, names)
    outputs = names["outputs"]
    return f"{outputs.sequences.tolist()} {outputs.audio_codes.tolist()}"


def run(python, program, *arguments, folder, **environment):
    """The last line that a program prints in a process of its own."""
    done = subprocess.run(
        [str(python), "-c", program, *map(str, arguments)],
        cwd=folder,
        env={"HF_HOME": str(folder / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


# --- What is published


def test_what_is_staged_is_the_checkpoint_with_its_code_and_a_card(staged):
    before, after = files_of(default_checkpoint()), files_of(staged)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "README.md",
        "config.json",
        "processor_config.json",
        "speaker_encoder/config.json",
        "speaker_encoder/preprocessor_config.json",
    }
    modules = {path.name for name in ("modeling", "processing") for path in package_folder(name).glob("[a-z]*.py")}
    assert set(after) - set(before) == modules
    config = json.loads(after["config.json"])
    assert config.pop("auto_map") == {
        "AutoConfig": "configuration_minimind_o.MiniMindOConfig",
        **dict.fromkeys(
            ["AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForTextToWaveform"],
            "modeling_minimind_o.MiniMindOForConditionalGeneration",
        ),
    }
    assert config == json.loads(before["config.json"])


def package_folder(name: str) -> Path:
    return Path(importlib.import_module(f"minimind_o_hf.{name}").__path__[0])


def test_the_card(staged):
    card = ModelCard.load(staged / "README.md")
    version = importlib.metadata.version("minimind_o_hf")
    assert card.data.to_dict() == {
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "any-to-any",
        "published_with": f"minimind_o_hf {version}",
        "tags": ["minimind-o"],
    }
    original = ModelCard.load(default_checkpoint() / "README.md")
    assert card.text.startswith(original.text.rstrip())
    origin = json.loads((default_checkpoint() / "provenance.json").read_text(encoding="utf-8"))
    voice = VoiceLibrary(default_checkpoint() / "voices.safetensors").get("awb")
    stage = origin["stages"]["t2a"]
    steps, loss = stage["settings"]["steps"], stage["figures"]["eval_loss"]
    for line in (
        f"| t2a | all | t2a | {steps} | 32 | 0.001 | 0.003 | muon | {loss:.4g} |",
        f"| CER, all | {origin['evaluation']['CER, all']:.4g} |",
        f"| awb | en | {voice.licence} | {voice.consent} | {voice.description} |",
        "| licence | apache-2.0 |",
        "| parameters | 7.3 M (Thinker 2.2 M, Talker 2.6 M, speech encoder 1.7 M, vision encoder 0.8 M) |",
        "## Limits",
        "## Responsible use",
    ):
        assert line in card.text.splitlines(), line


def test_the_card_of_a_training_run(checkpoint, tmp_path):
    """Its text stays, its base model and data are told; a section of an earlier publication is replaced."""
    (checkpoint / "provenance.json").unlink()
    (checkpoint / "voices.safetensors").unlink()
    table = "| base model | some/base |\n| training data | a.parquet, b.parquet |\n"
    training = f"<!-- training: start -->\n## Training\n{table}<!-- training: end -->"
    old = "<!-- publishing: start -->\nold\n<!-- publishing: end -->"
    (checkpoint / "README.md").write_text(f"# Mine\n\n{training}\n\n{old}\n\nThanks.\n", encoding="utf-8")
    publish(checkpoint, NAME, dry_run=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "some/base"
    assert card.data.license is None
    assert card.text.startswith(f"# Mine\n\n{training}\n\n<!-- publishing: start -->\n## Use it\n")
    assert card.text.endswith("<!-- publishing: end -->\n\nThanks.\n")
    assert "old" not in card.text.splitlines()
    for line in ("| licence | not stated |", "| base model | some/base |", "| datasets | a.parquet, b.parquet |"):
        assert line in card.text.splitlines()
    assert "## Voices" not in card.text
    assert 'voice="' not in card.text


def test_publishing_what_was_published_changes_nothing(staged, tmp_path):
    publish(staged, NAME, dry_run=tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(staged)


def test_shards_are_published_as_they_are(checkpoint, tmp_path):
    AutoModelForMultimodalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "shards", max_shard_size="10MB")
    (checkpoint / "model.safetensors").unlink()
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copyfile(path, checkpoint / path.name)
    publish(checkpoint, NAME, dry_run=tmp_path / "out")
    shards = {name: content for name, content in files_of(tmp_path / "out").items() if name.startswith("model")}
    assert len([name for name in shards if re.fullmatch(r"model-\d{5}-of-\d{5}.safetensors", name)]) == 3
    assert {name: files_of(checkpoint).get(name) for name in shards if not name.endswith(".py")} == {
        name: content for name, content in shards.items() if not name.endswith(".py")
    }


# --- Where the package is not installed


def test_it_gives_the_same_codes_where_the_package_cannot_be_imported(staged, answer, tmp_path):
    assert run(sys.executable, LOAD + GENERATE + SHOW, staged, folder=tmp_path, HF_HUB_OFFLINE="1") == answer


def distributions(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """Packages and all that they need, as they are installed here."""
    found, wanted = {}, list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if name not in found:
                found[name] = importlib.metadata.distribution(name)
                needed = map(Requirement, found[name].requires or [])
                wanted += [item.name for item in needed if not item.marker or item.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The Python of a new environment that has transformers, torch, torchaudio and what they need, and nothing else:
    their installed files, linked."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    for distribution in distributions("transformers", "torch", "torchaudio").values():
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site_packages / name).is_symlink():
                (site_packages / name).symlink_to(distribution.locate_file(name))
    return folder / "bin" / "python"


def test_it_gives_the_same_codes_with_transformers_torch_and_torchaudio_alone(staged, answer, bare_python, tmp_path):
    alone = """
import importlib.util
for name in ("minimind_o_hf", "soundfile", "PIL", "torchvision", "accelerate", "datasets"):
    assert importlib.util.find_spec(name) is None, name
"""
    program = alone + LOAD.replace('sys.modules["minimind_o_hf"] = None', "") + GENERATE
    more = """
import numpy
from transformers import AutoFeatureExtractor, AutoModel
for needs, make in {
    "soundfile": lambda: processor.save_audio(numpy.zeros(8), "answer.wav"),
    "pillow": lambda: processor(text="<|image_pad|>", images=numpy.zeros((3, 8, 8))),
}.items():
    try:
        make()
    except ImportError as error:
        assert str(error).endswith(f"pip install {needs}"), error
    else:
        raise AssertionError(needs)
features = processor(text="<|audio_pad|>", audio=numpy.zeros(16000))["input_features"]
processor.save_pretrained("saved")
encoder = AutoModel.from_pretrained(sys.argv[1], subfolder="speaker_encoder", trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1], subfolder="speaker_encoder", trust_remote_code=True)
assert [type(part).__name__ for part in (encoder, extractor)] == ["CamPlusPlusModel", "CamPlusPlusFeatureExtractor"]
assert features.shape[2] == 560
"""
    assert run(bare_python, program + more + SHOW, staged, folder=tmp_path, HF_HUB_OFFLINE="1") == answer
    kept = json.loads((tmp_path / "saved" / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    assert kept["size"] == {"height": 96, "width": 96}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_gives_the_same_codes_in_an_environment_that_pip_made(staged, answer, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("transformers", "torch", "torchaudio")]
    subprocess.run([environment / "bin" / "pip", "install", "--quiet", *versions], check=True)
    program = LOAD.replace('sys.modules["minimind_o_hf"] = None', "") + GENERATE + SHOW
    assert run(environment / "bin" / "python", program, staged, folder=tmp_path, HF_HUB_OFFLINE="1") == answer


# --- Uploads


def test_an_upload_is_one_commit_of_all_files(hub, staged, capsys):
    assert main(["publish", str(default_checkpoint()), NAME]) == 0
    repository = hub.repositories[NAME]
    assert repository.commits == ["initial commit", "Upload MiniMind-O checkpoint"]
    assert capsys.readouterr().out == f"{hub.url}/{NAME}/commit/{repository.sha}\n"
    assert not repository.private
    uploaded = dict(repository.files)
    uploaded.pop(".gitattributes")
    assert uploaded == files_of(staged)
    # The model in parts of 4 MB, its codec, its speaker encoder and its voices whole.
    large = [content for name, content in uploaded.items() if name.endswith(".safetensors")]
    assert sorted(map(len, hub.parts.values())) == sorted(
        -(-len(file) // 4_000_000) for file in large if len(file) > 4e6
    )
    assert len(hub.asked(r"PUT /lfs/\w+$")) == sum(len(file) <= 4e6 for file in large)


def test_what_is_on_the_hub_loads_from_there_and_its_snippet_runs(hub, staged, answer, tmp_path):
    hub.repositories[NAME] = Repository(files=files_of(staged))
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    assert run(sys.executable, LOAD + GENERATE + SHOW, NAME, folder=tmp_path, **environment) == answer
    snippet = re.search(r"## Use it\n\n```python\n(.*?)```", (staged / "README.md").read_text("utf-8"), re.DOTALL)[1]
    program = f'import sys\nsys.modules["minimind_o_hf"] = None\n{snippet}'
    assert run(sys.executable, program, folder=tmp_path, **environment)
    assert (tmp_path / "answer.wav").stat().st_size > 10_000


def test_private(hub):
    publish(default_checkpoint(), NAME, private=True)
    assert hub.repositories[NAME].private
    hub.repositories["somebody/open"] = Repository()
    with pytest.raises(ValueError, match="somebody/open is there and public"):
        publish(default_checkpoint(), "somebody/open", private=True)
    assert hub.repositories["somebody/open"].commits == ["initial commit"]


def test_publishing_again_replaces_the_model_and_keeps_documents(hub, checkpoint):
    publish(checkpoint, NAME)
    repository = hub.repositories[NAME]
    repository.files |= {"notes.md": b"kept", "pytorch_model.bin": b"old", "model-00001-of-00001.safetensors": b"old"}
    shutil.rmtree(checkpoint / "speaker_encoder")
    hub.requests.clear()
    publish(checkpoint, NAME)
    assert repository.commits[1:] == ["Upload MiniMind-O checkpoint"] * 2
    gone = {"pytorch_model.bin", "model-00001-of-00001.safetensors", "modeling_campplus.py"}
    assert not gone & set(repository.files)
    assert not [name for name in repository.files if name.startswith("speaker_encoder/")]
    assert repository.files["notes.md"] == b"kept"
    assert hub.asked("PUT") == []  # the large files were there


def test_publishing_the_same_again_makes_no_commit(hub):
    publish(default_checkpoint(), NAME)
    publish(default_checkpoint(), NAME)
    assert len(hub.repositories[NAME].commits) == 2


def test_a_repository_of_something_else_is_refused_unless_asked_for(hub):
    hub.repositories[NAME] = Repository(
        files={"README.md": b"---\ntags: minimind-o\n---\n", "model.safetensors": b"x"}
    )
    with pytest.raises(
        ValueError, match=r"somebody/nano is there, and was not published with minimind_o_hf.*--update"
    ):
        publish(default_checkpoint(), NAME)
    assert hub.repositories[NAME].commits == ["initial commit"]
    assert hub.objects == {}
    assert main(["publish", str(default_checkpoint()), NAME, "--update"]) == 0
    assert hub.repositories[NAME].commits == ["initial commit", "Upload MiniMind-O checkpoint"]


def test_a_dropped_connection_is_tried_again(hub):
    hub.faults = [(r"PUT /lfs/\w+/4", "drop")]
    publish(default_checkpoint(), NAME)
    assert len(hub.asked(r"PUT /lfs/\w+/4")) == 2
    assert len(hub.repositories[NAME].commits) == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((r"POST /api/models/.*/commit", "drop"), "run the same again, what has arrived is not sent a second time"),
        ((r"POST /api/models/.*/commit", 500), "run the same again, what has arrived is not sent a second time"),
        ((r"POST /api/models/.*/commit", 409), "somebody else changed it at the same time"),
        ((r"POST /api/models/.*/commit", 401), "log in with a token that may write there"),
    ],
)
def test_an_interrupted_upload_goes_on(hub, fault, said):
    hub.faults = [fault]
    with pytest.raises(OSError, match=f"^somebody/nano was not published .*{said}"):
        publish(default_checkpoint(), NAME)
    assert hub.repositories[NAME].commits == ["initial commit"]
    hub.requests.clear()
    publish(default_checkpoint(), NAME)  # into the empty repository that it left
    assert hub.asked("PUT") == []
    assert hub.repositories[NAME].commits == ["initial commit", "Upload MiniMind-O checkpoint"]


def test_an_upload_interrupted_among_the_large_files_sends_the_others(hub):
    hub.faults = [(r"PUT /lfs/\w+/3", 403)]
    with pytest.raises(OSError, match="use a token that may write there"):
        publish(default_checkpoint(), NAME)
    assert hub.repositories[NAME].commits == ["initial commit"]
    arrived = len(hub.objects)
    hub.requests.clear()
    publish(default_checkpoint(), NAME)
    assert len({request.split("/")[2] for request in hub.asked("PUT")}) == len(hub.objects) - arrived
    assert len(hub.repositories[NAME].commits) == 2


def test_without_a_token_nothing_is_made(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["publish", str(default_checkpoint()), NAME]) == 1
    assert "log in with a token that may write there (`hf auth login`)" in capsys.readouterr().err
    assert hub.repositories == {}


def test_a_repository_made_meanwhile_is_not_filled(hub):
    hub.faults = [("POST /api/repos/create", 409)]
    with pytest.raises(OSError, match="somebody else changed it at the same time"):
        publish(default_checkpoint(), NAME)
    assert hub.repositories == {}


def test_a_commit_made_meanwhile_is_not_overwritten(hub, monkeypatch):
    publish(default_checkpoint(), NAME)
    monkeypatch.setattr(Repository, "sha", property(lambda self: f"{next(numbers):040x}"))
    numbers = iter(range(1000))
    hub.repositories[NAME].files["README.md"] += b"changed"
    with pytest.raises(OSError, match=r"412.*somebody else changed it at the same time"):
        publish(default_checkpoint(), NAME)


# --- What is refused


def test_a_checkpoint_is_refused_before_anything_is_uploaded(hub, checkpoint, tmp_path):
    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            publish(checkpoint, NAME)
        assert hub.requests == []
        with pytest.raises(ValueError, match=match):
            publish(checkpoint, NAME, dry_run=tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["checkpoint"]
        return str(error.value)

    for name in ("training_args.bin", "checkpoint-5/optimizer.pt", "audio_tokenizer/model.pkl"):
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        assert name in refused(r"holds pickles, which can run code where they are read: .*\. Remove them")
        path.unlink()
    (checkpoint / "checkpoint-5").rmdir()
    for name in ("notes.txt", "remote.py", "audio_tokenizer/notes.txt", "model.gguf"):
        (checkpoint / name).write_bytes(b"")
        assert name in refused(r"holds files that are no part of a checkpoint: .*\. Move them")
        (checkpoint / name).unlink()
    edit(checkpoint / "config.json", num_hidden_layers=5)
    assert str(checkpoint) in refused(r"does not work, so it is not published: .*tensors")
    edit(checkpoint / "config.json", num_hidden_layers=4, hidden_size=128)
    refused("does not work, so it is not published: ")
    edit(checkpoint / "config.json", hidden_size=192, num_codebooks="many")
    refused("does not work, so it is not published: ")
    edit(checkpoint / "config.json", num_codebooks=8, model_type="llama")
    refused("of the model type 'llama', not a MiniMind-O model's")
    edit(checkpoint / "config.json", model_type="minimind-o")
    edit(checkpoint / "processor_config.json", image_token_len=64)
    refused("config.json has image_token_len 36, its processor_config.json 64")
    edit(checkpoint / "processor_config.json", image_token_len=36, audio_tokenizer_subfolder=None)
    refused("its processor_config.json names no codec")
    edit(checkpoint / "processor_config.json", audio_tokenizer_subfolder="audio_tokenizer")
    for name, broken in {"README.md": "---\n[\n---\n", "provenance.json": "{", "processor_config.json": "[]"}.items():
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_text(broken, encoding="utf-8")
        refused("does not work, so it is not published: ")
        (checkpoint / name).write_bytes(before)
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:-1000])
    refused("does not work, so it is not published: .* damaged or incomplete")
    tensors = load_file(default_checkpoint() / "model.safetensors")
    name = "talker.norm.weight"
    save_file(tensors | {name: tensors[name] * torch.nan}, checkpoint / "model.safetensors", {"format": "pt"})
    refused(f"its tensor {name} holds NaN or infinite values")
    (checkpoint / "model.safetensors").unlink()
    refused(r"lacks weights: model.safetensors\. Copy them there, or save the model again")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text("[]", encoding="utf-8")
    refused("is no index of shards")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}), encoding="utf-8")
    (checkpoint / shards[0]).write_bytes(whole)
    refused(f"lacks weights: {shards[1]}")
    (checkpoint / shards[1]).write_bytes(whole)
    (checkpoint / "model.safetensors").write_bytes(whole)
    refused("holds weights that do not belong together: model.safetensors")
    for path in (index, *(checkpoint / shard for shard in shards)):
        path.unlink()
    (checkpoint / "audio_tokenizer" / "model.safetensors").unlink()
    refused("audio_tokenizer lacks weights")
    (checkpoint / "config.json").unlink()
    refused("holds no config.json, so it is no checkpoint")


@pytest.mark.parametrize("name", ["nano", "a/b/c", "somebody/na no", "somebody/na--no", "somebody/nano.git", "", "/x"])
def test_a_name_that_is_none_is_refused(hub, name, capsys):
    assert main(["publish", str(default_checkpoint()), name]) == 1
    assert f"{name!r} is no name of a repository, which has the form OWNER/NAME" in capsys.readouterr().err
    assert hub.requests == []


def test_a_dry_run_does_not_overwrite(staged, tmp_path):
    before = files_of(staged)
    with pytest.raises(FileExistsError):
        publish(default_checkpoint(), NAME, dry_run=staged)
    assert files_of(staged) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_full_disk_leaves_nothing(tmp_path, dry_run):
    program = """
import resource, sys
from minimind_o_hf.cli import main
# A limit on the size of files, in place of a full disk: writing more fails all the same.
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
from minimind_o_hf import default_checkpoint
sys.exit(main(["publish", str(default_checkpoint()), *sys.argv[1:]]))
"""
    (tmp_path / "temporary").mkdir()
    with serve() as hub:
        done = subprocess.run(
            [sys.executable, "-c", program, NAME, *(["--dry-run", str(tmp_path / "out")] if dry_run else [])],
            env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            check=False,
        )
        assert hub.requests == []
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


# --- Parts


def test_push_to_hub_of_model_and_processor(hub, answer, tmp_path):
    """transformers' own, which carries the code too; what was in the config stays as it was."""
    model = AutoModelForMultimodalLM.from_pretrained(default_checkpoint())
    processor = AutoProcessor.from_pretrained(default_checkpoint())
    model.push_to_hub(NAME)
    processor.push_to_hub(NAME)
    assert len(hub.repositories[NAME].commits) == 3
    assert "auto_map" not in model.config.to_dict()
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    assert run(sys.executable, LOAD + GENERATE + SHOW, NAME, folder=tmp_path, **environment) == answer


# --- Adapters


ADAPTER = "somebody/adapter"
CONSENT = {"language": "en", "licence": "CC0-1.0", "consent": "The speaker agrees."}


@pytest.fixture
def base(hub):
    """nano as somebody has published it."""
    publish(default_checkpoint(), NAME)
    hub.requests.clear()
    return AutoModelForMultimodalLM.from_pretrained(NAME)


@pytest.fixture
def trained(base, tmp_path):
    """An adapter of it, with a voice, among what a training leaves."""
    folder = tmp_path / "trained"
    get_peft_model(base, lora_config("talker", rank=2, init_lora_weights=False)).save_pretrained(str(folder))
    library = VoiceLibrary(tmp_path / "mine.safetensors")
    library.add(Voice(spk_emb=torch.ones(192), name="me", **CONSENT))
    carry_voices(library, folder)
    for name in ("trainer_state.json", "run.json", "checkpoint-1/optimizer.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def codes_of(model):
    processor = AutoProcessor.from_pretrained(default_checkpoint())
    names = {"model": model.eval(), "processor": processor}
    exec(GENERATE, names)
    return names["outputs"].audio_codes


def test_an_adapter_is_published_with_its_base_and_its_voices(hub, trained, capsys):
    before = files_of(trained)
    assert main(["adapter", "push", str(trained), ADAPTER, "--private"]) == 0
    assert files_of(trained) == before
    repository = hub.repositories[ADAPTER]
    assert capsys.readouterr().out.strip() == f"{hub.url}/{ADAPTER}/commit/{repository.sha}"
    assert repository.private
    assert len(repository.commits) == 2
    sent = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base_model.json", "voices.safetensors"}
    assert set(repository.files) == {".gitattributes", *sent}
    config = json.loads(repository.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, hub.repositories[NAME].sha)
    card = ModelCard(repository.files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (NAME, "adapter", "peft")
    assert data["license"] == "apache-2.0"
    for told in (f'from_pretrained("{NAME}", revision="{hub.repositories[NAME].sha}")', "| me | en | CC0-1.0 |"):
        assert told in card.text
    assert str(trained) not in card.text

    adapted = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(NAME), str(trained))
    expected = codes_of(adapted)
    assert not torch.equal(expected, codes_of(AutoModelForMultimodalLM.from_pretrained(NAME)))
    names = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
    assert torch.equal(codes_of(names["model"]), expected)
    assert "me" in names["processor"].voices
    model = AutoModelForMultimodalLM.from_pretrained(NAME)
    model.load_adapter(ADAPTER)
    assert torch.equal(codes_of(model), expected)
    capsys.readouterr()
    assert main(["adapter", "info", ADAPTER, "--model", NAME]) == 0
    assert f"base: {NAME}, revision {hub.repositories[NAME].sha}" in capsys.readouterr().out


def test_an_adapter_merges_from_the_hub(hub, trained, tmp_path):
    publish_adapter(trained, ADAPTER)
    expected = codes_of(PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(NAME), str(trained)))
    assert main(["adapter", "merge", ADAPTER, str(tmp_path / "merged")]) == 0
    assert torch.equal(codes_of(AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged")), expected)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == [NAME, ADAPTER]
    assert card.data.license == "apache-2.0"
    # Its base came with its code, and so does it.
    said = run(sys.executable, LOAD + GENERATE + SHOW, tmp_path / "merged", folder=tmp_path)
    assert said.endswith(str(expected.tolist()))


def test_an_adapter_of_a_base_that_is_here_needs_its_name_on_the_hub(hub, base, tmp_path, capsys):
    local = AutoModelForMultimodalLM.from_pretrained(default_checkpoint())
    get_peft_model(local, lora_config("talker", rank=2)).save_pretrained(str(tmp_path / "local"))
    hub.requests.clear()
    assert main(["adapter", "push", str(tmp_path / "local"), ADAPTER]) == 1
    assert "--base OWNER/NAME" in capsys.readouterr().err
    assert ADAPTER not in hub.repositories
    dry = tmp_path / "dry"
    assert main(["adapter", "push", str(tmp_path / "local"), ADAPTER, "--base", NAME, "--dry-run", str(dry)]) == 0
    assert json.loads((dry / "base_model.json").read_text())["revision"] == hub.repositories[NAME].sha
    assert str(default_checkpoint()) not in "".join(path.read_text() for path in dry.glob("*.[jm]*"))
    assert ADAPTER not in hub.repositories
    assert main(["adapter", "push", str(tmp_path / "local"), ADAPTER, "--base", NAME]) == 0


def test_an_adapter_that_does_not_pass_is_not_published(hub, trained, tmp_path, capsys):
    def refused(match, *options):
        assert main(["adapter", "push", str(trained), ADAPTER, *options]) == 1
        assert re.search(match, capsys.readouterr().err)
        assert ADAPTER not in hub.repositories

    refused("holds no voices", "--voices", str(tmp_path / "none.safetensors"))
    tensors = load_file(trained / "voices.safetensors")
    save_file(tensors, trained / "voices.safetensors")  # without notes
    refused("no consent")
    (trained / "voices.safetensors").unlink()
    tensors = load_file(trained / "adapter_model.safetensors")
    save_file(tensors | {min(tensors): tensors[min(tensors)] * torch.nan}, trained / "adapter_model.safetensors")
    refused("NaN")
    save_file(tensors, trained / "adapter_model.safetensors")
    described = json.loads((trained / "base_model.json").read_text())
    edit(trained / "base_model.json", probe={name: [1.5, 2.5] for name in described["probe"]})
    refused(f"trained on {NAME}")
    edit(trained / "base_model.json", probe=described["probe"])
    refused("somebody/gone", "--base", "somebody/gone")
    (trained / "optimizer.pt").write_bytes(b"")
    refused("holds pickles")
    (trained / "optimizer.pt").unlink()
    files = dict(hub.repositories[NAME].files)
    for repository in (NAME, "somebody/copy"):
        hub.repositories["somebody/copy"] = Repository(files=files)
        assert main(["adapter", "push", str(trained), repository, "--update"]) == 1
        assert re.search("repository of its own|holds a checkpoint", capsys.readouterr().err)
        assert hub.repositories[repository].files == files
    hub.repositories[ADAPTER] = Repository(files={"weights.bin": b"other"})
    assert main(["adapter", "push", str(trained), ADAPTER]) == 1
    assert "--update" in capsys.readouterr().err
    assert len(hub.repositories[ADAPTER].commits) == 1
    assert main(["adapter", "push", str(trained), ADAPTER, "--update"]) == 0


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "load_adapter"])
def test_push_to_hub_of_an_adapter(hub, trained, wrapped):
    if wrapped:
        adapted = get_peft_model(
            AutoModelForMultimodalLM.from_pretrained(NAME), lora_config("talker", rank=2, init_lora_weights=False)
        )
    else:
        adapted = AutoModelForMultimodalLM.from_pretrained(NAME)
        adapted.load_adapter(str(trained))
    adapted.push_to_hub(ADAPTER, private=True)
    assert hub.repositories[ADAPTER].private
    files = hub.repositories[ADAPTER].files
    assert {"adapter_config.json", "adapter_model.safetensors", "base_model.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".py"))]
    described = json.loads(files["base_model.json"])
    assert (described["name"], described["revision"]) == (NAME, hub.repositories[NAME].sha)
    loaded = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(NAME), ADAPTER)
    assert torch.equal(codes_of(loaded), codes_of(adapted))


def test_push_to_hub_of_a_library_of_voices(hub, tmp_path):
    library = VoiceLibrary(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="holds no voices"):
        library.push_to_hub("somebody/voices")
    notes = {"language": "en", "licence": "CC0-1.0", "consent": "The speaker agrees {to it}."}
    library.add(Voice(spk_emb=torch.ones(192), name="me", **notes))
    url = library.push_to_hub("somebody/voices", private=True)
    repository = hub.repositories["somebody/voices"]
    assert url == f"{hub.url}/somebody/voices/commit/{repository.sha}"
    assert repository.private
    assert set(repository.files) == {".gitattributes", "README.md", "voices.safetensors"}
    card = ModelCard(repository.files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.tags) == ("cc0-1.0", ["en"], ["minimind-o", "voices"])
    assert "| me | en | CC0-1.0 | The speaker agrees {to it}. | not stated |" in card.text.splitlines()
    path = huggingface_hub.hf_hub_download("somebody/voices", "voices.safetensors")
    assert VoiceLibrary(path).voices() == library.voices()
    library.add(
        Voice(spk_emb=torch.ones(192), name="you", **notes | {"language": "plain English", "licence": "Mine."})
    )
    library.push_to_hub("somebody/voices")
    card = ModelCard(repository.files["README.md"].decode())
    assert (card.data.license, card.data.language) == ("other", ["en"])
    hub.repositories["somebody/other"] = Repository(files={"README.md": b"# Other"})
    with pytest.raises(ValueError, match="was not published with minimind_o_hf"):
        library.push_to_hub("somebody/other")
