"""Comparisons of the tiny net: cells equal single runs, are kept, and are gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import qhyvit
from qhyvit.comparison import Comparison, Variant, ablation, worker
from qhyvit.comparison.subjects import Shared, captured
from qhyvit.errors import QhyvitError
from qhyvit.evaluation import evaluate
from qhyvit.models.load import LoadedModel, load_model
from qhyvit.pipeline import quantize
from qhyvit.recipe import Recipe
from tiny import SIDE, Tiny, calibration, pictures


@cache
def tiny() -> LoadedModel:
    """The tiny net, captured once for all tests."""
    return captured(load_model(Tiny(), input_size=SIDE))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data.npz", labels=True)


@pytest.fixture
def compare(data: Path, tmp_path: Path) -> Callable[..., Comparison]:
    def call(models: Any = None, **changes: Any) -> Comparison:
        given = {
            "methods": ("minmax", "mse"),
            "bits": ("w8a8", "w3a3"),
            "seeds": 2,
            "calib": calibration(),
            "data": data,
            "input_size": SIDE,
            "cache": tmp_path / "cells",
            "calibration": {"size": 6},
        }
        return qhyvit.compare(tiny() if models is None else models, **(given | changes))

    return call


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes of all that was really quantized."""
    done: list[Recipe] = []

    def counted(*given: Any, recipe: Recipe, **named: Any) -> Any:
        done.append(recipe)
        return quantize(*given, recipe=recipe, **named)

    monkeypatch.setattr(worker, "quantize", counted)
    return done


def scores(comparison: Comparison) -> list[Any]:
    """All but the seconds."""
    return [(*cell.row, cell.seed, o.float_top1, o.top1, o.agreement, o.sqnr_db, o.notes, o.error)
            for cell, o in comparison.outcomes.items()]  # fmt: skip


def test_a_cell_is_what_quantize_and_evaluate_give(compare: Callable[..., Comparison], data: Path) -> None:
    found = compare(limit=20, scopes=("partial", "full"), methods=("mse",))
    assert len(found.outcomes) == 8
    assert len(found.rows) == 4
    for cell, outcome in found.outcomes.items():
        changes = {"bits": cell.bits, "method": cell.method, "scope": cell.scope, "seed": cell.seed}
        alone = quantize(tiny(), calib=calibration(), calibration={"size": 6}, **changes)
        expected = evaluate(alone, data, limit=20, deployed=False)
        assert expected["float"] is not None
        assert expected["simulated"] is not None
        assert outcome.pictures == 20
        assert outcome.float_top1 == expected["float"].top1
        assert outcome.top1 == expected["simulated"].top1
        assert outcome.agreement == expected["simulated"].agreement
        # the float logits were made in other batches
        assert outcome.sqnr_db == pytest.approx(expected["simulated"].sqnr_db, rel=1e-3)


def test_seeds_draw_pictures_that_all_methods_share(compare: Callable[..., Comparison]) -> None:
    found = compare(bits=("w3a3",), methods=("mse", Variant("same", "mse")), seeds=(4, 7))
    by = {(cell.method, cell.seed): outcome for cell, outcome in found.outcomes.items()}
    assert by["mse", 4].sqnr_db == by["same", 4].sqnr_db != by["mse", 7].sqnr_db


def test_finished_cells_are_not_run_again(compare: Callable[..., Comparison], quantized: list[Recipe]) -> None:
    first = compare()
    assert len(quantized) == 8
    again = compare(methods=("mse", "minmax"))  # order does not decide a cell
    assert len(quantized) == 8
    assert (first.reused, again.reused) == (0, 8)
    assert sorted(scores(again)) == sorted(scores(first))
    assert compare(seeds=3).reused == 8
    assert [recipe.seed for recipe in quantized[8:]] == [2] * 4


@pytest.mark.parametrize(
    "changes",
    [{"limit": 23}, {"calibration": {"size": 7}}, {"target": "simulate"}, {"scopes": ("full",)}, {"data": None}],
    ids=str,
)
def test_what_decides_a_cell_is_in_its_key(
    compare: Callable[..., Comparison], tmp_path: Path, changes: dict[str, Any]
) -> None:
    one = {"methods": ("minmax",), "bits": ("w8a8",), "seeds": 1}
    compare(**one)
    other = pictures(tmp_path / "other.npz", 9)
    changes = {key: other if value is None else value for key, value in changes.items()}
    assert compare(**(one | changes)).reused == 0
    assert compare(**(one | changes)).reused == 1


def test_other_weights_are_another_net(compare: Callable[..., Comparison]) -> None:
    one = {"methods": ("minmax",), "bits": ("w8a8",), "seeds": 1}
    compare(**one)
    net = Tiny()
    with torch.no_grad():
        net.head.weight[0, 0] += 1e-3
    assert compare(net, **one).reused == 0
    assert compare([tiny(), net], **one).reused == 2


def test_a_damaged_cell_is_run_again(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    first = compare()
    files = sorted((tmp_path / "cells").iterdir())
    files[0].write_text(files[0].read_text()[:40])
    files[1].write_text(json.dumps({"outcome": {"unknown": 1}}))
    again = compare()
    assert again.reused == 6
    assert scores(again) == scores(first)


def test_a_cell_that_fails_is_recorded_and_tried_again(
    compare: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch, quantized: list[Recipe]
) -> None:
    with monkeypatch.context() as patch:

        def fail(*given: Any, recipe: Recipe, **named: Any) -> Any:
            if (recipe.bits, recipe.method, recipe.seed) == ("w8a8", "mse", 0):
                raise QhyvitError("Layer head is tired.")
            return quantize(*given, recipe=recipe, **named)

        patch.setattr(worker, "quantize", fail)
        found = compare()
    assert [(str(c), s) for c, s in found.failed.items()] == [
        ("Tiny partial w8a8 mse seed 0", "Layer head is tired.")
    ]  # fmt: skip
    (row,) = (r for r in found.rows if (r.axes["bits"], r.axes["method"]) == ("w8a8", "mse"))
    assert row.seeds == 1
    assert row.mean["top1"] is not None
    assert row.notes[-1] == "failed: Layer head is tired."
    again = compare()
    assert not again.failed
    assert again.reused == 7
    assert [(r.bits, r.method, r.seed) for r in quantized] == [("w8a8", "mse", 0)]


def test_ctrl_c_loses_nothing_finished(compare: Callable[..., Comparison], quantized: list[Recipe]) -> None:
    def stop(*_: Any) -> None:
        if len(quantized) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(on_cell=stop)
    whole = compare()
    assert whole.reused == 3
    assert len(quantized) == 8
    assert len(whole.outcomes) == 8


def test_several_processes_give_the_same(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    few = {"methods": ("mse",), "seeds": 1}
    first = compare(**few)
    second = compare(**few, jobs=2, cache=tmp_path / "others")
    assert second.reused == 0
    assert scores(second) == scores(first)
    assert compare(**few, cache=tmp_path / "others").reused == 2


def test_a_twin_beside_the_net_and_one_that_cannot_be(compare: Callable[..., Comparison]) -> None:
    one = {"methods": ("minmax",), "bits": ("w8a8",), "seeds": 1}
    plain, twin = compare("demo", stress=("none", "ranges"), data="flowers", calib="flowers", limit=4, input_size=None,
                          **one).outcomes.values()  # fmt: skip
    assert twin.error is None
    assert plain.sqnr_db is not None
    assert twin.sqnr_db is not None
    assert plain.sqnr_db > twin.sqnr_db + 3
    assert twin.float_top1 == plain.float_top1
    plain, twin = compare(stress=("none", "ranges:30"), **one).outcomes.values()
    assert plain.error is None
    assert twin.error is not None
    assert "can be stressed" in twin.error


def test_nets_whose_classes_do_not_fit_fail_alone(compare: Callable[..., Comparison]) -> None:
    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 5))
    found = compare([tiny(), small], methods=("minmax",), bits=("w8a8",), seeds=1)
    assert [cell.model for cell in found.failed] == ["Sequential"]
    assert "only 5 outputs" in next(iter(found.failed.values()))
    with pytest.raises(QhyvitError, match=r"Every cell failed; the first, Sequential .* only 5 outputs"):
        compare(small)


# The list of what is compared ------------------------------------------------------------------------------------


def test_methods_carry_options() -> None:
    variant = Variant.parse("qhyvit:variant=paper:bridges=false:positions=64")
    assert variant.method == "qhyvit"
    assert variant.options == {"variant": "paper", "bridges": False, "positions": 64}


def test_the_ablation_adds_one_thing_at_a_time(compare: Callable[..., Comparison]) -> None:
    steps = ablation()
    assert [step.label for step in steps] == ["scale search only", "+ granularity", "+ scheme", "+ bridge blocks"]
    on = [[step.options[key] for key in ("granularity", "scheme", "bridges")] for step in steps]
    assert on == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    found = compare(ablate=True, methods=None, bits=("w4a4",), seeds=1)
    assert [cell.method for cell in found.outcomes] == [step.label for step in steps]
    for cell in found.outcomes:
        recipe = cell.recipe
        assert (recipe.method, recipe.target, recipe.options["variant"]) == ("qhyvit", "simulate", "paper")
        for side in (recipe.weights, recipe.activations):
            assert (side.granularity, side.scheme) == ("per-tensor", "symmetric")
    assert not found.failed
    first, *_, last = found.outcomes.values()
    assert first.sqnr_db is not None
    assert last.sqnr_db is not None
    assert last.sqnr_db != first.sqnr_db  # the steps reach the method; which is better, an untrained net cannot tell


def test_options_of_the_recipe_belong_to_no_method(compare: Callable[..., Comparison]) -> None:
    recipe = Recipe(method="qhyvit", options={"rounds": 1})
    found = compare(recipe=recipe, methods=("mse",), bits=("w8a8",), seeds=1)
    assert not found.failed
    assert {cell.recipe.method for cell in found.outcomes} == {"mse"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ("mze",)}, "Did you mean 'mse'"),
        ({"methods": ("qhyvit:variant",)}, "must be KEY=VALUE"),
        ({"methods": ()}, "list of method values is empty"),
        ({"bits": ("w9a9",)}, "'bits'"),
        ({"scopes": ("half",)}, "'scope'"),
        ({"stress": ("rages:3",)}, "must be ranges, shift or both"),
        ({"target": "toaster"}, "No target is called"),
        ({"data": "nowhere"}, "nowhere"),
        ({"backend": "abacus"}, "no backend 'abacus'"),
        ({"backend": "threading"}, "random numbers"),
        ({"jobs": 0}, "jobs is 0"),
        ({"weights": ["a", "b"]}, "1 models but 2 weights"),
    ],
    ids=str,
)
def test_wrong_wishes_are_refused_before_any_work(
    compare: Callable[..., Comparison], quantized: list[Recipe], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(QhyvitError, match=sentence):
        compare(**changes)
    assert not quantized


def test_a_loaded_model_keeps_its_graph_as_it_was(compare: Callable[..., Comparison]) -> None:
    loaded = load_model(Tiny(), input_size=SIDE)
    before = {k: v.clone() for k, v in loaded.module.state_dict().items()}
    found = compare(loaded, methods=("qhyvit",), bits=("w4a4",), seeds=1)
    assert [cell.model for cell in found.outcomes] == ["Tiny"]
    assert all(torch.equal(v, before[k]) for k, v in loaded.module.state_dict().items())


def test_what_could_not_be_made_does_not_hinder_the_next(tmp_path: Path) -> None:
    shared = Shared(tmp_path)

    def fail(_path: Path) -> None:
        raise QhyvitError("Nothing can be stressed.")

    with pytest.raises(QhyvitError):
        shared._once("twin", fail)
    made = shared._once("net", lambda path: path.joinpath("logits").touch())
    assert (made / "logits").exists()
    assert shared._once("net", fail) == made
