"""Accuracy of tasks under removal, against log-likelihoods and texts made by hand."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from captum_cw import remove_tokens
from captum_cw._utils.records import RecordsError
from captum_cw.metrics.tasks import Score, TaskResult, _ChangedModel, evaluate_tasks
from support.models import SIZES, build, llama
from support.state import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


matplotlib.use("Agg")

METHODS = {"cw": "contribution", "a": "attention"}
RATES = [0.3, 0.7]
N = 9
LETTERS = "abcdefghijklmnopqrstuvwxyz"

QUIZ = """\
task: quiz
tag: tagged
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
# As WinoGrande: the options are beginnings, and what follows is the same.
BEGINNINGS = """\
task: beginnings
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: options
doc_to_target: question
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ANSWERS = """\
task: answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: [], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """\
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
TOGETHER = """\
group: together
task: [quiz, beginnings]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
APART = """\
group: apart
task: [quiz, beginnings]
"""


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def documents(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Of many lengths; the right answer is what the model itself says in two of three."""
    rng = random.Random(0)
    docs = []
    for number in range(N):
        question = words(rng, 3, 12)
        # Options of one word share a pass of the model; others have one each.
        options = rng.sample(LETTERS, 3) if number % 2 else [words(rng, 1, 5) for _ in range(3)]
        answer = generated(model, tokenizer, question) if number % 3 else "a b c"
        docs.append(
            {"question": question, "options": options, "gold": rng.randrange(3), "answer": answer}
        )
    return docs


def generated(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def log_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, context: str, following: str
) -> float:
    """With loops; the last token is not read, since nothing comes after it."""
    ids = tokenizer(f"{context} {following}").input_ids
    first = len(tokenizer(context).input_ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    return sum(
        float(logits[i].log_softmax(-1)[following_id])
        for i, (_, following_id) in enumerate(pairwise(ids))
        if i >= first - 1
    )


@pytest.fixture
def model() -> nn.Module:
    return llama()


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tiny_tokenizer.eos_token = "?"
    return tiny_tokenizer


@pytest.fixture
def docs(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return documents(model, tokenizer)


@pytest.fixture
def folder(tmp_path: Path, docs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    where = json.dumps({"data_files": {"validation": str(data)}, "cache_dir": str(tmp_path)})
    for text in (QUIZ, BEGINNINGS, ANSWERS, PERPLEXITY, TOGETHER, APART):
        name = text.split("\n")[0].split(": ")[1]
        if text.startswith("task"):
            text += f"dataset_path: json\nvalidation_split: validation\ndataset_kwargs: {where}\n"
        (folder / f"{name}.yaml").write_text(text)
    # The harness's own thousands take a quarter of a minute to look through.
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, **kwargs: manager(None, include_path)
    )
    return folder


@pytest.fixture
def run(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Run:
    def run(tasks: list[str], methods: Any = METHODS, rates: Any = RATES, **options: Any) -> Any:
        options = {"task_path": folder, **options}
        return evaluate_tasks(model, tokenizer, tasks, methods, rates, **options)

    return run


Run = Callable[..., TaskResult]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The answers of the harness's model, in the order of the requests, by evaluation."""
    seen: list[list[Any]] = []

    original = _ChangedModel._answers

    def call(*args: Any) -> list[Any]:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(_ChangedModel, "_answers", call)
    return seen


# -- the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["online", "clean"])
def test_options_and_accuracy_equal_those_by_hand(
    run: Run,
    answers: list[list[Any]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    docs: list[dict[str, Any]],
    scoring: Any,
) -> None:
    result = run(["quiz", "beginnings"], scoring=scoring)
    found = iter(answers)
    accuracies: dict[tuple[Any, ...], float] = {}
    for task in ("quiz", "beginnings"):
        for name, rate in [(None, 0.0), *((n, r) for n in METHODS for r in RATES)]:
            expected = []
            with remove_tokens(model, METHODS[name or "cw"], rate, scoring=scoring):
                for doc in docs:
                    for option in doc["options"]:
                        pair = (doc["question"], option)
                        context, following = pair if task == "quiz" else pair[::-1]
                        expected.append(log_likelihood(model, tokenizer, context, following))
            assert [x for x, _ in next(found)] == pytest.approx(expected, abs=1e-4)
            options = torch.tensor(expected).view(-1, 3)
            gold = torch.tensor([doc["gold"] for doc in docs])
            accuracies[task, name, rate] = float((options.argmax(1) == gold).double().mean())
    for task, by_method in result.scores.items():
        assert result.baseline[task].value == pytest.approx(accuracies[task, None, 0.0])
        for name, scores in by_method.items():
            assert scores.tolist() == pytest.approx([accuracies[task, name, r] for r in RATES])
    assert len(set(accuracies.values())) > 2
    assert result.documents == {"quiz": N, "beginnings": N}


def test_the_standard_error_is_that_of_a_mean(run: Run) -> None:
    result = run(["quiz"], rates=[0.5])
    for value, stderr in [
        result.baseline["quiz"],
        *(removed["acc,none"] for removed in result.records["quiz"]["removed"]["cw"]),
    ]:
        assert float(stderr) == pytest.approx(float(value * (1 - value) / (N - 1)) ** 0.5)


def test_generated_texts_equal_those_by_hand(
    run: Run,
    answers: list[list[Any]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    docs: list[dict[str, Any]],
) -> None:
    result = run(["answers"])
    assert result.metric == {"answers": "exact_match,none"}
    assert result.baseline["answers"].value == pytest.approx(2 / 3)
    runs = [("contribution", 0.0), *((m, r) for m in METHODS.values() for r in RATES)]
    for (method, rate), found in zip(runs, answers, strict=True):
        with remove_tokens(model, method, rate):
            expected = [generated(model, tokenizer, doc["question"]) for doc in docs]
        assert found == expected
    assert result.scores["answers"]["cw"][1] < 2 / 3


def test_chance_differs_between_texts_and_repeats(
    run: Run, answers: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def noted(*args: Any, seed: int = 0, **options: Any) -> Any:
        seeds.append(seed)
        return remove_tokens(*args, seed=seed, **options)

    monkeypatch.setattr("captum_cw.metrics.tasks.remove_tokens", noted)
    for seed in (0, 0, 1):
        run(["quiz"], {"chance": "random"}, [0.5], seed=seed)
    one, again, other = answers[1::2]
    assert one == again != other
    assert len(seeds) == 3 * (N + 1)  # each run checks the method once
    assert len(set(seeds[1 : N + 1])) == N


def test_examples_before_a_document_change_it(
    run: Run, answers: list[list[Any]], folder: Path
) -> None:
    quiz = (folder / "quiz.yaml").read_text()
    for name, shots in {"none": 0, "two": 2}.items():
        text = quiz.replace("task: quiz", f"task: {name}") + f"num_fewshot: {shots}\n"
        (folder / f"{name}.yaml").write_text(text)
    for task in ("quiz", "none", "two", "two"):
        run([task], rates=[0.5])
    unset, none, two, again = answers[::3]
    assert unset == none != two == again


def test_a_group_counts_as_one_task(run: Run) -> None:
    whole, parts = run(["together"], rates=[0.5]), run(["quiz", "beginnings"], rates=[0.5])
    assert whole.tasks == ["together"]
    assert whole.documents["together"] == 2 * N
    mean = sum(x.value for x in parts.baseline.values()) / 2
    assert whole.baseline["together"].value == pytest.approx(mean)
    assert whole.metric == {"together": "acc,none"}


def test_limit_takes_the_first_documents(run: Run, answers: list[list[Any]]) -> None:
    run(["quiz"], rates=[0.5])
    result = run(["quiz"], rates=[0.5], limit=5)
    assert result.documents == {"quiz": 5}
    assert answers[3] == answers[0][:15]


def test_the_harness_warns_of_texts_that_are_too_long(
    run: Run, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    model.config.max_position_embeddings = 8
    run(["quiz"], rates=[0.5])
    assert "exceeds model's maximum length (8)" in caplog.text


# -- everything is left as it was -----------------------------------------------------------


def test_model_tokenizer_and_generators_are_left_as_they_were(
    run: Run, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.unk_token = None  # else it would pad
    before, weights = state_of(model), {n: p.clone() for n, p in model.state_dict().items()}
    token = tokenizer.pad_token
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    run(["quiz", "answers"], rates=[0.5])
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert state_of(model) == before
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    assert tokenizer.pad_token == token


def test_a_model_in_training_mode_is_evaluated_and_put_back(run: Run, model: nn.Module) -> None:
    expected = run(["quiz"], rates=[0.5]).records
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        assert run(["quiz"], rates=[0.5]).records == expected
    assert model.training


def test_nothing_is_printed(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run(["quiz"], rates=[0.5])
    capfd.readouterr()  # the first use of the data shows that they are read
    run(["quiz"], rates=[0.5])
    assert capfd.readouterr() == ("", "")


# -- going on -------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    run: Run, tmp_path: Path, answers: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(["quiz", "beginnings"])
    answers.clear()
    calls = iter(range(100))
    original = _ChangedModel._answers

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    file = tmp_path / "run.records"
    with monkeypatch.context() as patch:
        patch.setattr(_ChangedModel, "_answers", killed)
        with pytest.raises(KeyboardInterrupt):
            run(["quiz", "beginnings"], resume_from=file)
    assert len(answers) == 7
    result = run(["quiz", "beginnings"], resume_from=file)
    assert len(answers) == 10  # of five runs for each of two tasks
    assert result == whole
    assert run(["quiz", "beginnings"], resume_from=file) == whole
    assert len(answers) == 10


def test_a_run_of_other_documents_is_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.records"
    run(["quiz"], rates=[0.5], resume_from=file)
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace('"gold": 0', '"gold": 1'))
    with pytest.raises(RecordsError, match="tasks"):
        run(["quiz"], rates=[0.5], resume_from=file)


# -- the result -----------------------------------------------------------------------------


def result_of(values: list[float], stderr: float | None = 0.05) -> TaskResult:
    record = {
        "metric": "acc,none",
        "documents": 20,
        "baseline": {"acc,none": [0.7, stderr], "f1,none": [0.6, None]},
        "removed": {"cw": [{"acc,none": [x, stderr], "f1,none": [x, None]} for x in values]},
    }
    return TaskResult((0.3, 0.5, 0.7), {}, {"quiz": record})


@pytest.mark.parametrize(
    ("values", "rate"),
    [([0.7, 0.61, 0.6], 0.5), ([0.5, 0.7, 0.1], 0.5), ([0.9, 0.9, 0.9], 0.7), ([0.1] * 3, None)],
)
def test_the_largest_rate_is_the_last_within_the_interval(
    values: list[float], rate: float | None
) -> None:
    assert result_of(values).largest_rate("quiz", "cw") == rate


def test_the_largest_rate_needs_an_interval_and_known_names() -> None:
    with pytest.raises(ValueError, match="no standard error of 'acc,none' for 20 documents"):
        result_of([0.7] * 3, None).largest_rate("quiz", "cw")
    for task, method in [("other", "cw"), ("quiz", "other")]:
        with pytest.raises(KeyError, match="'other'.*there are tasks quiz and methods cw"):
            result_of([0.7] * 3).largest_rate(task, method)


def test_a_result_prints_what_is_within_the_interval() -> None:
    """The interval is 0.7 ± 0.098."""
    lines = str(result_of([0.81, 0.61, 0.6])).splitlines()
    assert lines[0] == "quiz: acc,none, bottom removed (documents: 20)"
    assert lines[1] == "0.7 with nothing removed, standard error 0.05"
    assert [line.split() for line in lines[2:6]] == [
        ["cw"],
        ["30%", "0.81", "+"],
        ["50%", "0.61", "~"],
        ["70%", "0.6", "-"],
    ]
    assert lines[6] == "largest rate: cw 50%"
    assert max(map(len, lines)) <= 80
    lines = str(result_of([0.8, 0.61, 0.6], None)).splitlines()
    assert [line.split() for line in lines[3:]] == [["30%", "0.8"], ["50%", "0.61"], ["70%", "0.6"]]


def test_a_table_has_every_metric() -> None:
    table = result_of([0.7, 0.6, 0.5]).to_dataframe()
    assert len(table) == 6
    accuracy = table[table.is_accuracy]
    assert accuracy.rate.tolist() == [0.3, 0.5, 0.7]
    assert accuracy.value.tolist() == [0.7, 0.6, 0.5]
    assert accuracy.baseline.tolist() == [0.7] * 3
    assert table[table.metric == "f1,none"].stderr.isna().all()


def test_results_are_saved_and_read(run: Run, tmp_path: Path) -> None:
    result = run(["quiz"], rates=[0.5])
    file = tmp_path / "result.json"
    result.save(file)
    assert TaskResult.load(file) == result
    assert isinstance(result.baseline["quiz"], Score)
    file.write_text('{"version": 99, "task_rates": []}')
    with pytest.raises(ValueError, match="version 99; this release reads 1"):
        TaskResult.load(file)
    for content in ("no", '{"version": 1}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="is not a result of this"):
            TaskResult.load(file)


@pytest.mark.parametrize("stderr", [0.05, None])
def test_a_plot_has_a_line_for_each_method_and_the_baseline(stderr: float | None) -> None:
    figure, axes = result_of([0.7, 0.6, 0.5], stderr).plot(use_pyplot=False)
    (ax,) = axes
    assert [line.get_label() for line in ax.lines] == ["cw", "nothing removed"]
    assert ax.lines[0].get_ydata() == pytest.approx([0.7, 0.6, 0.5])
    assert len(ax.patches) == (0 if stderr is None else 1)
    assert ax.get_title() == "quiz (acc)"
    figure.canvas.draw()


# -- what is refused ------------------------------------------------------------------------


def test_unknown_tasks_are_refused_with_names_like_them(run: Run) -> None:
    with pytest.raises(ValueError, match="Task 'quizz' is unknown. Did you mean 'quiz'"):
        run(["quizz"])


def test_tasks_without_one_accuracy_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="'apart' is a group.*instead: quiz, beginnings"):
        run(["apart"])
    with pytest.raises(ValueError, match="'tagged' is a group.*instead: quiz"):
        run(["tagged"])
    with pytest.raises(ValueError, match="'text' does not have an accuracy.*word_perplexity"):
        run(["text"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rates": []}, ValueError, "must be fractions"),
        ({"rates": [0.0, 0.5]}, ValueError, "must be fractions"),
        ({"rates": [0.5, 0.3]}, ValueError, "ascending"),
        ({"rates": [0.5], "which": "middle"}, ValueError, "middle"),
        ({"methods": {}}, ValueError, "methods is empty"),
        ({"methods": ["vw"]}, TypeError, "methods is of type list: give each method a name"),
        ({"methods": {"a": "attentoin"}}, ValueError, "'attentoin' is unknown"),
        ({"methods": {"a": torch.ones(1, 3)}}, TypeError, "Tensor"),
        ({"ranking": "global"}, ValueError, "scoring='clean'"),
        ({"sink_space": "nowhere"}, ValueError, "nowhere"),
        ({"limit": 0}, ValueError, "limit must be at least 1.*got 0"),
        ({"tasks": "quiz"}, ValueError, "tasks must be a list.*got 'quiz'"),
        ({"tasks": []}, ValueError, "tasks must be a list.*got \\[\\]"),
        ({"task_path": "/nowhere"}, NotADirectoryError, "/nowhere"),
    ],
)
def test_wrong_choices_are_refused(
    run: Run, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(**{"tasks": ["quiz"], **options})


TEMPLATE = (
    "{% for m in messages %}U {{ m.content }} {% endfor %}{% if add_generation_prompt %}A "
    "{% if enable_thinking is defined and not enable_thinking %}T {% endif %}{% endif %}"
)


@pytest.mark.parametrize("given", [None, {"enable_thinking": False}])
def test_tasks_are_asked_in_the_chat_template(
    run: Run,
    answers: list[list[Any]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    docs: list[dict[str, Any]],
    given: dict[str, Any] | None,
) -> None:
    tokenizer.chat_template = TEMPLATE
    run(["answers"], rates=[0.5], apply_chat_template=True, chat_template_kwargs=given)
    end = "A" if given is None else "A T"
    asked = [f"U {doc['question']} {end}" for doc in docs]
    assert answers[0] == [generated(model, tokenizer, text) for text in asked]
    with remove_tokens(model, "contribution", 0.5):
        assert answers[1] == [generated(model, tokenizer, text) for text in asked]


def test_runs_in_other_templates_do_not_mix(
    run: Run, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = TEMPLATE
    settings: dict[str, Any] = {"rates": [0.5], "resume_from": tmp_path / "run"}
    settings["methods"] = {"r": "random"}
    run(["quiz"], apply_chat_template=True, **settings)
    run(["quiz"], apply_chat_template=True, **settings)
    for other in (
        {},
        {"apply_chat_template": True, "chat_template_kwargs": {"enable_thinking": False}},
    ):
        with pytest.raises(RecordsError, match="chat_template"):
            run(["quiz"], **other, **settings)


def test_a_chat_template_is_needed_for_its_arguments(run: Run) -> None:
    with pytest.raises(ValueError, match="needs apply_chat_template=True"):
        run(["quiz"], chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="chat_template is not set"):
        run(["quiz"], apply_chat_template=True)


def test_a_classifier_cannot_be_asked(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    model = build(LlamaForSequenceClassification, config)
    with pytest.raises(TypeError, match="causal .*, got LlamaForSequenceClassification"):
        evaluate_tasks(model, tokenizer, ["quiz"], METHODS, RATES, task_path=folder)


def test_other_models_and_tokenizers_are_refused(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    def evaluate(model: Any, tokenizer: Any) -> None:
        evaluate_tasks(model, tokenizer, ["quiz"], METHODS, RATES, task_path=folder)

    with pytest.raises(TypeError, match="got Linear"):
        evaluate(nn.Linear(1, 1), tokenizer)
    with pytest.raises(TypeError, match="got str"):
        evaluate(model, "gpt2")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        evaluate(model, tokenizer)


def test_without_the_harness_the_error_says_how_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-cw\[tasks\]'"):
        run(["quiz"])
