"""State dicts whose state of a run is damaged: refused in one sentence with nothing changed, or the run goes on."""

import copy
import re

import pytest
import torch
from torch import Tensor
from training_models import sparse, train

import sten
from sten.layouts import CSR, NM, FanIn

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:sten. the masks leave rows")]

RUNS = [
    (sten.RigL(24, every=4), CSR()), (sten.DSTEE(24, every=4), CSR()), (sten.SparseMomentum(24, every=4), CSR()),
    (sten.SRigL(24, every=4), FanIn()), (sten.BiMask(refresh=3), NM(2, 4)), (sten.Gradual(1, 20, 4), CSR()),
    (sten.SRSTE(), NM(2, 4)),
]  # fmt: skip
DAMAGE = {
    "minus one": lambda t: ~t if t.dtype == torch.bool else torch.full_like(t, -1),
    "zeros": torch.zeros_like,
    "shorter": lambda t: t[:-1] if t.dim() else t[None],
    "one more dimension": lambda t: t[None],
    "another dtype": lambda t: t.to(torch.complex64),
    "on the meta device": lambda t: t.to("meta"),
    "text": lambda t: "x",
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("method", "layout"), RUNS, ids=[type(method).__name__ for method, _ in RUNS])
def test_damaged_state_of_a_run(method, layout, damage):
    model, optimizer, engine = sparse(method, layout)
    train(model, optimizer, 5)
    good = copy.deepcopy(model.state_dict())
    names = ("mask", "run_", "method_", "momentum_")
    keys = [key for key in good if key.startswith("0.weight_pattern.") and key.split(".")[-1].startswith(names)]
    assert len(keys) >= 4
    for key in keys:
        before = {name: t.clone() for name, t in model.state_dict().items()}
        try:
            model.load_state_dict({**good, key: DAMAGE[damage](good[key])})
        except RuntimeError as error:
            text = str(error)
            assert re.search(r"[02]\.weight: Expected", text), text  # both name the steps of one optimizer
            after = model.state_dict()
            kept = [name for name, t in before.items() if t.shape == after[name].shape and torch.equal(t, after[name])]
            assert kept == list(before), f"{set(before) - set(kept)} changed"
        train(model, optimizer, 4, first=5)  # a due mask update among them
        model.load_state_dict(good)
        assert engine.step == 5


@pytest.mark.parametrize("name", ["run_step", "run_counts", "run_generator", "method_order", "mask"])
def test_a_run_without_a_part_of_its_state_is_refused(name):
    model, optimizer, _ = sparse(sten.BiMask(refresh=3), NM(2, 4))
    train(model, optimizer, 2)
    state = model.state_dict()
    del state["0.weight_pattern." + name]
    with pytest.raises(RuntimeError, match=f"0.weight: Expected the state of a run with '{name}', got one without it"):
        model.load_state_dict(state)


def test_a_method_of_ones_own_checks_its_state():
    class Counts(sten.SET):
        def init(self, view):
            return {"count": torch.zeros(view.weight.shape)}

        def check_state(self, state: dict[str, Tensor]) -> None:
            if bool((state["count"] < 0).any()):
                raise ValueError("Expected counts, got negative numbers.")

    model, optimizer, _ = sparse(Counts(24, every=4))
    train(model, optimizer, 2)
    state = model.state_dict()
    state["2.weight_pattern.method_count"] = torch.full((8, 32), -1.0)
    with pytest.raises(RuntimeError, match=r"2\.weight: Expected counts, got negative numbers\."):
        model.load_state_dict(state)
