"""``captum-cw attribute --data``: score the tokens of each text of a set.

The texts are cut into shards of consecutive texts, and each shard becomes one Parquet file.
Processes share the shards. Within a shard, texts of similar length are scored together.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_cw import measures
from captum_cw._utils.extras import imported
from captum_cw._utils.files import write_json
from captum_cw._utils.processes import Processes
from captum_cw._utils.progress import progress_bar
from captum_cw._utils.records import Records, differences
from captum_cw._utils.shards import Shards
from captum_cw._utils.versions import versions
from captum_cw.capture import Execution, UnsupportedModelError
from captum_cw.capture.model import device_of
from captum_cw.cli import choices
from captum_cw.cli.answer import Answer
from captum_cw.cli.output import load, observe_longest
from captum_cw.data import groups_by_length, numbered_texts, padded_batch
from captum_cw.explanation.batches import BatchScorer, ScoredText
from captum_cw.explanation.target import Question, masked_position, predicts
from captum_cw.functional import AttentionLayer, Reduction
from captum_cw.measures import Entry
from captum_cw.metrics.identity import described, fingerprint
from captum_cw.text.prompts import leading, read_text
from captum_cw.text.templates import encode
from captum_cw.text.tokens import readable_ids

#: Names in the output folder. Readers of Parquet folders skip names that start with "_".
RECORDS, SETTINGS = "_run.records", "_settings.json"

#: The column that says why a text has no scores.
ERROR = "error"


def run(options: Namespace) -> Answer | None:
    """Score a set of texts. Only the main process returns an answer."""
    started = time.monotonic()
    _check_usage(options)
    # What can fail quickly comes first.
    imported("pyarrow.parquet", "evaluate")
    processes = Processes()
    _check_writable(options.out)
    numbered = numbered_texts(options.data, samples=options.samples, lines=options.lines)
    model, tokenizer = load(options, options.model, processes)

    texts = _Texts.read(numbered, _Encoder(tokenizer, options), show=processes.is_main)
    entry, scorer = _scorer(options, model, tokenizer, texts)
    identity = _identity(options, model, entry, texts)
    given = {"model": options.model, "data": options.data}
    size = options.shard_size or choices.SHARD_SIZE
    parts = [texts.numbers[i : i + size] for i in range(0, len(texts.numbers), size)]
    shards = Shards(options.out, list(map(len, parts)), identity, given)
    with ExitStack() as stack:
        left = _begin(shards, {**given, **identity}, identity, processes, stack)
        todo = sum(shards.rows[number] for number in left)
        show = processes.is_main
        bar = stack.enter_context(progress_bar(todo, "Texts", show=show, unit=" texts"))

        def write_own(group: Sequence[int]) -> None:
            for number in group[processes.index : processes.index + 1]:
                rows = _rows(texts, parts[number], scorer, options, bar.update)
                shards.write(number, rows, _schema())

        for start in range(0, len(left), processes.count):
            group = left[start : start + processes.count]
            processes.gathered(partial(write_own, group))
            bar.update(sum(shards.rows[number] for number in group[1:]))  # of other processes
    if not processes.is_main:
        return None

    document = {
        **given,
        **{name: identity[name] for name in ("method", "reduction", "target", "contrast")},
        "texts": len(texts.numbers),
        "tokens": texts.tokens,
        "cut": texts.cut,
        "without_tokens": len(numbered) - len(texts.numbers),
        "failed": shards.count(ERROR),
        "finished_before": len(texts.numbers) - todo,
        "processes": processes.count,
        "seconds": round(time.monotonic() - started, 3),
        "folder": str(options.out),
        "files": [str(shards.path(number)) for number in range(len(parts))],
    }
    return Answer(document, partial(_show, document))


def _check_usage(options: Namespace) -> None:
    usage_error = options.parser.error
    if options.out is None:
        usage_error("--data needs a folder for the scores: give --out DIR")
    if options.out.suffix.lower() in choices.FILES:
        usage_error(
            f"--out {options.out} has the name of a file, and --data writes a folder: give --out "
            "DIR, or one text with --text or --file"
        )
    if options.out.exists() and not options.out.is_dir():
        usage_error(f"--out {options.out} is a file: give a folder")


def _check_writable(folder: Path) -> None:
    """Create the folder and a file in it, so that a disk that refuses them fails before the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out {folder} cannot be written ({error.strerror}): choose a folder that you may "
            "write to."
        ) from error


class _Encoder:
    """Turns a text into token ids, as ``attribute`` does for one text.

    Args:
        tokenizer: The tokenizer.
        options: The options of the command.
    """

    def __init__(self, tokenizer: Any, options: Namespace) -> None:
        self.tokenizer = tokenizer
        tokenizer.truncation_side = "right"  # a long text is cut at its end
        self.is_chat, self.template = options.chat, options.chat_template_kwargs
        self.length = options.length or choices.LENGTH

    def ids(self, number: int, text: str) -> tuple[Tensor, bool]:
        """Return the ids ``(T,)`` of a text, and whether it was cut."""
        if self.is_chat:
            read = read_text(
                self.tokenizer,
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                chat_template_kwargs=self.template,
            )
        else:
            read = encode(self.tokenizer, text)
        ids = read.ids[0]
        if len(ids) <= self.length:
            return ids, False
        if self.is_chat:
            raise ValueError(
                f"Text {number} has {len(ids)} tokens as a chat, and the end of a chat must not be "
                f"cut, because the answer follows it: use --length {len(ids)} or more."
            )
        cut = self.tokenizer(text, truncation=True, max_length=self.length).input_ids
        return torch.tensor(cut, dtype=torch.long, device="cpu"), True


@dataclass(frozen=True)
class _Texts:
    """The texts of a set that have tokens.

    Args:
        texts: The texts by number. They are tokenized again when they are scored, because the
            tokens of all texts may not fit into memory.
        numbers: The numbers of the texts, in their order.
        encoder: Turns a text into token ids.
        longest: The number of the longest text.
        tokens: The number of all tokens.
        cut: The number of texts that are cut.
        checksum: Identifies the numbers and tokens of all texts.
    """

    texts: dict[int, str]
    numbers: list[int]
    encoder: _Encoder
    longest: int
    tokens: int
    cut: int
    checksum: str

    @classmethod
    def read(cls, numbered: Sequence[tuple[int, str]], encoder: _Encoder, *, show: bool) -> _Texts:
        """Tokenize all texts once, and return those that have tokens."""
        digest = hashlib.sha256()
        lengths: dict[int, int] = {}
        cut = 0
        with progress_bar(len(numbered), "Tokenizing", show=show, unit=" texts") as bar:
            for number, text in numbered:
                ids, is_cut = encoder.ids(number, text)
                digest.update(f"{number} {ids.tolist()}".encode())
                cut += is_cut
                if len(ids):
                    lengths[number] = len(ids)
                bar.update()
        if not lengths:
            raise ValueError("No text of the set has a token: give other texts.")
        longest = max(lengths, key=lengths.__getitem__)
        tokens, checksum = sum(lengths.values()), digest.hexdigest()[:16]
        return cls(dict(numbered), list(lengths), encoder, longest, tokens, cut, checksum)

    def ids(self, number: int) -> tuple[Tensor, bool]:
        """Return the ids ``(T,)`` of a text, and whether it is cut."""
        return self.encoder.ids(number, self.texts[number])


def _scorer(
    options: Namespace, model: Any, tokenizer: Any, texts: _Texts
) -> tuple[Entry, BatchScorer]:
    """Return the measure, and what scores batches by it, after a pass over the longest text."""
    ids = texts.ids(texts.longest)[0][None].to(device_of(model))
    causal = True

    def look(execution: Execution, layer: AttentionLayer) -> None:
        nonlocal causal
        skipped, hidden = leading(execution, layer, ids.shape[1], None)
        causal &= ids.shape[1] == 1 or not layer.mask.sees(skipped, hidden + 1, layer.value.device)

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = observe_longest(model, batch, look)
    has_target = predicts(tokenizer, ids, output, causal=causal)
    by_default = options.target is not None or (has_target and options.reduction is None)
    entry = measures.find(options.method or (measures.TARGET if by_default else "contribution"))
    assert entry is not None  # the parser accepts only registered names
    if entry.explains_target and not has_target:
        raise ValueError(
            f"{type(model).__name__} predicts neither a token nor a class here: use --method "
            "contribution."
        )
    question = Question(options.target, options.contrast)
    reduction: Reduction = options.reduction or "mean"
    scorer = BatchScorer(model, tokenizer, entry, reduction, question, output, causal=causal)
    if scorer.needs_mask:
        for number in texts.numbers:
            if masked_position(tokenizer, texts.ids(number)[0][None]) is None:
                raise ValueError(
                    f"{type(model).__name__} predicts masked tokens, but text {number} does not "
                    f"have exactly one {tokenizer.mask_token!r}: put one into each text, or score "
                    "layers with --method contribution."
                )
    return entry, scorer


def _identity(options: Namespace, model: Any, entry: Entry, texts: _Texts) -> dict[str, Any]:
    """Return what the rows depend on."""
    return {
        "method": described(entry.name, model),
        "reduction": None if entry.explains_target else options.reduction or "mean",
        "target": options.target,
        "contrast": options.contrast,
        "chat": options.chat,
        "chat_template_kwargs": options.chat_template_kwargs,
        "dtype": options.dtype,
        "length": options.length or choices.LENGTH,
        "batch_tokens": options.batch_tokens or choices.BATCH_TOKENS,
        "shard_size": options.shard_size or choices.SHARD_SIZE,
        "texts": len(texts.numbers),
        "tokens": texts.tokens,
        "checksum of the tokens": texts.checksum,
        "checksum of the model": fingerprint(model),
        "versions": versions("captum"),
    }


def _begin(
    shards: Shards,
    settings: dict[str, Any],
    identity: dict[str, Any],
    processes: Processes,
    stack: ExitStack,
) -> list[int]:
    """Claim the folder for this run, and return the numbers of the unfinished shards."""
    for index, other in enumerate(processes.gathered(lambda: identity)):
        if other != identity:
            what = differences(other, identity)
            raise ValueError(
                f"Process {index} reads another model or other texts than process "
                f"{processes.index} ({what}): give all processes the same files and packages."
            )

    def claim() -> list[int]:
        left = shards.unfinished()
        # No other run writes to the folder as long as the file is open.
        stack.enter_context(Records(shards.folder / RECORDS, identity))
        write_json(shards.folder / SETTINGS, settings)
        return left

    def check_shared() -> None:
        if not (shards.folder / RECORDS).exists():
            raise FileNotFoundError(
                f"Process {processes.index} does not see the files of process 0 in "
                f"{shards.folder}: give a folder on a disk that all machines share."
            )

    left = processes.from_main(claim)
    processes.gathered(check_shared)
    return left


def _rows(
    texts: _Texts,
    numbers: Sequence[int],
    scorer: BatchScorer,
    options: Namespace,
    advance: Callable[[int], object],
) -> list[dict[str, Any]]:
    """Score the texts of a shard, batch by batch, and return their rows in their order."""
    read = {number: texts.ids(number) for number in numbers}
    lengths = [len(ids) for ids, _ in read.values()]
    rows: dict[int, dict[str, Any]] = {}
    for group in groups_by_length(lengths, options.batch_tokens or choices.BATCH_TOKENS):
        batch = {numbers[place]: read[numbers[place]][0] for place in group}
        for number, found in _scored(scorer, batch, keep_going=bool(options.keep_going)).items():
            ids, cut = read[number]
            rows[number] = {
                "number": number,
                "sha256": hashlib.sha256(texts.texts[number].encode()).hexdigest(),
                "tokens": readable_ids(scorer.tokenizer, ids),
                "ids": ids.tolist(),
                "cut": cut,
                **({ERROR: found} if isinstance(found, str) else _described(found)),
            }
        advance(len(group))
    return [rows[number] for number in numbers]


def _scored(
    scorer: BatchScorer, batch: dict[int, Tensor], *, keep_going: bool
) -> dict[int, ScoredText | str]:
    """Score the texts of a batch.

    Args:
        scorer: What scores them.
        batch: The ids of each text ``(T,)``, by its number.
        keep_going: Whether to go on if one of them cannot be scored.

    Returns:
        The scores by the number of the text, or the reason why it has none.
    """
    inputs = padded_batch(list(batch.values()), scorer.tokenizer)
    try:
        found = scorer.score({n: x.to(device_of(scorer.model)) for n, x in inputs.items()})
    except (UnsupportedModelError, MemoryError, torch.OutOfMemoryError) as error:
        B, T = inputs["input_ids"].shape
        unsupported = isinstance(error, UnsupportedModelError)
        hint = "" if unsupported else " Choose a smaller --batch-tokens."
        raise type(error)(
            f"A batch of {B} texts of up to {T} tokens could not be scored; the first is text "
            f"{next(iter(batch))}. {error}{hint}"
        ) from error
    except ValueError as error:
        if len(batch) > 1:  # some of them may be scored without the others
            rows: dict[int, ScoredText | str] = {}
            for number, ids in batch.items():
                rows |= _scored(scorer, {number: ids}, keep_going=keep_going)
            return rows
        if keep_going:
            return dict.fromkeys(batch, str(error))
        raise ValueError(
            f"Text {next(iter(batch))} could not be scored. {error} Give --keep-going to go on: "
            "the row of such a text then has this message instead of scores."
        ) from error
    return dict(zip(batch, found, strict=True))


def _described(text: ScoredText) -> dict[str, Any]:
    """Return the scores of a row and their target, which is None where there is none."""
    found: dict[str, Any] = {"scores": text.scores.tolist()}
    for role, probability in (("target", "probability"), ("contrast", "contrast_probability")):
        number = text.target.get(f"{role} probability")
        found[role] = text.target.get(role)
        found[probability] = None if number is None else float(number)
    return found


def _schema() -> Any:
    """Return the columns of a row."""
    arrow = imported("pyarrow", "evaluate")
    return arrow.schema(
        {
            "number": arrow.int64(),
            "sha256": arrow.string(),
            "tokens": arrow.list_(arrow.string()),
            "ids": arrow.list_(arrow.int32()),
            "scores": arrow.list_(arrow.float32()),
            "cut": arrow.bool_(),
            "target": arrow.string(),
            "probability": arrow.float32(),
            "contrast": arrow.string(),
            "contrast_probability": arrow.float32(),
            ERROR: arrow.string(),
        }
    )


def _show(document: dict[str, Any]) -> None:
    """Print the summary of a run."""
    lines = {
        "measure": document["method"],
        "texts": f"{document['texts']:,}",
        "finished by an earlier run": f"{document['finished_before']:,}",
        "cut at --length": f"{document['cut']:,}",
        "left out, without tokens": f"{document['without_tokens']:,}",
        "not scored, see the column 'error'": f"{document['failed']:,}",
        "tokens": f"{document['tokens']:,}",
        "seconds": f"{document['seconds']:.1f}, loading included",
        "folder": f"{document['folder']} ({len(document['files']):,} Parquet files)",
    }
    for name, value in lines.items():
        if value != "0":
            print(f"{name}: {value}")
