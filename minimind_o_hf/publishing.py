"""Publishing on the Hub: a checkpoint is checked, gets its code and a model card, and is uploaded in one commit."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import custom_object_save

from . import modeling, processing
from .files import new_directory
from .model_card import MARKER, build_card, build_voices_card
from .modeling import CamPlusPlusModel, MiniMindOConfig, MiniMindOForConditionalGeneration
from .packaged import HELD_OUT_VOICES, SPEAKER_ENCODER
from .processing import CamPlusPlusFeatureExtractor, MiniMindOProcessor
from .processing.processing_minimind_o import AUDIO_TOKENIZER_FOLDER
from .processing.voices_minimind_o import VOICES_NAME
from .voices import VoiceLibrary

INDEX = "model.safetensors.index.json"
_WEIGHTS = r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
_PART = rf"{_WEIGHTS}|config\.json|generation_config\.json|preprocessor_config\.json"
_PARTS = f"{AUDIO_TOKENIZER_FOLDER}|{SPEAKER_ENCODER}"
_TOKENIZER = r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
_OTHERS = rf"processor_config\.json|chat_template\.jinja|{VOICES_NAME}|{HELD_OUT_VOICES}|provenance\.json"
_DOCUMENTS = r"README\.md|LICENSE(\.\w+)?|NOTICE(\.\w+)?|training_curves\.png"
CHECKPOINT_FILES = re.compile(rf"(({_PARTS})/)?({_PART})|{_TOKENIZER}|{_OTHERS}|{_DOCUMENTS}")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
# What an earlier publication left of these would be loaded, in place of what is there now or beside it.
REPLACED = {*PICKLES, ".safetensors", ".json", ".jinja", ".py"}
PROBE_TOKENS = 16

ADVICE = {
    401: "log in with a token that may write there (`hf auth login`)",
    403: "use a token that may write there (`hf auth login`)",
    404: "the owner of the repository must exist, and the token must see it (`hf auth login`)",
    409: "somebody else changed it at the same time: look at it, and publish again",
    412: "somebody else changed it at the same time: look at it, and publish again",
}
AGAIN = "run the same again, what has arrived is not sent a second time"


def publish(
    directory: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    update: bool = False,
    dry_run: str | os.PathLike | None = None,
) -> str:
    """
    Publishes a checkpoint: checks it, adds model card and code, and uploads it in one commit.

    Args:
        directory (`str` or `os.PathLike`): A complete checkpoint in safetensors; it is not changed.
        repo_id (`str`): OWNER/NAME on the Hub; made where it is not there.
        private (`bool`, defaults to `False`): Make a private repository.
        update (`bool`, defaults to `False`): Publish into a repository that something else filled.
        dry_run (`str` or `os.PathLike`, *optional*): Write what would be uploaded to this new directory instead.

    Returns:
        `str`: The commit's URL, or the directory of a dry run.

    Raises:
        ValueError: A name that is none, a checkpoint or a repository that does not pass. Nothing is uploaded then.
        OSError: The disk is full, or the Hub refuses or cannot be reached. No commit is made then.
    """
    check_name(repo_id)
    if dry_run is not None:
        return str(stage(directory, repo_id, dry_run))
    with tempfile.TemporaryDirectory(prefix="minimind-o-") as scratch:
        staged = stage(directory, repo_id, Path(scratch) / "staged")
        return upload(staged, repo_id, private, update, message="Upload MiniMind-O checkpoint")


def publish_voices(library: VoiceLibrary, repo_id: str, private: bool = False, update: bool = False) -> str:
    """Publishes a library of voices with a card that tells their licences and consents; arguments, result and errors
    as [`publish`]."""
    check_name(repo_id)
    with tempfile.TemporaryDirectory(prefix="minimind-o-") as scratch:
        staged = Path(scratch)
        if not (voices := library.voices()):
            raise ValueError(f"{library.path} holds no voices: add one first")
        shutil.copyfile(library.path, staged / VOICES_NAME)
        (staged / "README.md").write_text(build_voices_card(voices, repo_id), encoding="utf-8")
        return upload(staged, repo_id, private, update, message="Upload voices")


# ---- what is published ----


def stage(directory: str | os.PathLike, repo_id: str, target: str | os.PathLike) -> Path:
    """
    Makes the directory that [`publish`] uploads: a copy, checked, that carries its code and a model card.

    Args:
        directory, repo_id: As [`publish`].
        target (`str` or `os.PathLike`): The directory to make; after an error nothing of it is left.

    Returns:
        `Path`: `target`.

    Raises:
        ValueError: The checkpoint does not pass.
        OSError: It cannot be copied, or `target` stands there already.
    """
    folder = Path(directory).expanduser()
    files = _checkpoint_files(folder)
    with new_directory(target) as staged:
        for file in files:
            (staged / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / file, staged / file)
        try:
            model, processor = _load(staged)
            _check_fit(model, processor)
            check_answer(model, processor)
            card = build_card(staged, repo_id, model)
        except Exception as error:  # what a broken file makes of itself depends on where it is broken
            reason = str(error).replace(str(staged), str(folder))
            raise ValueError(f"{folder} does not work, so it is not published: {reason}") from error
        model.save_code(staged)
        processor.save_code(staged)
        if (staged / SPEAKER_ENCODER).is_dir():
            _save_speaker_code(staged)
        (staged / "README.md").write_text(card, encoding="utf-8")
    return Path(target)


def _checkpoint_files(folder: Path) -> list[str]:
    """The files of a checkpoint, relative to its folder; `ValueError` where there are others, or some are missing."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no checkpoint: give a directory that holds one")
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    # What is hidden stays: caches, and what an interrupted training left.
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        raise ValueError(
            f"{folder} holds pickles, which can run code where they are read: {_some(pickles)}. Remove them; "
            "`minimind-o convert` makes safetensors of weights."
        )
    code = {path.name for package in (modeling, processing) for path in Path(package.__path__[0]).glob("*.py")}
    files = [name for name in names if name not in code]  # of an earlier publication; it is written anew
    if stray := [name for name in files if not CHECKPOINT_FILES.fullmatch(name)]:
        raise ValueError(
            f"{folder} holds files that are no part of a checkpoint: {_some(stray)}. Move them elsewhere."
        )
    for part in ("", AUDIO_TOKENIZER_FOLDER, SPEAKER_ENCODER):
        if part != SPEAKER_ENCODER or (folder / part).is_dir():
            _check_weights(folder / part)
    return files


def _check_weights(folder: Path) -> None:
    """Whole weights, or all shards that an index names, and no others."""
    found = {path.name for path in folder.glob("model*.safetensors")}
    wanted = {"model.safetensors"}
    if (folder / INDEX).is_file():
        try:
            wanted = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is no index of shards: {error!r}. Save the model again.") from error
    if missing := wanted - found:
        raise ValueError(f"{folder} lacks weights: {_some(missing)}. Copy them there, or save the model again.")
    if surplus := found - wanted:
        raise ValueError(f"{folder} holds weights that do not belong together: {_some(surplus)}. Remove the old ones.")


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _load(folder: Path) -> tuple[MiniMindOForConditionalGeneration, MiniMindOProcessor]:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != MiniMindOConfig.model_type:
        raise ValueError(f"its config.json is of the model type {kind!r}, not a MiniMind-O model's")
    model = MiniMindOForConditionalGeneration.from_pretrained(folder)
    processor = MiniMindOProcessor.from_pretrained(folder)
    if processor.audio_tokenizer is None:
        raise ValueError("its processor_config.json names no codec: save the processor with one")
    for part in (model, processor.audio_tokenizer):
        for name, tensor in part.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"its tensor {name} holds NaN or infinite values: train or convert it again")
    return model, processor


def _check_fit(model: MiniMindOForConditionalGeneration, processor: MiniMindOProcessor) -> None:
    """`ValueError` where model and processor are not of one checkpoint."""
    config: Any = model.config
    for name in ("num_codebooks", "audio_codebook_size", "image_token_len"):
        if getattr(config, name) != getattr(processor, name):
            raise ValueError(
                f"its config.json has {name} {getattr(config, name)}, its processor_config.json "
                f"{getattr(processor, name)}: use those of one checkpoint"
            )
    if len(processor.tokenizer) > config.vocab_size:
        raise ValueError(
            f"its tokenizer has {len(processor.tokenizer)} tokens, its model {config.vocab_size}: use those of one "
            "checkpoint"
        )


def check_answer(model: MiniMindOForConditionalGeneration, processor: MiniMindOProcessor) -> None:
    """Has it answer a few tokens, aloud; what fails there raises."""
    chat = [{"role": "user", "content": "Hello"}]
    inputs: Any = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, voice=min(processor.voices, default=None)
    )
    outputs = model.generate(**inputs, max_new_tokens=PROBE_TOKENS, do_sample=False, return_dict_in_generate=True)
    audio = processor.decode(outputs)[0].audio
    if audio is None or not audio.isfinite().all():
        raise ValueError("it does not speak: use a codec and a generation_config.json that suit the model")


def _save_speaker_code(staged: Path) -> None:
    # transformers looks for code at a repository's root, also for what is in a subfolder.
    for made, auto_class, name in (
        (CamPlusPlusModel, "AutoModel", "config.json"),
        (CamPlusPlusFeatureExtractor, "AutoFeatureExtractor", "preprocessor_config.json"),
    ):
        part: Any = made.from_pretrained(staged / SPEAKER_ENCODER)
        custom_object_save(part, staged)
        path = staged / SPEAKER_ENCODER / name
        content = json.loads(path.read_text(encoding="utf-8"))
        content["auto_map"] = {auto_class: f"{made.__module__.rpartition('.')[2]}.{made.__name__}"}
        if name == "config.json":
            config = type(part.config)
            content["auto_map"]["AutoConfig"] = f"{config.__module__.rpartition('.')[2]}.{config.__name__}"
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- the Hub ----


def upload(folder: Path, repo_id: str, private: bool, update: bool, message: str) -> str:
    """
    Uploads a folder as the content of a repository, in one commit; other documents that lie there are left.

    Args:
        folder (`Path`): What to upload, with a `README.md` that has the marker.
        repo_id, private, update: As [`publish`].
        message (`str`): Of the commit.

    Returns:
        `str`: The commit's URL.

    Raises:
        ValueError: The repository is not one to publish into.
        OSError: The Hub refuses or cannot be reached.
    """
    api = HfApi(library_name="minimind_o_hf", library_version=version("minimind_o_hf"))
    with _hub_errors(repo_id):
        try:
            found = api.model_info(repo_id)
        except RepositoryNotFoundError:
            found = None
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    there = [sibling.rfilename for sibling in found.siblings or []] if found else []
    if found is not None:
        _check_repository(repo_id, found, there, files, private, update)
    stale = [name for name in there if name not in files and Path(name).suffix in REPLACED]
    operations = [CommitOperationAdd(name, folder / name) for name in files]
    operations += [CommitOperationDelete(name) for name in stale]
    with _hub_errors(repo_id):
        if found is None:
            api.create_repo(repo_id, private=private)
        commit = api.create_commit(
            repo_id, operations, commit_message=message, parent_commit=found.sha if found else None
        )
    return str(commit.commit_url)


def check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError("it lacks the owner")
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository, which has the form OWNER/NAME: {error}") from error


def _check_repository(
    repo_id: str, found: Any, there: list[str], files: list[str], private: bool, update: bool
) -> None:
    """`ValueError` where a repository that is there is not one to publish into."""
    kinds = {"config.json": "a checkpoint", "adapter_config.json": "an adapter", VOICES_NAME: "voices"}
    held, own = (next((kinds[name] for name in kinds if name in names), None) for names in (there, files))
    if held is not None and held != own:
        raise ValueError(f"{repo_id} holds {held}, and this is {own}: give another name")
    if private and not found.private:
        raise ValueError(f"{repo_id} is there and public: make it private in its settings, or give another name")
    is_ours = MARKER in (found.card_data.to_dict() if found.card_data else {})
    # An interrupted upload leaves a repository without files.
    if set(there) - {".gitattributes"} and not is_ours and not update:
        raise ValueError(
            f"{repo_id} is there, and was not published with minimind_o_hf: give another name, or replace its model "
            "(`--update`, or `update=True`)"
        )


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into an `OSError` that says what to do."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # the client's exceptions differ between versions of huggingface_hub
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status: Any = getattr(getattr(cause, "response", None), "status_code", None)
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise OSError(f"{repo_id} was not published ({reason}): {ADVICE.get(status, AGAIN)}.") from error


__all__ = ["publish", "publish_voices", "stage", "upload"]
