"""The commands, their options and their help.

This module does not import torch, so help texts and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import shtab

from captum_cw import __version__, measures
from captum_cw._utils.suggestions import suggestion
from captum_cw.cli import choices

#: The message of argparse about an unknown choice.
WRONG_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")
MODEL = "a hub id, a local folder or a .gguf file"
DATA = f"{', '.join(choices.DATA)}, a .txt, .jsonl, .json, .csv or .parquet file, or a folder"

DESCRIPTION = """\
Find out which tokens made a transformer's output, with contribution weights and
attention-based measures."""
EPILOG = """\
Results go to standard output; progress and messages go to standard error. Every
command prints JSON with --json; docs/command_line.md lists the keys.

exit codes:
  0    success
  1    failure, reported in one line (--debug shows the stack trace)
  2    wrong usage
  130  interrupted; attribute --data, evaluate and reproduce resume when you run
       them again
  141  the reader of a pipe has closed it; files are still written

completion, for bash, zsh, fish, tcsh or powershell:
  eval "$(captum-cw --print-completion bash)"      in ~/.bashrc
  captum-cw --print-completion fish > ~/.config/fish/completions/captum-cw.fish

examples:
  captum-cw demo
  captum-cw attribute --model M --text "The capital of France is" --target " Paris" \\
      --contrast " Rome"
  captum-cw COMMAND --help"""


class UsageError(Exception):
    """A command was called in a wrong way.

    Args:
        message: What is wrong, and what to do instead.
        parser: The parser of the command.
    """

    def __init__(self, message: str, parser: argparse.ArgumentParser) -> None:
        super().__init__(message)
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, and suggests the choice that was probably meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        wrong = WRONG_CHOICE.search(message)
        if wrong is not None:
            message += "." + suggestion(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        raise UsageError(message, self)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; documentation and completion use it too.

    Example:
        >>> parser().parse_args(["demo", "--text", "The capital of France is"]).command
        'demo'
    """
    main = _Parser(prog="captum-cw", description=DESCRIPTION, epilog=EPILOG)
    main.add_argument("--version", action="version", version=__version__)
    shtab.add_argument_to(main, help="print a completion script for this shell and exit")
    commands = main.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_attribute(commands)
    _add_evaluate(commands)
    _add_reproduce(commands)
    _add_models(commands)
    _add_demo(commands)
    return main


def _command(commands: Any, name: str, short: str, description: str, examples: str) -> _Parser:
    """Add a command. Its module in :mod:`captum_cw.cli` has the same name.

    The first line of the description is shown by completion.
    """
    epilog = f"examples:\n{examples}"
    command: _Parser = commands.add_parser(name, help=short, description=description, epilog=epilog)
    command.set_defaults(command=name, parser=command)
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return command


def _add(to: Any, option: str, text: str, complete: Any = None, **settings: Any) -> None:
    """Add an option, such as ``"--samples N"``. The help text ends with the default, if any.

    Args:
        to: The parser or group.
        option: The name, and the placeholder of the value if it has one.
        text: The help text.
        complete: What shtab completes the value with.
        settings: Further arguments of ``add_argument``.
    """
    name, _, metavar = option.partition(" ")
    if metavar:
        settings["metavar"] = metavar
    if settings.get("default") is not None:
        text += " (default: %(default)s)"
    action = to.add_argument(name, help=text, **settings)
    if complete is not None:
        action.complete = complete


def _one_of(names: Iterable[str]) -> Any:
    """Complete one of these names, where more may follow. Fish needs one name per line."""
    return shtab.cmd(rf"printf '%s\n' {' '.join(names)}")


def _add_loading(to: Any) -> None:
    """Add the options that say how a model is loaded."""
    _add(to, "--dtype", "data type of the weights", choices=choices.DTYPES, default="float32")
    device = "a torch device such as cuda; auto spreads the layers over all devices; with "
    device += "torchrun, each process takes its own GPU, or the CPU if there is none"
    _add(to, "--device", device, default="cpu")


def _add_tasks(to: Any, text: str) -> None:
    _add(to, "--tasks A,B", text, type=_words)
    _add(to, "--task-path DIR", "folder with your own task files", shtab.DIR, type=Path)


def _add_template_arguments(to: Any, needed: str) -> None:
    text = f"arguments for the chat template, as a JSON object (only with {needed})"
    _add(to, "--chat-template-kwargs JSON", text, type=_json_object)


def _add_attribute(commands: Any) -> None:
    command = _command(
        commands,
        "attribute",
        "score the tokens of a text, or of a set of texts",
        """\
Score the tokens of a text, or the tokens of a prompt for a given output.
With --data, score each text of a set, and save the scores as Parquet files. A run
resumes if its folder contains an unfinished run with the same settings. With
torchrun, processes share the files (docs/howto/many_texts.md).""",
        """\
  captum-cw attribute --model M --file story.txt --out page.html
  captum-cw attribute --model M --text "The capital of France is" --target " Paris" \\
      --contrast " Rome"
  captum-cw attribute --model M --chat --text "Hi" --chat-template-kwargs '{"x": 1}'
  captum-cw attribute --model M --text "Ice is cold" --json > scores.json
  captum-cw attribute --model M --data texts.jsonl --out scores""",
    )
    _add(command, "--model M", MODEL, shtab.FILE, required=True)
    _add_loading(command)
    text = command.add_mutually_exclusive_group(required=True)
    _add(text, "--text T", "the text", type=utf8_text)
    _add(text, "--file F", "a UTF-8 file that contains the text", shtab.FILE, type=Path)
    _add(text, "--data D", f"a set of texts: {DATA}", shtab.FILE)
    target = "the word or class to explain (default: what the model predicts)"
    _add(command, "--target T", target, type=utf8_text)
    contrast = "explain why --target, and not this"
    _add(command, "--contrast T", contrast, type=utf8_text)
    chat = "treat the text as a user's message, and apply the tokenizer's chat template"
    _add(command, "--chat", chat, action="store_true")
    _add_template_arguments(command, "--chat")
    method = "the measure (default: target; contribution with --reduction, or if the model "
    method += "predicts nothing)"
    _add(command, "--method", method, choices=measures.names(targets=True))
    reduction = "reduction over query positions, without --target (default: mean)"
    _add(command, "--reduction", reduction, choices=choices.REDUCTIONS)
    raw = "print scores in the unit of the measure instead of percent"
    _add(command, "--raw", raw, action="store_true")
    page = "save an interactive page (.html), or the numbers (.json, .safetensors); with "
    page += "--data, the output folder"
    _add(command, "--out PATH", page, shtab.FILE, type=Path)
    _add_set(command.add_argument_group("a set of texts (with --data)"))


def _add_lines(group: Any) -> None:
    text = "whether each line of a .txt file is a text (default: if it has no blank lines)"
    _add(group, "--lines", text, action=argparse.BooleanOptionalAction)


def _add_set(group: Any) -> None:
    # Without --data these options are refused, so their defaults are not those of the parser.
    _add_lines(group)
    _add(group, "--samples N", "number of texts (default: all)", type=_count)
    length = f"maximum number of tokens per text (default: {choices.LENGTH})"
    _add(group, "--length T", length, type=_count)
    tokens = f"maximum number of tokens per batch, with padding (default: {choices.BATCH_TOKENS})"
    _add(group, "--batch-tokens N", tokens, type=_count)
    shard = f"number of texts per file (default: {choices.SHARD_SIZE}); a killed run repeats "
    shard += "unfinished files"
    _add(group, "--shard-size N", shard, type=_count)
    going = "go on after a text that cannot be scored; its row says why"
    _add(group, "--keep-going", going, action="store_true", default=None)


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        "measure which method finds the tokens that matter",
        """\
Remove what a method ranks highest or lowest, and measure the effect on the model.
A run resumes if its folder contains an unfinished run with the same settings.
With torchrun, processes share the batches.""",
        """\
  captum-cw evaluate --model M --data texts.jsonl --out run
  captum-cw evaluate --model M --data gsm8k --methods contribution,attention,random \\
      --rates 0.1,0.3,0.5 --reduction sum --out run
  captum-cw evaluate --model M --data gsm8k --methods contribution,joint,effect \\
      --scoring clean --ranking global --reduction sum --out run
  captum-cw evaluate --model M --tasks winogrande --samples 200 --out run
  torchrun --nproc_per_node 2 -m captum_cw evaluate --model M --data gsm8k --out run""",
    )
    _add(command, "--model M", MODEL, shtab.FILE, required=True)
    _add_loading(command)
    _add(command, "--out DIR", "output folder", shtab.DIR, type=_folder, required=True)
    _add_texts(command.add_argument_group("texts and tasks"))
    _add_removal(command.add_argument_group("removal"))


def _add_texts(group: Any) -> None:
    _add(group, "--data D", DATA, shtab.FILE)
    _add_lines(group)
    samples = "number of texts, or of pieces with --pack, and maximum number of documents per task"
    _add(group, "--samples N", samples, type=_count, default=64)
    _add(group, "--length T", "maximum number of tokens per text", type=_count, default=512)
    _add(group, "--pack", "join texts into pieces of exactly --length tokens", action="store_true")
    bos = "whether texts start with a beginning-of-sequence (BOS) token; auto asks the tokenizer"
    _add(group, "--bos", bos, choices=choices.STARTS, default="auto")
    _add(group, "--batch-size B", "number of texts per forward pass", type=_count, default=8)
    _add_tasks(group, "measure the accuracy on these tasks of lm-evaluation-harness")
    template = "apply the tokenizer's chat template to the prompts of the tasks"
    _add(group, "--apply-chat-template", template, action="store_true")
    _add_template_arguments(group, "--apply-chat-template")


def _add_removal(group: Any) -> None:
    methods = (*measures.names(controls=True, targets=True), measures.RANDOM)
    _add(
        group,
        "--methods A,B",
        f"the methods to compare, from {', '.join(methods)}",
        _one_of(methods),
        type=_some_of(methods),
        default=",".join((*measures.names(), measures.RANDOM)),
    )
    rates = "fractions to remove from the top and from the bottom (default: 0.01 to 0.2, and 0.1 "
    rates += "to 0.9); from the bottom alone for tasks (default: 0.3,0.5,0.7)"
    _add(group, "--rates P,Q", rates, type=_numbers)
    reduction = "reduction of the scores over queries; scores of a target are sums"
    _add(group, "--reduction", reduction, choices=choices.REDUCTIONS, default="mean")
    scoring = "score layers during the removal pass (online), or in an unchanged pass (clean), "
    scoring += "as scores of a target always are"
    _add(group, "--scoring", scoring, choices=choices.SCORINGS, default="online")
    ranking = "rank within each layer, over all layers (global), or within each head"
    _add(group, "--ranking", ranking, choices=choices.RANKINGS, default="layer")
    rate_of = "whether a rate is a fraction of the removable pairs or of all pairs"
    _add(group, "--rate-of", rate_of, choices=choices.RATES_OF, default="removable")
    granularity = "remove pairs of head and token, or whole tokens"
    _add(group, "--granularity", granularity, choices=choices.GRANULARITIES, default="pair")
    quantity = "the quantity whose change is measured"
    _add(group, "--quantity", quantity, choices=choices.QUANTITIES, default="perplexity")
    _add(group, "--allow-sinks", "allow attention sinks to be removed", action="store_true")
    space = "the hidden states that are compared with those of the first token to find sinks"
    _add(group, "--sink-space", space, choices=choices.STATES, default="normed")
    _add(group, "--seed", "random seed", type=int, default=0)


def _add_reproduce(commands: Any) -> None:
    command = _command(
        commands,
        "reproduce",
        "compute the paper's tables and figures in one report",
        """\
Compute every table and figure of arXiv 2606.07604, and judge its claims.
The command writes an HTML report, and files with the numbers. A run resumes if
its folder contains an unfinished run with the same settings.""",
        """\
  captum-cw reproduce --model M --data texts.jsonl --quick --out report
  captum-cw reproduce --model M --data gsm8k --only T1,F5b --out report
  captum-cw reproduce --model M --model N --data gsm8k --data wikitext --out report
  captum-cw reproduce --preset paper --device cuda --dtype bfloat16 --out report""",
    )
    _add(command, "--model M", f"{MODEL}; can be repeated", shtab.FILE, action="append")
    _add_loading(command)
    _add(command, "--data D", f"{DATA}; can be repeated", shtab.FILE, action="append")
    _add(command, "--out DIR", "output folder", shtab.DIR, type=_folder, required=True)
    items, only = choices.ITEMS, _one_of(choices.ITEMS)
    text = f"compute only these items, from {', '.join(items)}"
    _add(command, "--only T1,F5b", text, only, type=_some_of(items))
    size = command.add_mutually_exclusive_group()
    quick = "same as --preset quick: a first look that takes minutes"
    _add(size, "--quick", quick, action="store_true")
    preset = "size of the run; 'paper' also selects the models, data sets and tasks of the paper"
    _add(size, "--preset", preset, choices=choices.PRESETS, default="full")
    _add_lines(command)
    _add(command, "--samples N", "maximum number of texts for each item", type=_count)
    _add(command, "--length T", "maximum number of tokens per text", type=_count)
    skip = "number of texts to skip, so that claims are judged on unseen texts"
    _add(command, "--skip N", skip, type=partial(_count, least=0), default=0)
    _add_tasks(command, "tasks of lm-evaluation-harness, for item F4")
    _add(command, "--documents N", "maximum number of documents per task", type=_count)
    _add(command, "--seed", "random seed", type=int, default=0)


def _add_models(commands: Any) -> None:
    command = _command(
        commands,
        "models",
        "list tested model types, or show the attention layers of a model",
        """\
List the tested model types, or show the attention layers of a model M.
Layers are shown in execution order. To find them, the command loads the model into
memory and runs it on two tokens. If the model is not supported, the command says
why.""",
        """\
  captum-cw models
  captum-cw models HuggingFaceTB/SmolLM2-135M-Instruct
  captum-cw models ./folder --dtype bfloat16 --length 4096
  captum-cw models model.gguf --json""",
    )
    _add(command, "model M", MODEL, shtab.FILE, nargs="?")
    length = "number of tokens for which the memory of all maps is computed"
    _add(command, "--length T", length, type=_count, default=512)
    _add_loading(command)


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        "explain a prediction of a small model",
        """\
Explain what SmolLM2-135M-Instruct predicts next, and save figures.
The demo compares contributions with attention and Integrated Gradients (Captum).""",
        """\
  captum-cw demo
  captum-cw demo --text "The capital of France is" --out figures""",
    )
    text = "the text to continue (default: a sentence about languages)"
    _add(command, "--text T", text, type=utf8_text)
    folder = Path("captum-cw-demo")
    _add(command, "--out DIR", "output folder", shtab.DIR, type=_folder, default=folder)


def utf8_text(argument: str) -> str:
    """Decode an argument as UTF-8. In some locales Python does not, and escapes its bytes."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object: give one such as '{{\"enable_thinking\": false}}'."
        )
    return value


def _folder(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() in choices.FILES:
        raise argparse.ArgumentTypeError(f"{text!r} has the name of a file: give a folder.")
    return path


def _words(text: str) -> list[str]:
    return text.split(",")


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown; known: {', '.join(known)}.{suggestion(name, known)}"
                )
        return text.split(",")

    return names


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers: give one such as 0.1,0.5."
        ) from None


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: give {least} or more.")
    return int(text)
