from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qhyvit import store
from qhyvit._tensors import pack, unpack
from qhyvit.errors import ModelError, QhyvitError
from qhyvit.operators import IntegerSoftmax
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.quantizers.adalog import AdaLog
from qhyvit.quantizers.log import Log2, LogSqrt2
from qhyvit.quantizers.power_of_two import PowerOfTwoFactor
from qhyvit.quantizers.sulq import sulq_from_range
from qhyvit.quantizers.twin import twin_for_probabilities
from qhyvit.recipe import Recipe
from qhyvit.store import check_writable, exported_path, load, save, write_metrics
from tiny import SIDE, calibration, fresh, quantized

PARTS = ("recipe.yaml", "graph.json", "float.safetensors", "quantized.safetensors")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(quantized(), tmp_path_factory.mktemp("saved") / "out", metrics={"top1": 0.5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(quantized(), tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def images(side: int = SIDE) -> Tensor:
    return torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(8))


def assert_same(a: QuantizedModel, b: QuantizedModel, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(a.graph(x), b.graph(x))
        assert torch.equal(a.simulation()(x), b.simulation()(x))


def test_the_loaded_model_is_the_saved_one(saved: Path, tmp_path: Path) -> None:
    original, loaded = quantized(), load(saved)
    assert_same(original, loaded, images())
    assert loaded.sites == original.sites
    assert loaded.recipe == original.recipe
    assert loaded.info == original.info
    assert loaded.integer_bias == original.integer_bias
    assert loaded.parameters.notes == original.parameters.notes
    assert loaded.parameters.biases.keys() == original.parameters.biases.keys() != set()
    export(loaded, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (saved / "model.onnx").read_bytes()


def test_saving_what_was_loaded_changes_no_byte(saved: Path, tmp_path: Path) -> None:
    again = save(load(saved), tmp_path / "elsewhere", metrics={"top1": 0.5})
    assert contents(again) == contents(saved)


def test_quantizing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (save(fresh(), tmp_path / name) for name in ("first", "second"))
    assert contents(first) == contents(second)
    assert contents(first).keys() == {*PARTS, "info.json", "model.onnx"}


def test_a_mobilevit_comes_back(tmp_path: Path) -> None:
    model = quantize("mobilevit_xxs", calib=calibration(), input_size=64, bits="w6a6", method="minmax")
    assert_same(model, load(save(model, tmp_path / "out")), images(64))


def test_a_target_without_export_saves_what_it_allows(tmp_path: Path) -> None:
    fine = {"granularity": "per-channel", "scheme": "asymmetric"}
    recipe = Recipe(target="simulate", bits="w16a16", weights=fine, activations=fine, scope="full")
    model = fresh(recipe=recipe)
    folder = save(model, tmp_path / "out")
    assert exported_path(folder) is None
    assert_same(model, load(folder), images())


def test_codes_that_a_method_rounded_are_kept(tmp_path: Path) -> None:
    model = fresh()
    node = model.sites.weights[1].node
    codes = model.codes(node).clone()
    codes.view(-1)[::2] -= codes.view(-1)[::2].sign()
    model.parameters.codes[node] = codes
    loaded = load(save(model, tmp_path / "out"))
    assert torch.equal(loaded.codes(node), codes)
    assert_same(model, loaded, images())


def test_integers_are_stored_as_integers(saved: Path) -> None:
    tensors = unpack((saved / "quantized.safetensors").read_bytes(), {})
    assert {t.dtype for name, t in tensors.items() if name.endswith(".codes")} == {torch.int8}
    assert sum(name.endswith(".codes") for name in tensors) == len(quantized().sites.weights)


def test_layouts_survive_packing() -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    tensors = {"plain": x, "last": x.to(memory_format=torch.channels_last), "transposed": x[0, 0].t()}
    tensors["ones"] = torch.zeros(4, 3, 1, 1).to(memory_format=torch.channels_last)
    data, strides = pack(tensors)
    assert strides.keys() == {"last", "transposed", "ones"}
    for name, back in unpack(data, json.loads(json.dumps(strides))).items():
        assert torch.equal(back, tensors[name])
        assert back.stride() == tensors[name].stride()


def test_metrics_are_kept_and_replaced(saved: Path, folder: Path) -> None:
    assert json.loads((saved / "metrics.json").read_text()) == {"top1": 0.5}
    write_metrics(folder, {"b": 1, "a": None})
    write_metrics(folder, {"a": 2})
    assert json.loads((folder / "metrics.json").read_text()) == {"a": 2}
    assert contents(folder).keys() == {*PARTS, "info.json", "model.onnx", "metrics.json"}


def test_the_exported_file_is_found(folder: Path) -> None:
    assert exported_path(folder) == folder / "model.onnx"
    (folder / "model.onnx").unlink()
    assert exported_path(folder) is None
    load(folder)  # which does not need it


# Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PARTS, "info.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(folder)


@pytest.mark.parametrize("name", [*PARTS, "info.json"])
@pytest.mark.parametrize("how", ["cut", "emptied", "flipped"])
def test_a_damaged_file_is_named(folder: Path, name: str, how: str) -> None:
    data = bytearray((folder / name).read_bytes())
    middle = len(data) // 2
    if how == "flipped":
        data[middle] ^= 0x80  # never ASCII, so that info.json becomes invalid too
    (folder / name).write_bytes(bytes(data[: {"cut": middle, "emptied": 0}.get(how, len(data))]))
    with pytest.raises(ModelError, match=f"{name} is damaged"):
        load(folder)


def edit_info(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps(info | changes))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Put other contents in place with the checksum that belongs to them, as an attacker would."""
    (folder / name).write_bytes(data)
    sums = json.loads((folder / "info.json").read_text())["sha256"]
    edit_info(folder, sha256=sums | {name: hashlib.sha256(data).hexdigest()})


def test_a_later_format_is_refused_by_its_number(folder: Path) -> None:
    edit_info(folder, version=store.VERSION + 1)
    with pytest.raises(
        ModelError, match=rf"info\.json is of format version {store.VERSION + 1}.*version {store.VERSION}"
    ):
        load(folder)


@pytest.mark.parametrize("key", ["version", "sites", "quantizers", "strides", "sha256", "biases"])
@pytest.mark.parametrize("value", [None, {"weights": {"x": {}}}, ["a"]])
def test_an_info_file_of_another_shape_is_named(folder: Path, key: str, value: Any) -> None:
    edit_info(folder, **{key: value})
    with pytest.raises(ModelError, match=r"info\.json"):
        load(folder)


def test_files_of_two_models_do_not_mix(folder: Path, tmp_path: Path) -> None:
    other = save(fresh(bits="w4a8", overrides=[{"match": "head", "bits": "float"}]), tmp_path / "other")
    for name in ("info.json", "quantized.safetensors"):
        swapped = (other / name).read_bytes()
        mixed = save(quantized(), tmp_path / f"mixed_{name.partition('.')[0]}")
        (mixed / name).write_bytes(swapped)
        with pytest.raises(ModelError, match=r"damaged"):
            load(mixed)


def test_a_crafted_folder_runs_nothing(folder: Path, tmp_path: Path) -> None:
    graph = json.loads((folder / "graph.json").read_text())
    call = next(n for n in graph["nodes"] if n["op"] == "call_function")
    call |= {"target": "aten.from_file.default", "args": [str(tmp_path / "pwned"), True, 8], "kwargs": {}}
    replace_file(folder, "graph.json", json.dumps(graph).encode())
    with pytest.raises(ModelError, match=r"graph\.json.*from_file"):
        load(folder)
    replace_file(folder, "graph.json", b"[" * 100_000)
    with pytest.raises(ModelError, match=r"graph\.json"):
        load(folder)
    replace_file(folder, "float.safetensors", b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"float\.safetensors"):
        load(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder"])
def test_what_is_no_model_is_said_to_be_none(tmp_path: Path, there: str) -> None:
    place = tmp_path / "out"
    if there == "a file":
        place.write_text("x")
    elif there == "an empty folder":
        place.mkdir()
    with pytest.raises(ModelError, match="out"):
        load(place)


# Writing ----------------------------------------------------------------------------------------------------------


def test_a_model_is_only_replaced_when_allowed(folder: Path) -> None:
    before = contents(folder)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ModelError, match="already holds a quantized model"):
        save(quantized(), folder)
    assert save(quantized(), folder, overwrite=True) == folder
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("info", [None, "{}", '{"format": "other"}', "[]", "not JSON"])
def test_foreign_folders_are_left_alone(tmp_path: Path, info: str | None) -> None:
    place = tmp_path / "thesis"
    place.mkdir()
    (place / "chapter.txt").write_text("years of work")
    if info is not None:
        (place / "info.json").write_text(info)
    before = contents(place)
    with pytest.raises(ModelError, match="other things"):
        save(quantized(), place, overwrite=True)
    assert contents(place) == before
    with pytest.raises(ModelError, match="other things"):
        check_writable(place, overwrite=True)


def test_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        save(quantized(), tmp_path / "out", overwrite=True)
    with pytest.raises(ModelError, match="cannot be written"):
        save(quantized(), tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "x"


def test_parents_are_made_and_empty_folders_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    load(save(quantized(), tmp_path / "empty"))
    load(save(quantized(), tmp_path / "a" / "b" / "c"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, overwrite: bool
) -> None:
    before = contents(save(quantized(), tmp_path / "out")) if overwrite else {}

    def interrupt(*_: object) -> None:
        raise error

    monkeypatch.setattr(store, "to_json", interrupt)
    with pytest.raises((KeyboardInterrupt, ModelError)):
        save(quantized(), tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupt_between_the_renames_leaves_a_whole_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    before, renamed, real = contents(folder), 0, Path.rename

    def rename(self: Path, target: Path) -> Path:
        nonlocal renamed
        result = real(self, target)
        renamed += 1
        if renamed == after:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        save(quantized(), folder, overwrite=True)
    monkeypatch.undo()
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_an_operator_without_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qhyvit.targets import onnx_ops

    monkeypatch.delitem(onnx_ops.LOWERINGS, torch.ops.aten.softmax.int)
    with pytest.raises(QhyvitError, match="softmax"):
        save(quantized(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_number_format_and_integer_operator_is_kept(tmp_path: Path) -> None:
    model = fresh(recipe=Recipe(target="simulate", scope="full"))
    softmax = next(n for n in model.nodes if n.startswith("softmax"))
    one = torch.ones(())
    formats = [
        Log2(one, bits=4),
        LogSqrt2(one * 0.9, bits=4),
        AdaLog(one * 0.7, bits=4, q=23, shift=0.1),
        sulq_from_range(one * 1e-4, one, 1e-3, bits=4),
        twin_for_probabilities(0.25, bits=4),
        PowerOfTwoFactor(torch.full((16,), 0.5), torch.zeros(16).int(), torch.ones(16).int(), bits=8, axis=-1),
    ]
    x = images()
    for quantizer in formats[:-1]:
        model.parameters.activations[softmax] = quantizer
        loaded = load(save(model, tmp_path / quantizer.kind))
        assert_same(model, loaded, x)
        assert loaded.parameters.activations[softmax].spec() == quantizer.spec()
    tokens = next(s for s in model.sites.activations if s.shape[-1] == 16 and len(s.shape) == 3)
    model.parameters.activations[tokens.value] = formats[-1]
    model.parameters.operators[softmax] = IntegerSoftmax(one * 0.01, bits=4, axis=-1, exponential="linear")
    loaded = load(save(model, tmp_path / "operators"))
    assert_same(model, loaded, x)
    assert not torch.equal(loaded.simulation()(x), model.simulation(integer=False)(x))
