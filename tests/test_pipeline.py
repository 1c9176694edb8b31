"""From a module and pictures to a quantized model: which pictures, which recipe, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from PIL import Image
from torch import Tensor

from qhyvit.data.dataset import open_dataset
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import DataError, ModelError, QhyvitError, TargetError
from qhyvit.models.load import load_model
from qhyvit.pipeline import default_data, export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.targets import onnxruntime
from quick import ranges_only
from tiny import SIDE, Tiny, calibration, fresh, pictures


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tiny(calib: Any = None, **changes: Any) -> QuantizedModel:
    return quantize(Tiny(), calib=images() if calib is None else calib, input_size=SIDE, **ranges_only(changes))


def parameters(model: QuantizedModel) -> dict[str, list[Any]]:
    p = model.parameters
    found = {f"codes {n}": model.codes(n).tolist() for n in p.weights}
    for quantizers in (p.weights, p.activations):
        found |= {n: [q.scale.tolist(), q.zero_point.tolist(), q.spec()] for n, q in quantizers.items()}
    return found | {f"bias {n}": b.tolist() for n, b in p.biases.items()}


def scales(model: QuantizedModel) -> Tensor:
    return torch.stack([q.scale for q in model.parameters.activations.values()])


# Pictures ---------------------------------------------------------------------------------------------------------


def test_the_same_recipe_gives_the_same_parameters() -> None:
    same = {"calibration": {"size": 6}, "bias_correction": True, "seed": 3}
    torch.manual_seed(1)
    first = fresh(**same)
    torch.manual_seed(2)  # what the caller did with random numbers does not matter
    assert parameters(fresh(**same)) == parameters(first)


def test_the_seed_chooses_the_pictures() -> None:
    first, second = (fresh(calibration={"size": 6}, seed=seed) for seed in (0, 1))
    assert not torch.equal(scales(first), scales(second))
    # all sixteen are the same ones, whatever their order
    whole = [scales(fresh(seed=seed, method="minmax")) for seed in (0, 1)]
    torch.testing.assert_close(*whole, rtol=1e-5, atol=0)


def test_path_dataset_and_tensor_are_one(tmp_path: Path) -> None:
    path = pictures(tmp_path / "c.npz", 12)
    dataset = open_dataset(path, "calibration")
    preprocessing = Preprocessing.from_config(load_model(Tiny(), input_size=SIDE).preprocessing_config)
    order = dataset.shuffled(0).batches(preprocessing, 12)
    tensor = torch.cat([batch.images for batch in order])
    found = [tiny(c) for c in (path, str(path), dataset, tensor)]
    for other in found[1:]:
        assert parameters(other) == parameters(found[0])
    assert [m.info["calibration"]["pictures"] for m in found] == [12] * 4
    assert found[3].info["calibration"]["source"] == "a tensor"


def test_the_recipes_size_is_kept() -> None:
    assert parameters(tiny(images(), calibration={"size": 5})) == parameters(tiny(images()[:5]))
    assert tiny(images(), calibration={"size": 5}).info["calibration"]["pictures"] == 5


def test_batches_of_calibration_pictures_do_not_matter() -> None:
    found = [scales(tiny(calibration={"batch": size}, method="minmax")) for size in (1, 5, 16)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=0)


def test_built_in_pictures_where_none_are_given() -> None:
    demo, own = load_model("demo"), load_model(Tiny(), input_size=SIDE)
    assert default_data(demo, "calibration").name == "flowers (built in, calibration)"
    assert default_data(demo, "evaluation").name == "flowers (built in, evaluation)"
    assert default_data(own, "calibration").name == "photos (built in, calibration)"
    model = quantize(Tiny(), input_size=SIDE, method="mse", calibration={"size": 3})
    assert model.info["calibration"] == {"source": "photos (built in, calibration)", "pictures": 3}
    assert model.recipe.calibration.source is None
    assert default_data(model, "evaluation").name == "photos (built in, evaluation)"


def test_the_recipe_names_the_pictures_so_that_it_suffices(tmp_path: Path) -> None:
    first = fresh(calibration={"size": 6})
    assert first.recipe.calibration.source == str(calibration())
    first.recipe.write(tmp_path / "recipe.yaml")
    again = quantize(Tiny(), input_size=SIDE, recipe=tmp_path / "recipe.yaml")
    assert again.recipe == first.recipe
    assert parameters(again) == parameters(first)


def test_given_pictures_win_over_the_recipes() -> None:
    model = fresh(calibration={"source": "nowhere.zip"})
    assert model.recipe.calibration.source == str(calibration())


def test_unreadable_pictures_are_counted_and_named(tmp_path: Path) -> None:
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    model = tiny(tmp_path)
    assert model.info["calibration"]["pictures"] == 3
    (note,) = model.parameters.notes
    assert note.startswith("1 calibration pictures")
    assert "broken.png" in note
    assert not tiny().parameters.notes


@pytest.mark.parametrize(
    ("shape", "given"), [((4, 3, 17, 16), "4×3×17×16"), ((3, 16, 16), "3×16×16"), ((0, 3, 16, 16), "0×3×16×16")]
)
def test_a_tensor_of_another_shape(shape: tuple[int, ...], given: str) -> None:
    with pytest.raises(DataError, match=f"calibration tensor is {given}, but must be .* n×3×16×16"):
        tiny(torch.zeros(shape))


def test_values_that_are_no_numbers() -> None:
    x = images()
    x[3, 1, 2, 2] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        tiny(x)
    net = Tiny()
    with torch.no_grad():
        net.qkv.weight[3, 3] = torch.inf
    with pytest.raises(ModelError, match=r"weight of layer qkv .* not finite"):
        quantize(net, calib=images(), input_size=SIDE)


def test_missing_pictures() -> None:
    with pytest.raises(DataError, match="nowhere"):
        tiny("nowhere")


# Recipe and model -------------------------------------------------------------------------------------------------


def test_a_recipe_can_be_an_object_a_file_or_changes(tmp_path: Path) -> None:
    recipe = Recipe(bits="w6a7", method="minmax", seed=4)
    recipe.write(tmp_path / "r.yaml")
    found = [tiny(recipe=recipe), tiny(recipe=tmp_path / "r.yaml"), tiny(bits="w6a7", method="minmax", seed=4)]
    assert found[0].recipe == found[1].recipe == found[2].recipe
    changed = tiny(recipe=recipe, bits="w5a5")
    assert (changed.recipe.bits, changed.recipe.method, changed.recipe.seed) == ("w5a5", "minmax", 4)
    assert {q.bits for q in changed.parameters.weights.values()} == {5}


def test_what_a_target_decides_is_written_down() -> None:
    assert tiny().recipe.saturation in {"ignore", "unsigned"}
    assert tiny(target="simulate").recipe.saturation == "auto"  # nothing was decided


def test_the_given_module_stays_as_it_was() -> None:
    net = Tiny().train()
    before = copy.deepcopy(net.state_dict())
    quantize(net, calib=images(), input_size=SIDE)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_the_graph_is_the_model() -> None:
    net = Tiny().eval()
    with torch.no_grad():
        torch.testing.assert_close(tiny().graph(images()), net(images()), rtol=1e-4, atol=1e-5)


def test_a_loaded_model_and_its_facts() -> None:
    loaded = load_model(Tiny(), input_size=SIDE)
    model = quantize(loaded, calib=images(), method="mse")
    assert parameters(model) == parameters(tiny())
    assert model.info["model"] == "Tiny"
    assert model.info["num_classes"] == 7
    assert model.info["class_names"] is None
    assert tuple(model.info["preprocessing"]["input_size"]) == (3, SIDE, SIDE)


def test_one_side_alone_may_be_quantized_in_simulation() -> None:
    weights, activations = (tiny(bits=bits, target="simulate") for bits in ("w4a32", "w32a4"))
    assert (len(weights.sites.weights), len(weights.sites.activations)) == (4, 0)
    assert (len(activations.sites.weights), len(activations.sites.activations)) == (
        0,
        len(tiny().sites.activations) - 2,
    )
    with torch.no_grad():
        for model in (weights, activations):
            assert not torch.equal(model.simulation()(images()), model.graph(images()))


# Export -----------------------------------------------------------------------------------------------------------


def test_export_makes_the_folder_and_nothing_else(tmp_path: Path) -> None:
    path = export(tiny(), tmp_path / "a" / "b" / "net.onnx")
    assert path.stat().st_size > 1000
    assert list(path.parent.iterdir()) == [path]


def test_export_of_a_simulated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(target="simulate")
    with pytest.raises(TargetError, match=r"simulate exports nothing.*onnxruntime"):
        export(model, tmp_path / "m.onnx")
    with pytest.raises(QhyvitError, match="No target is called 'onnx'"):
        export(model, tmp_path / "m.onnx", target="onnx")
    for saturating, expected in ((True, TensorProto.UINT8), (False, TensorProto.INT8)):
        monkeypatch.setattr(onnxruntime, "saturates", lambda answer=saturating: answer)
        path = export(model, tmp_path / "m.onnx", target="onnxruntime")
        assert {t.data_type for t in onnx.load(path).graph.initializer if t.name == "head_linear_weight"} == {expected}


def test_export_onto_a_folder_or_through_a_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"is a folder; name a file to export to, such as .*model\.onnx"):
        export(tiny(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="cannot be written"):
        export(tiny(), tmp_path / "file" / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
