"""pytorch-optimizer's: knobs held against the signature, what cannot be trained refused, all else saved."""

import sys

import pytest
import torch
from test_optim import make_toy, set_gradients
from test_optim_steps import STEPS, set_rates
from toy import make_gpt, make_job, make_state, make_train, make_windows

from llmtrain.build import parts
from llmtrain.checkpoint import restore, save
from llmtrain.knobs import ConfigError, UserError
from llmtrain.loop import fit
from llmtrain.optim.groups import param_groups
from llmtrain.optim.library import library

theirs = pytest.importorskip("pytorch_optimizer")

KNOBS = {"optimizer": "ADOPT", "lr": 0.02, "weight_decay": 0.0, "knobs": {}}


def misfits(**knobs):
    """As a check of the config asks."""
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        library(param_groups(torch.nn.Linear(2, 2)), **KNOBS | knobs)
    return [(misfit.key, misfit.rule, misfit.suggestion) for misfit in caught.value.misfits]


def test_twenty_steps_equal_the_librarys():
    ours, other = make_toy(torch.float64), make_toy(torch.float64)
    knobs = {"betas": [0.8, 0.99], "clip_lambda": None, "weight_decouple": True}
    optimizer = library(param_groups(ours), **KNOBS | {"weight_decay": 0.1, "knobs": knobs})
    groups = param_groups(other)
    for group in groups:
        group["weight_decay"] = 0.1 if group["kind"] == "shrink" else 0.0
    reference = theirs.ADOPT(groups, lr=0.02, betas=(0.8, 0.99), clip_lambda=None, weight_decouple=True)
    for step in range(STEPS):
        for each, model in ((optimizer, ours), (reference, other)):
            set_gradients(model, step)
            set_rates(each, 1 - step / (2 * STEPS))
            for group in each.param_groups:  # as a schedule of momentum does
                group["betas"] = (0.8 - step / (2 * STEPS), 0.99)
            each.step()
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), other.parameters(), strict=True)), step


@pytest.mark.parametrize("name", ["AdaBelief", "Adan", "AvaGrad", "DAdaptAdam", "Prodigy", "Shampoo", "Yogi"])
def test_what_counts_in_groups_comes_back_from_a_checkpoint(tmp_path, name):
    build = lambda groups: library(groups, **KNOBS | {"optimizer": name})
    trained = lambda state, until: fit(state, make_job(state, make_windows(), make_train(steps=until)))
    state, resumed = make_state(make_gpt(layers=1), build), make_state(make_gpt(layers=1, seed=3), build)
    trained(state, 3)
    restore(save(tmp_path, state, keep=1, extra={}), resumed)
    trained(state, 6)
    trained(resumed, 6)
    for (n, p), q in zip(state.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    one = make_state(make_gpt(layers=1), lambda groups: library(groups, **KNOBS | {"optimizer": "Adan"}))
    fit(one, make_job(one, make_windows(), make_train(steps=2)))
    path = save(tmp_path, one, keep=1, extra={})
    other = make_state(make_gpt(layers=1), lambda groups: library(groups, **KNOBS | {"optimizer": "Yogi"}))
    with pytest.raises(UserError, match="holds the running values of Adan, not of Yogi"):
        restore(path, other)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ScheduleFreeAdamW", "weights for evaluation"),
        ("SophiaH", "no step from gradients alone"),
        ("LOMO", "no step from gradients alone"),
        ("ASGD", "its own rate"),
        ("SPAM", "belong to no weight"),
        ("SOAP", "a checkpoint cannot hold"),
        ("StableSPAM", "does not hold all"),
        ("AliG", "has no lr"),
    ],
)
def test_what_cannot_be_trained_and_saved_is_refused(name, reason):
    [(key, rule, _)] = misfits(optimizer=name)
    assert key == "optimizer" and rule.startswith("cannot be taken: ") and reason in rule


@pytest.mark.parametrize(
    ("name", "ours"),
    [("ScheduleFreeAdamW", "schedule_free_adamw"), ("ScheduleFreeSGD", "schedule_free_sgd"), ("SOAP", "soap")],
)
def test_a_part_of_our_own_is_named_where_there_is_one(name, ours):
    [(_, rule, _)] = misfits(optimizer=name)
    assert rule.endswith(f"; use optim={ours}") and ours in parts("optim")
    [(_, rule, _)] = misfits(optimizer="SophiaH")
    assert "use optim=" not in rule


def test_misfits_are_told_together_with_what_was_meant():
    told = misfits(knobs={"beta": [0.9, 0.99], "lr": 0.1, "betas": 0.9, "maximize": 1, "eps": "small"})
    assert [key for key, _, _ in told] == ["knobs.beta", "knobs.lr", "knobs.betas", "knobs.maximize", "knobs.eps"]
    assert told[0][1].startswith("is no knob of ADOPT; there are betas, ") and told[0][2] == "betas"
    assert told[1][1].endswith("optim.lr is its place")
    assert all("must be like the library's value" in rule for _, rule, _ in told[2:])
    [(key, rule, suggestion)] = misfits(optimizer="ADPT")
    assert (key, suggestion) == ("optimizer", "ADOPT") and "there are A2Grad, " in rule
    [(key, rule, _)] = misfits(knobs={"betas": [0.9, 1.5]})
    assert key == "optimizer" and "beta2" in rule
    [(key, rule, _)] = misfits(optimizer="SM3", weight_decay=0.1)
    assert key == "weight_decay" and rule == "SM3 has none; use regularization.weight_decay"


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer.optimizer", None)
    [(key, rule, _)] = misfits()
    assert key == "optimizer" and "pip install 'llmtrain[optim]'" in rule


def test_the_check_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    with torch.device("meta"):
        library(param_groups(torch.nn.Linear(2, 2)), **KNOBS)
    assert torch.equal(before, torch.get_rng_state())
