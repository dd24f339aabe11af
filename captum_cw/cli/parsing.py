"""The commands, their options and their help.

Nothing here imports torch, so that help and wrong usage are told at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import shtab

from captum_cw import __version__, measures
from captum_cw._utils.suggestions import suggestion
from captum_cw.cli.choices import (
    DATA,
    DTYPES,
    GRANULARITIES,
    ITEMS,
    PRESETS,
    QUANTITIES,
    RANKINGS,
    RATES_OF,
    REDUCTIONS,
    SCORINGS,
    STARTS,
    STATES,
)

__all__ = ["UsageError", "parser"]

#: How argparse words a choice that is none.
WRONG_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")
MODEL = "hub id, local folder or .gguf file"
DATA_HELP = f"{', '.join(DATA)}, or a .txt, .jsonl, .json, .csv or .parquet file"

DESCRIPTION = """\
Which tokens made a transformer's output: contribution weights, attention, and
their likes, from the command line."""
EPILOG = """\
Results go to standard output, progress and messages to standard error. With
--json, a command prints one JSON document and nothing else; docs/command_line.md
lists its keys.

exit codes:
  0    success
  1    failure, told in one line (--debug shows its stack)
  2    wrong usage
  130  interrupted; evaluate and reproduce go on where they stopped

completion, for bash, zsh, fish, tcsh or powershell:
  eval "$(captum-cw --print-completion bash)"      in ~/.bashrc
  captum-cw --print-completion fish > ~/.config/fish/completions/captum-cw.fish

examples:
  captum-cw demo
  captum-cw attribute --model M --text "The capital of France is" --target " Paris"
  captum-cw COMMAND --help"""


class UsageError(Exception):
    """A command was called in a way that it cannot be.

    Args:
        message: What is wrong, and the way out.
        of: The parser of the command.
    """

    def __init__(self, message: str, of: argparse.ArgumentParser) -> None:
        super().__init__(message)
        self.of = of


class _Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong, and says which choice may be meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        wrong = WRONG_CHOICE.search(message)
        if wrong is not None:
            message += "." + suggestion(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        raise UsageError(message, self)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, for documentation and completion.

    Example:
        >>> parser().parse_args(["demo", "--text", "One, two,"]).command
        'demo'
    """
    whole = _Parser(prog="captum-cw", description=DESCRIPTION, epilog=EPILOG)
    whole.add_argument("--version", action="version", version=__version__)
    shtab.add_argument_to(whole, help="print a script of completions for this shell, and exit")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_attribute(commands)
    _add_evaluate(commands)
    _add_reproduce(commands)
    _add_models(commands)
    _add_demo(commands)
    return whole


def _command(commands: Any, name: str, short: str, description: str, epilog: str) -> _Parser:
    """A command, whose module is called as it is.

    The first line of the description is what completion says of it.
    """
    found: _Parser = commands.add_parser(name, help=short, description=description, epilog=epilog)
    found.set_defaults(command=name, parser=found)
    found.add_argument("--json", action="store_true", help="print one JSON document, and no more")
    found.add_argument("--debug", action="store_true", help="show the stack of an error")
    return found


def _option(to: Any, name: str, text: str, **settings: Any) -> None:
    """An option whose help ends in its default, where it has one."""
    if settings.get("default") is not None:
        text += " (default: %(default)s)"
    completed = settings.pop("complete", None)
    action = to.add_argument(name, help=text, **settings)
    if completed is not None:
        action.complete = completed


def _one_of(names: Iterable[str]) -> Any:
    """Completes one of these where more may follow; a line each, as fish reads them."""
    return shtab.cmd(rf"printf '%s\n' {' '.join(names)}")


def _add_model(to: Any, text: str = MODEL, **settings: Any) -> None:
    _option(to, "--model", text, metavar="M", complete=shtab.FILE, **settings)
    _add_place(to)


def _add_place(to: Any) -> None:
    _option(to, "--dtype", "of the weights", choices=DTYPES, default="float32")
    _option(to, "--device", "such as cuda, or auto to spread the model", default="cpu")


def _add_tasks(to: Any, text: str) -> None:
    _option(to, "--tasks", text, type=_words, metavar="A,B")
    text = "folder of task files of your own"
    _option(to, "--task-path", text, type=Path, metavar="DIR", complete=shtab.DIR)


def _add_chat_template_kwargs(to: Any, needed: str) -> None:
    """Arguments for the chat template, which go with the option that applies it."""
    text = f"arguments for the chat template, as a JSON object, with {needed}"
    _option(to, "--chat-template-kwargs", text, type=_mapping, metavar="JSON")


def _add_attribute(commands: Any) -> None:
    command = _command(
        commands,
        "attribute",
        "score the tokens of a text",
        "Score the tokens of a text, or those of a prompt for a given output.",
        """\
examples:
  captum-cw attribute --model M --file story.txt --out page.html
  captum-cw attribute --model M --text "The capital of France is" --target " Paris"
  captum-cw attribute --model M --chat --text "Name a city" --target "Paris"
  captum-cw attribute --model M --chat --text "Hi" --chat-template-kwargs '{"x": 1}'
  captum-cw attribute --model M --text "One two" --json > scores.json""",
    )
    _add_model(command, required=True)
    text = command.add_mutually_exclusive_group(required=True)
    _option(text, "--text", "the text", type=_text, metavar="T")
    text_file = "a UTF-8 file that holds the text"
    _option(text, "--file", text_file, type=Path, metavar="F", complete=shtab.FILE)
    output = "explain this output, with the text as its prompt"
    _option(command, "--target", output, type=_text, metavar="T")
    _option(
        command,
        "--chat",
        "the text is what a user says: apply the tokenizer's chat template",
        action="store_true",
    )
    _add_chat_template_kwargs(command, "--chat")
    _option(command, "--method", "measure", choices=measures.names(), default=measures.names()[0])
    _option(
        command,
        "--reduction",
        "over the positions that see a token, without --target (default: mean)",
        choices=REDUCTIONS,
    )
    page = "save an interactive page of the tokens, and without --target of all measures and heads"
    _option(command, "--out", page, type=Path, metavar="PAGE.html", complete=shtab.FILE)


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        "measure which method finds the tokens that matter",
        """\
Remove what a method ranks highest, and lowest, and measure what the model loses.
Goes on where a run of the same settings into the same folder stopped. Under
torchrun, processes share the batches.""",
        """\
examples:
  captum-cw evaluate --model M --data texts.jsonl --out run
  captum-cw evaluate --model M --data gsm8k --methods contribution,attention,random \\
      --rates 0.1,0.3,0.5 --reduction sum --out run
  captum-cw evaluate --model M --tasks winogrande --samples 200 --out run
  torchrun --nproc_per_node 2 -m captum_cw evaluate --model M --data gsm8k --out run""",
    )
    _add_model(command, required=True)
    _option(command, "--out", "folder of the run", type=Path, required=True, metavar="DIR",
            complete=shtab.DIR)  # fmt: skip

    texts = command.add_argument_group("texts and tasks")
    _option(texts, "--data", DATA_HELP, metavar="D", complete=shtab.FILE)
    _option(texts, "--samples", "number of texts", type=_count, default=64, metavar="N")
    _option(texts, "--length", "cut texts to so many tokens", type=_count, default=512, metavar="T")
    _option(texts, "--pack", "join texts to exactly that length", action="store_true")
    _option(texts, "--bos", "begin token of packed texts", choices=STARTS, default="auto")
    _option(texts, "--batch-size", "texts in one pass", type=_count, default=8, metavar="B")
    _add_tasks(texts, "tasks of lm-evaluation-harness, for accuracy")
    template = "ask the tasks in the tokenizer's chat template"
    _option(texts, "--apply-chat-template", template, action="store_true")
    _add_chat_template_kwargs(texts, "--apply-chat-template")

    methods = (*measures.names(controls=True), measures.RANDOM)
    removal = command.add_argument_group("removal")
    _option(
        removal,
        "--methods",
        f"of {', '.join(methods)}",
        type=_some_of(methods),
        default=",".join((*measures.names(), measures.RANDOM)),
        metavar="A,B",
        complete=_one_of(methods),
    )
    _option(removal, "--rates", "fractions to remove, for both sides", type=_numbers, metavar="P,Q")
    _option(removal, "--reduction", "of scores over queries", choices=REDUCTIONS, default="mean")
    _option(removal, "--scoring", "when scores are taken", choices=SCORINGS, default="online")
    _option(removal, "--ranking", "over which pairs are ranked", choices=RANKINGS, default="layer")
    _option(removal, "--rate-of", "pairs that rates count", choices=RATES_OF, default="removable")
    _option(removal, "--granularity", "what is removed", choices=GRANULARITIES, default="pair")
    _option(removal, "--quantity", "what the model loses", choices=QUANTITIES, default="perplexity")
    _option(removal, "--allow-sinks", "remove attention sinks like any token", action="store_true")
    _option(removal, "--sink-space", "of their states", choices=STATES, default="normed")
    _option(removal, "--seed", "of random scores", type=int, default=0)


def _add_reproduce(commands: Any) -> None:
    command = _command(
        commands,
        "reproduce",
        "compute the tables and figures of the paper, in one report",
        """\
Compute every table and figure of arXiv 2606.07604, and judge its claims.
Writes one HTML report beside the numbers. Goes on where a run of the same
settings into the same folder stopped.""",
        """\
examples:
  captum-cw reproduce --model M --data texts.jsonl --quick --out report
  captum-cw reproduce --model M --data gsm8k --only T1,F5b --out report
  captum-cw reproduce --model M --model N --data gsm8k --data wikitext --out report
  captum-cw reproduce --preset paper --device cuda --dtype bfloat16 --out report""",
    )
    _add_model(command, f"{MODEL}; repeats", action="append")
    _option(command, "--data", f"{DATA_HELP}; repeats", action="append", metavar="D",
            complete=shtab.FILE)  # fmt: skip
    _option(command, "--out", "folder of the report", type=Path, required=True, metavar="DIR",
            complete=shtab.DIR)  # fmt: skip
    _option(
        command,
        "--only",
        f"items, of {', '.join(ITEMS)}",
        type=_some_of(ITEMS),
        metavar="T1,F5b",
        complete=_one_of(ITEMS),
    )
    size = command.add_mutually_exclusive_group()
    _option(size, "--quick", "a first look, in minutes", action="store_true")
    much = "how much is run; paper brings its models and sets, too"
    _option(size, "--preset", much, choices=PRESETS, default="full")
    most = "at most so many {}, of all items"
    _option(command, "--samples", most.format("texts"), type=_count, metavar="N")
    _option(command, "--length", most.format("tokens a text"), type=_count, metavar="T")
    unseen = "texts that are passed over first, to judge claims on others"
    _option(command, "--skip", unseen, type=partial(_count, least=0), default=0, metavar="N")
    _add_tasks(command, "tasks of lm-evaluation-harness, for F4")
    most = "at most so many documents of each task"
    _option(command, "--documents", most, type=_count, metavar="N")
    _option(command, "--seed", "of random choices", type=int, default=0)


def _add_models(commands: Any) -> None:
    command = _command(
        commands,
        "models",
        "show what is supported, or the attention layers of a model",
        """\
Show which model types are tested, or the attention layers of a model M.
Without M: the types, and the ways in for others. With M: its layers in execution
order, as they are seen. It is loaded and run on two tokens, which takes the
memory of its weights; or it is refused, with the reason.""",
        """\
examples:
  captum-cw models
  captum-cw models HuggingFaceTB/SmolLM2-135M-Instruct
  captum-cw models ./folder --dtype bfloat16 --length 4096
  captum-cw models model.gguf --json""",
    )
    _option(command, "model", MODEL, nargs="?", metavar="M", complete=shtab.FILE)
    text = "of a text, for the memory that its maps take"
    _option(command, "--length", text, type=_count, default=512, metavar="T")
    _add_place(command)


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        "explain a prediction of a small model, beside Integrated Gradients",
        """\
Explain what SmolLM2-135M-Instruct predicts next, and save pictures.
Contributions stand beside attention and Captum's Integrated Gradients.""",
        """\
examples:
  captum-cw demo
  captum-cw demo --text "The capital of France is" --out pictures""",
    )
    text = "the text to continue (default: one on languages)"
    _option(command, "--text", text, type=_text, metavar="T")
    folder = Path("captum-cw-demo")
    _option(command, "--out", "folder for the pictures", type=Path, default=folder, metavar="DIR",
            complete=shtab.DIR)  # fmt: skip


def _text(text: str) -> str:
    """A text in UTF-8, which Python does not read as such in every locale."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not UTF-8 text: write it to a UTF-8 file, or change the locale ({error})."
        ) from error


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object: give one such as '{{\"enable_thinking\": false}}'."
        )
    return found


def _words(text: str) -> list[str]:
    return text.split(",")


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown; known: {', '.join(known)}.{suggestion(name, known)}"
                )
        return found

    return names


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers: give some such as 0.1,0.5."
        ) from error


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give {least} or more.")
    return int(text)
