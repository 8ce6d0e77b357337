"""Find a model's files: a directory, a Hub id, or the bundled SmolLM2. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import read_json_object
from trim_lightning.privacy.local import read_local, with_local
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store
from trim_lightning.store.keys import digest_of
from trim_lightning.store.receipt import RECEIPT
from trim_lightning.store.versions import coarse_versions

BUNDLED, BUNDLED_NAME = "bundled:smollm2_135m", "smollm2_135m"
ADAPTER_CONFIG = "adapter_config.json"
FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
KINDS = ("layer_types", "layers_block_type")  # lists of what each layer is
MOST_LAYERS = 10_000  # building more would take a machine's time and memory before any weight is read
CODE = ("*.py",)  # part of the model where it is run


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        directory: Folder with config, safetensors weights and tokenizer.
        digest: sha256 over the contents of those files: two copies of one model share it.
        name: What to call it in manifests and tables; never a full path.
        num_layers: Attention layers.
        max_positions: Tokens of the longest sequence that the model takes, or None if it does not say.
        vocabulary: Rows of its input embedding, or None if it does not say or an adapter may have added some.
        trust_remote_code: Run the folder's own Python code.
        device_map: Passed to ``from_pretrained``.
        quantize: Bits of the linear layers' weights, ``4bit`` or ``8bit``; None leaves them as they are.
        chat_template: Text of a chat template that replaces the tokenizer's, or None.
        adapters: Folders of adapters on top of those weights, the first trained first.
        base: What `describe` says of the model beneath the last of them.
    """

    directory: Path
    digest: str
    name: str
    num_layers: int
    max_positions: int | None = None
    vocabulary: int | None = None
    trust_remote_code: bool = False
    device_map: str | None = None
    quantize: str | None = None
    chat_template: str | None = None
    adapters: tuple[Path, ...] = ()
    base: Mapping[str, Any] | None = None

    @property
    def tokenizer_directory(self) -> Path:
        """Folder with the tokenizer: that of the last adapter that brings one."""
        brought = [folder for folder in self.adapters if (folder / "tokenizer_config.json").is_file()]
        return (self.directory, *brought)[-1]

    def describe(self) -> dict[str, Any]:
        """Name and checksum, for a manifest; of an adapter those of its base model too."""
        own = {"name": self.name, "sha256": self.digest}
        return own if self.base is None else {**own, "base_model": dict(self.base)}

    def check_layers(self, num_layers: int) -> None:
        """Refuse to read more layers than there are.

        Raises:
            UserError: naming the model's number of layers.
        """
        if num_layers > self.num_layers:
            raise UserError(
                f"saliency.num_layers={num_layers}: {self.name} has only {self.num_layers} layers; "
                f"ask for at most {self.num_layers}"
            )


def find_model(settings: ModelSettings, store: Store, above: tuple[Path, ...] = ()) -> ModelSource:
    """Locate, check and identify the model, downloading or converting it if needed.

    Args:
        settings: What names it.
        store: For a converted model and checksums.
        above: Folders of the adapters whose base model it is.

    Raises:
        UserError: no such model, gated or absent weights, not a model folder, pickled weights only, or an adapter
            whose base model cannot be found.
    """
    directory, name = locate(settings, store)
    if (directory / ADAPTER_CONFIG).is_file():
        return find_adapted(settings, directory, name, store, above)
    if settings.base is not None:
        raise UserError(
            f"model.base={settings.base}: model.path={settings.path} is no adapter's folder; leave model.base out"
        )
    config = read_config(directory, settings)
    return ModelSource(
        directory=directory,
        digest=digest_directory(directory, store, wanted_files(settings)),
        name=name,
        num_layers=config_layers(config, directory),
        max_positions=config_number(config, "max_position_embeddings", "n_positions", "max_seq_len"),
        vocabulary=config_number(config, "vocab_size"),
        trust_remote_code=settings.trust_remote_code,
        device_map=settings.device_map,
        quantize=settings.quantize,
        chat_template=read_template(settings.chat_template),
    )


def locate(settings: ModelSettings, store: Store) -> tuple[Path, str]:
    """Folder and name of what ``model.path`` names, downloaded or converted if needed."""
    if settings.path == BUNDLED:
        from trim_lightning.models.bundled import bundled_directory

        return bundled_directory(store), BUNDLED_NAME
    if is_local(settings.path):
        directory = Path(settings.path).expanduser()
        return directory, directory.resolve().name
    return download(settings), settings.path


def find_adapted(
    settings: ModelSettings, adapter: Path, name: str, store: Store, above: tuple[Path, ...]
) -> ModelSource:
    """The base model of an adapter's folder, itself an adapter perhaps, with the adapter on top.

    Raises:
        UserError: if the folder is a model's as well, or the base model cannot be found.
    """
    where = f"model.path={settings.path}"
    if (adapter / "config.json").is_file() and any(adapter.glob("model*.safetensors")):
        raise UserError(
            f"{where}: holds both a model and an adapter ({ADAPTER_CONFIG}); give a folder with one of them: the model "
            "as it is, or the adapter, whose base model is then found"
        )
    if settings.quantize is not None:
        raise UserError(
            f"model.quantize={settings.quantize}: {where} is an adapter, which goes into whole weights; merge it with "
            "PEFT's merge_and_unload and give the merged model, or leave model.quantize out"
        )
    try:
        named = read_json_object(adapter / ADAPTER_CONFIG)
    except ValueError as error:
        raise UserError(f"{where}: {ADAPTER_CONFIG} is {error}") from None
    recorded = recorded_base(adapter, store) if settings.base is None else None
    if settings.base is not None:
        beneath: dict[str, Any] = {"path": settings.base, "revision": None, "base": None}
    else:
        beneath = named_base(adapter, named) if recorded is None else recorded[0]
    path = beneath["path"]
    try:
        if not path:
            raise UserError("the adapter names none")
        if adapter.resolve() in above:
            raise UserError("the adapter names itself")
        base = find_model(replace(settings, **beneath), store, (*above, adapter.resolve()))
    except UserError as error:
        reason = str(error).removeprefix(f"model.path={path}: ")
        raise UserError(
            f"{where}: an adapter whose base model {path or ''} cannot be had ({reason}); set model.base to its "
            "directory or Hub id"
        ) from None
    if recorded is not None and base.digest != recorded[1]:
        raise UserError(
            f"{where}: its base model {base.name} has changed since the adapter was trained on it; set model.base to "
            "the one to use"
        )
    digest = digest_of([base.digest, digest_directory(adapter, store), coarse_versions(["peft"])])
    return replace(base, digest=digest, name=name, adapters=(*base.adapters, adapter), base=base.describe())


def named_base(adapter: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the `ModelSettings` by which an adapter's config names its base model; the path is empty if it does not.

    A directory may be relative to the adapter.
    """
    path, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if path == BUNDLED_NAME:
        path = BUNDLED
    elif not Path(path).is_absolute() and path and (adapter / path).is_dir():
        path = str((adapter / path).resolve())
    return {"path": path, "revision": revision, "base": None}


def recorded_base(adapter: Path, store: Store) -> tuple[dict[str, Any], str] | None:
    """The same, and the base model's checksum, from the training run that an adapter lies in.

    Our adapters name a local base model without its path, and the run knows that. None if the adapter lies in no run,
    or in that of another adapter, or if its base model is not where it was.
    """
    try:
        manifest = read_json_object(adapter.parent / "manifest.json")
        weights = adapter / "adapter_model.safetensors"
        if manifest["adapter"][weights.name] != store.file_digest(weights):
            return None
        config = with_local(manifest["config"], read_local(adapter.parent))
        model, trainee = config["model"], config["train"]
        if trainee["model"] is None:
            found = {"path": model["path"], "revision": model["revision"], "base": model["base"]}
        else:
            found = {"path": trainee["model"], "revision": None, "base": trainee["base"]}
        checksum = str(manifest["inputs"]["trainee"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    there = found["path"] == BUNDLED or Path(str(found["path"])).expanduser().is_dir()
    return (found, checksum) if there else None


def is_local(path: str) -> bool:
    """True if the text names a directory rather than a Hub id (``name`` or ``owner/name``)."""
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
    return looks_like_path or Path(path).exists()


def read_config(directory: Path, settings: ModelSettings) -> dict[str, Any]:
    """Read ``config.json`` of a model folder and check that its weights can be loaded safely."""
    where = f"model.path={settings.path}"
    if not directory.exists():
        raise UserError(f"{where}: no such directory; give a model directory or a Hub id such as owner/name")
    if not directory.is_dir():
        raise UserError(f"{where}: is a file; give the directory that holds config.json and *.safetensors")
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{where}: is no model directory (it has no config.json)")
    try:
        config = read_json_object(file)
    except ValueError as error:
        raise UserError(f"{where}: config.json is {error}") from None
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        why = "only pickled weights, which can run code when loaded" if pickled else "no *.safetensors weights"
        raise UserError(f"{where}: has {why}; save the model again with save_pretrained (safetensors)")
    if config.get("auto_map") and not settings.trust_remote_code:
        raise UserError(
            f"{where}: wants to run its own Python code (auto_map); set model.trust_remote_code=true if you trust it"
        )
    return config


def config_layers(config: dict[str, Any], directory: Path) -> int:
    """Number of attention layers that a model config declares."""
    layers = config_number(config, *LAYERS) or len(config_kinds(config)) or None
    if layers is None:
        raise UserError(f"model.path: {directory.name}/config.json does not say how many layers the model has")
    if layers > MOST_LAYERS:
        raise UserError(f"model.path: {directory.name}/config.json speaks of {layers} layers; no model has so many")
    return layers


def config_kinds(config: dict[str, Any]) -> list[str]:
    """What each layer is, as a model config names it, also inside a multimodal model's text config; empty if it says
    nothing."""
    for part in (config, config.get("text_config")):
        for name in KINDS:
            kinds = part.get(name) if isinstance(part, dict) else None
            if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
                return kinds
    return []


def config_number(config: dict[str, Any], *names: str) -> int | None:
    """The first positive integer under one of these names, also inside a multimodal model's text config."""
    parts: list[dict[str, Any]] = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for name in names:
            if isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None


def wanted_files(settings: ModelSettings) -> tuple[str, ...]:
    """Patterns of the files that make a model what it is."""
    return FILES + CODE if settings.trust_remote_code else FILES


def digest_directory(directory: Path, store: Store, patterns: tuple[str, ...] = FILES) -> str:
    """sha256 over names and contents of the files that make a model what it is."""
    found = {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}
    files = sorted(file for file in found if file.name != RECEIPT)  # the store's own note is no part of the model
    return digest_of([[file.name, store.file_digest(file)] for file in files])


def read_template(path: str | None) -> str | None:
    """Text of the chat template file, if one is set."""
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template={path}: cannot be read ({type(error).__name__})") from None


def download(settings: ModelSettings) -> Path:
    """The local snapshot of a Hub model; already downloaded files are not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"model.path={settings.path}"
    advice = (
        "give a model directory instead (model=hf model.path=DIR), or use model=smollm2_135m, which needs no network"
    )
    try:
        patterns = list(wanted_files(settings))
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{where}: neither a directory nor a Hub id (owner/name)") from None
    except GatedRepoError:
        raise UserError(
            f"{where}: the weights are gated; accept the licence on the model's Hub page and set HF_TOKEN, or {advice}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{where}: has no revision {settings.revision}; check model.revision") from None
    except RepositoryNotFoundError:
        raise UserError(f"{where}: no such model on the Hub (or it is private: set HF_TOKEN); {advice}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        raise UserError(f"{where}: not on this disk, and the Hub cannot be reached ({reason}); {advice}") from None
