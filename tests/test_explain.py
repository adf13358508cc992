from __future__ import annotations

import re
import types
import typing
import uuid
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt

from llmtrain.build import GROUPS, SCHEDULES, find, parts
from llmtrain.compose import compose_jobs, prepare
from llmtrain.config import COMMANDS, SECTIONS, knobs_of
from llmtrain.topics import (
    Knob,
    command_topic,
    default_option,
    in_words,
    option_topic,
    option_values,
    options,
    part_knobs,
    resume_knob,
    section_topic,
    with_default_model,
)

OPTIMS = ", ".join(options("optim"))

EVERY_KNOB = {
    **{f"{g}={p.name}": (p.knobs, part_knobs(p)) for g in GROUPS for p in parts(g).values()},
    **{f"section {name}": (knobs_of(kind), section_topic(name).knobs) for name, kind in SECTIONS.items()},
    **{f"command {name}": (knobs_of(kind), command_topic(name).knobs) for name, kind in COMMANDS.items()},
}


def untold(knob: Knob, kind: Any) -> list[str]:
    """What a person who meets a knob for the first time is not told of it."""
    told = " ".join((knob.meaning, knob.raised, knob.lowered, knob.rest)).strip()
    missing = [] if knob.meaning.strip() else ["what it is"]
    for base, bounds in _atoms(kind):
        if base in (int, float):
            if not any(isinstance(bound, Ge | Gt | Le | Lt) for bound in bounds):
                missing.append("its range")
            if not (knob.raised and knob.lowered) and "Raise or lower:" not in told:
                missing.append("what raising and lowering it does")
        choices = ("true", "false") if base is bool else typing.get_args(base)
        missing += [f"what {choice} means" for choice in choices if not re.search(rf"(?:^|\. ){choice}: \w", told)]
    return missing


def _atoms(kind: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The plain types within a type, each with its bounds."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        base, *bounds = typing.get_args(kind)
        return [(inner, (*bounds, *more)) for inner, more in _atoms(base)]
    if origin in (typing.Union, types.UnionType, list, dict):
        return [atom for choice in typing.get_args(kind) for atom in _atoms(choice)]
    return [(kind, ())]


@pytest.mark.parametrize("where", EVERY_KNOB)
def test_every_knob_says_what_it_is_and_does(where: str):
    schema, told = EVERY_KNOB[where]
    assert list(told) == list(schema)
    assert {key: untold(told[key], kind) for key, kind in schema.items()} == {key: [] for key in schema}


def test_resume_says_what_each_of_its_words_does():
    assert [word for word in ("never:", "auto:", "path") if word not in resume_knob().meaning] == []


def test_a_knob_that_leaves_something_out_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = f"own_{uuid.uuid4().hex}"
    source = '''
        def step(params, *, good: Positive, bare: float, vague: Fraction, half: Count, mute: bool | None, seed: Natural,
                 mode: Literal["soft", "hard"], flag: bool, switch: bool):
            """A step.

            Args:
                good: Its size. Raise: faster. Lower: slower.
                bare: Its size. Raise: faster. Lower: slower.
                vague: Its direction.
                half: How often. Raise: more.
                seed: Of the draws. Raise or lower: another draw.
                mode: soft: with care.
                flag: Whether it is true.
                switch: true: on. false: off.
            """
    '''
    (tmp_path / f"{package}.py").write_text(dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    part = find("optim", f"{package}:step", [package])
    told = part_knobs(part)
    assert {key: untold(told[key], kind) for key, kind in part.knobs.items()} == {
        "good": [],
        "bare": ["its range"],
        "vague": ["what raising and lowering it does"],
        "half": ["what raising and lowering it does"],
        "mute": ["what it is", "what true means", "what false means"],
        "seed": [],
        "mode": ["what hard means"],
        "flag": ["what true means", "what false means"],
        "switch": [],
    }


def test_a_meaning_is_split_where_raise_and_lower_begin():
    knobs = part_knobs(parts("optim")["adam"])
    assert knobs["beta2"] == Knob(
        "optim.beta2",
        "number >= 0 and < 1",
        "Decay of the second moment, the mean squared gradient.",
        "steadier rates, slow to see a change of scale.",
        "adapts faster, noisier; 0.95 is usual for language models.",
        "",
    )
    assert parts("optim")["adam"].knobs.keys() == knobs.keys()


def told_by(text: str) -> str:
    """The text of a table, without its columns."""
    return " ".join(text.split())


def test_explain_alone_names_every_group_option_and_section(call):
    said = call("explain")
    assert said.code == 0
    assert [g for g in GROUPS if not re.search(rf"^{g} .*{GROUPS[g].meaning[:20]}", said.out, re.M)] == []
    assert [o for g in GROUPS for o in options(g) if o not in said.out] == []
    assert said.out.count("inverse_sqrt") == 1 and said.out.count("those of schedule") == len(SCHEDULES) - 1
    assert [k for s in SECTIONS for k in knobs_of(SECTIONS[s]) if k not in said.out] == []


def test_explain_names_every_experiment_with_what_it_is(call):
    for question in ((), ("experiment",)):
        told = told_by(call("explain", *question).out)
        assert [name for name in options("experiment") if f" {name} " not in told] == []
        assert "BERT-Tiny on the docstrings of Python's library, in minutes on two CPU cores." in told
        assert "With the published model's norms" not in told


def test_explain_tells_what_an_experiment_says_and_sets(call):
    said = call("explain", "experiment=speedrun")
    assert said.code == 0
    told = told_by(said.out)
    assert told.startswith("experiment=speedrun GPT-2 small with what the field has found since")
    assert "train.steps=1000, which takes the place of this one." in told and "@package" not in told
    rows = [["optim", "muon"], ["momentum_schedule", "ramp"], ["train.batch_size", "512"], ["train.grad_clip", "null"],
            ["model.qk_norm", "true"]]  # fmt: skip
    assert [row for row in rows if row not in [line.split() for line in said.out.splitlines()]] == []
    assert "values: conf/experiment/speedrun.yaml" in told


@pytest.mark.parametrize("group", GROUPS)
def test_explain_names_the_options_of_a_group(call, group: str):
    said = call("explain", group)
    assert said.code == 0
    assert [o for o in options(group) if f"{group}={o}" not in said.out] == []


@pytest.mark.parametrize("key", ["optim.beta1", "optimizer.beta1"])
def test_explain_tells_one_knob_in_full(call, key: str):
    said = call("explain", key)
    told = told_by(said.out)
    knob = part_knobs(parts("optim")["adam"])["beta1"]
    assert said.code == 0
    assert knob.key == "optim.beta1"
    for text in (knob.key, knob.kind, knob.meaning, knob.raised, knob.lowered):
        assert text in told
    assert "0.9 (optim=adam, conf/optim/adam.yaml)" in told
    assert "llmtrain.optim.adaptive.adam" in told
    assert "arXiv:1412.6980" in told
    assert "llmtrain train optim.beta1=VALUE" in told


@pytest.mark.parametrize(
    ("key", "way"),
    [
        ("bench.warmup", "llmtrain bench warmup=VALUE"),
        ("cv.folds", "llmtrain cv folds=VALUE"),
        ("generate.stream", "llmtrain generate stream=VALUE"),
        ("eval.split", "llmtrain eval split=VALUE"),
        ("sweep.jobs", "llmtrain train sweep.jobs=VALUE"),
        ("run.cache", "llmtrain train run.cache=VALUE"),
        ("hydra.sweeper.sampler", "llmtrain train hydra.sweeper.sampler=VALUE"),
    ],
)
def test_a_knob_of_another_command_or_of_all_jobs_is_not_swept(call, key: str, way: str):
    told = told_by(call("explain", key).out)
    assert told.endswith(f"change it {way}") and "sweep it" not in told


def test_of_two_knobs_of_one_name_each_says_whose_it_is(call):
    told = told_by(call("explain", "eval.batches").out)
    train, own = told.split("change it")[1:]
    assert train.startswith(" llmtrain train eval.batches=VALUE sweep it") and own == " llmtrain eval batches=VALUE"


def test_explain_tells_the_usual_option_in_full_and_of_others_their_values(call):
    said = call("explain", "regularization.l1").out
    assert said.startswith("regularization.l1  number >= 0\n") and said.count("number >= 0") == 1
    assert "0.0 (regularization=none, conf/regularization/none.yaml)" in told_by(said)
    rows = dict(re.findall(r"^regularization=(\w+) +(\S+) *$", said, re.M))
    assert rows == {
        option: str(option_topic("regularization", option).values["l1"])
        for option in options("regularization")
        if option != "none"
    }


def test_explain_tells_what_a_knob_means_where_that_is_something_else(call):
    full, others = told_by(call("explain", "optim.lr").out).split("in the other options")
    assert full.startswith("optim.lr number > 0 meaning Step size at the peak of the schedule. raise")
    assert "0.384 / (model.width or 384) = 0.003 with model=gpt_nano (optim=adam, conf/optim/adam.yaml)" in full
    assert "optim=adagrad 0.01 optim=adamax 0.768 / (model.width or 384) = 0.006 optim=adamw" in others
    assert "optim=adadelta 1.0 Factor on the steps, 1 in the paper. optim=adafactor" in others
    for option in options("optim"):
        assert (f"(optim={option}," in full) is (option == "adam")
        assert (f"optim={option} " in others) is (option != "adam")


def test_a_knob_that_the_usual_option_lacks_is_told_of_the_first_that_has_it(call):
    told = told_by(call("explain", "optim.momentum").out)
    assert "0.9 (optim=lars, conf/optim/lars.yaml)" in told
    assert "optim=sgd 0.9 Lower: follows each gradient; 0 is plain gradient descent." in told


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("${over:0.384,${oc.select:model.width,384}}", "0.384 / (model.width or 384)"),
        ("${oc.select:model.context,128}", "model.context or 128"),
        ("${unless:1000,${.epochs},${.tokens}}", "1000, unless epochs or tokens is given"),
        ("${model.path}", "model.path"),
        ("${home:${run.dir}}/sweep-${now:%Y}", "${home:${run.dir}}/sweep-${now:%Y}"),
        ("${", "${"),
        ("a (b)", "a (b)"),
        (None, "null"),
        (False, "false"),
        (0.5, "0.5"),
        ([1, None], "[1, None]"),
    ],
)
def test_values_are_told_as_people_write_them(value: object, words: str):
    assert in_words(value) == words


def test_the_usual_options_are_those_of_a_run_without_words():
    prepare(None)
    job = compose_jobs("config", [], False)[0]
    chosen = {key.rpartition("@")[2]: option for key, option in job.choices.items()}
    assert {group: default_option(group) for group in GROUPS} == {group: chosen[group] for group in GROUPS}
    assert default_option("experiment") is None
    lr = with_default_model("optim", "adam", "lr")
    assert lr == pytest.approx(job.values["optim"]["lr"]) and with_default_model("optim", "sgd", "lr") is None


def test_a_group_without_a_folder_tells_the_knobs_of_the_one_whose_options_it_has(call):
    told, theirs = (told_by(call("explain", f"{group}.factor").out) for group in ("batch_schedule", "schedule"))
    assert "0.5 (batch_schedule=plateau, conf/schedule/plateau.yaml)" in told
    assert told == theirs.replace("schedule.factor", "batch_schedule.factor").replace(
        "(schedule=plateau", "(batch_schedule=plateau"
    )
    assert "batch_schedule=linear" in call("explain", "batch_schedule").out
    assert told_by(call("explain", "batch_schedule=linear").out).startswith("batch_schedule=linear A straight line")


def test_lengths_are_told_with_their_units(call):
    for knob in ("warmup", "every", "timescale", "rise", "milestones"):
        told = told_by(call("explain", f"schedule.{knob}").out)
        assert "number >= 0 or text such as 500 steps, 2 epochs, 1e4 samples, 10M tokens or 5%" in told


@pytest.mark.parametrize("question", ["optim=sgd", "optimizer=sgd", "train", "generate", "data.context", "resume"])
def test_explain_answers_by_option_section_command_and_knob(call, question: str):
    said = call("explain", question)
    told = told_by(said.out)
    expected: Mapping[str, list[str]] = {
        "sgd": ["momentum", "0.9", "conf/optim/sgd.yaml", "llmtrain.optim.sgd.sgd"],
        "train": ["batch_size", "conf/config.yaml", "llmtrain.config.Train", "seed"],
        "generate": ["temperature", "stream", "conf/generate.yaml", "llmtrain.config.Generation"],
        "context": ["data.context integer >= 1", "conf/data/stdlib.yaml", "data=text model.context or 128 = 128"],
        "resume": ["never", "auto"],
    }
    assert said.code == 0
    assert [text for text in expected[re.split("[.=]", question)[-1]] if text not in told] == []


def test_section_and_command_of_one_name_are_told_apart(call):
    assert "every" in call("explain", "eval").out
    said = call("eval", "--help")
    assert said.code == 0
    assert "usage: llmtrain eval run=VALUE [checkpoint=VALUE]" in said.out
    assert "llmtrain.config.Evaluation" in said.out


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("optimm", "Did you mean optim?"),
        ("optim=adamm", "Did you mean adam?"),
        ("optim=nothing", f"there are {OPTIMS}"),
        ("nothing=adam", "no such group"),
        ("optim.momentun", "Did you mean momentum?"),
        ("train.step", "Did you mean steps?"),
        ("lr", "Did you mean optim.lr?"),
        ("quux", "no such group, section or knob"),
        ("experiment=spedrun", "Did you mean speedrun?"),
        ("speedrun", "Did you mean experiment=speedrun?"),
        ("gpt2", "Did you mean init=gpt2 or experiment=gpt2?"),
        ("experimint", "Did you mean experiment?"),
        ("../../etc=passwd", "no such group"),
        ("optim=../loss/cross_entropy", "no such option"),
    ],
)
def test_a_question_without_an_answer_gets_a_hint(call, question: str, told: str):
    said = call("explain", question)
    assert said.code == 2
    assert told in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_explain_shows_how_to_ask(call):
    assert call("explain", "--help").out.startswith("usage: llmtrain explain")
    assert call("explain", "--help").code == 0
    assert call("explain", "optim", "train").code == 2


def test_every_value_can_be_told(call):
    """Also one that follows a knob of another model than the usual one, as `tokenizer=model` does."""
    for group in GROUPS:
        for option in options(group):
            for name in option_values(group, option):
                with_default_model(group, option, name)
    said = call("explain", "tokenizer.path")
    assert said.code == 0 and "model.path" in said.out


def test_the_page_of_all_knobs_has_them_all(call):
    page = call("explain", "--markdown").out
    assert page.count("Half a cosine from the peak") == 1
    assert page.count("Options and knobs are those of `schedule`.") == len(SCHEDULES) - 1
    for _, told in EVERY_KNOB.values():
        for knob in told.values():
            meaning = " ".join(filter(None, (knob.meaning, knob.rest))).replace("|", "\\|")
            assert f"| `{knob.key.split('.', 1)[1]}` | " in page
            assert f" | {knob.kind} | {meaning} | {knob.raised} | {knob.lowered} |" in page


def test_values_shown_are_those_of_the_yaml_files():
    assert option_topic("optim", "adam").values["beta2"] == 0.95
    assert section_topic("sample").values["temperature"] == command_topic("generate").values["temperature"]
