"""Scores of a model: accuracy where there are labels, and how far quantization moved the logits in any case."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qhyvit.data.dataset import Batch, Dataset, open_dataset
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import DataError
from qhyvit.models.load import LoadedModel
from qhyvit.pipeline import default_data
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel
from qhyvit.runtime import session
from qhyvit.targets import TARGETS

SQNR_LIMIT = 200.0  # dB; equal tensors have no noise, and JSON no infinity


@dataclass(frozen=True)
class Scores:
    """How one form of a model (float, simulated, deployed) did.

    Attributes:
        top1: fraction of pictures whose largest logit is their label's; None without labels.
        top5: fraction whose label is among the five largest logits (all, if there are fewer); None without labels.
        agreement: fraction whose largest logit is also the float model's; None for the float model.
        sqnr_db: of all logits against the float model's, in dB, at most ±200; None for the float model.
        pictures: how many were read.
    """

    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float | None
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded to 6 digits, JSON-able."""
        return rounded(asdict(self))


class Tally:
    """Sums over batches of logits; memory does not depend on the number of pictures."""

    def __init__(self) -> None:
        self.pictures = self.labelled = self._top1 = self._top5 = self._agreeing = 0
        self._signal = self._noise = 0.0
        self._reference = False

    def update(self, logits: Tensor, labels: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add a batch: logits (n, classes), labels int64 (n,), and the logits they are compared with."""
        self.pictures += len(logits)
        if labels is not None:
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            self.labelled += len(labels)
            self._top1 += int((logits.argmax(1) == labels).sum())
            self._top5 += int((best == labels[:, None]).any(1).sum())
        if reference is not None:
            self._reference = True
            self._agreeing += int((logits.argmax(1) == reference.argmax(1)).sum())
            self._signal += float(reference.double().square().sum())
            self._noise += float((reference.double() - logits.double()).square().sum())

    @property
    def agreement(self) -> float | None:
        """Fraction of pictures with the reference's class; None without a reference."""
        return self._agreeing / self.pictures if self._reference else None

    @property
    def sqnr_db(self) -> float | None:
        """10·log10(Σ reference² / Σ (reference - logits)²), see `sqnr`; None without a reference."""
        return sqnr(self._signal, self._noise) if self._reference else None

    def scores(self) -> Scores:
        """What the sums amount to."""
        top1, top5 = (n / self.labelled if self.labelled else None for n in (self._top1, self._top5))
        return Scores(top1, top5, self.agreement, self.sqnr_db, self.pictures)


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise in dB from two sums of squares, at most ±200; -200 where one is not finite."""
    if noise == 0:
        return SQNR_LIMIT
    ratio = signal / noise
    if not ratio > 0 or not math.isfinite(ratio):  # NaN too
        return -SQNR_LIMIT
    return max(-SQNR_LIMIT, min(SQNR_LIMIT, 10 * math.log10(ratio)))


def evaluate(
    model: QuantizedModel | LoadedModel,
    data: Dataset | str | Path | None = None,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch: int = 32,
    deployed: bool = True,
) -> dict[str, Scores | None]:
    """Score the float, the simulated and the deployed model in one pass over the pictures.

    Args:
        model: a quantized model, or one as loaded, of which there is only the float form.
        data: pictures: a folder, zip, npz, built-in name or `Dataset`; unlabelled ones give agreement and SQNR only.
            Default: the evaluation part of the built-in set that fits the model; where its labels do not fit a
            quantized model, they are left aside.
        folder: where the quantized model was saved; None: it is exported to a temporary folder.
        limit: score so many pictures, drawn with a fixed seed.
        batch: pictures at a time.
        deployed: whether to run the target's runtime, where the target has one.

    Returns:
        "float", "simulated", "deployed", in this order; None for what was not run.

    Raises:
        DataError: if labels and outputs do not fit each other, or no picture can be read.
        ModelError: if `folder` lacks the exported file.
    """
    pictures, labels_fit = with_labels(model, data)
    runs: dict[str, Callable[[Tensor], Tensor] | None] = {"float": None, "simulated": None, "deployed": None}
    with ExitStack() as stack, torch.no_grad():
        if isinstance(model, LoadedModel):
            # a copy: some nets cache tables on their first run, which would change what is captured from them later
            runs["float"] = runner(copy.deepcopy(model.module))
        else:
            runs |= {"float": runner(model.graph), "simulated": runner(model.simulation())}
            if deployed and TARGETS[model.recipe.target].export is not None:
                runs["deployed"] = stack.enter_context(session(model, folder)).run
        tallies = {name: Tally() for name, run in runs.items() if run is not None}
        for item in stream(model, pictures, "Evaluating", limit, batch):
            logits = {name: run(item.images) for name, run in runs.items() if run is not None}
            for name, tally in tallies.items():
                reference = None if name == "float" else logits["float"]
                tally.update(logits[name], item.labels if labels_fit else None, reference)
    return {name: tallies[name].scores() if name in tallies else None for name in runs}


def with_labels(model: QuantizedModel | LoadedModel, data: Dataset | str | Path | None) -> tuple[Dataset, bool]:
    """The pictures to evaluate on, and whether their labels, if there are any, index the model's outputs.

    Raises:
        DataError: if they do not, unless the pictures are the default ones and there is something to score without.
    """
    pictures, known = opened(model, data), as_loaded(model)
    try:
        return pictures.check_labels(known.num_classes, known.class_names), True
    except DataError:
        if data is not None:
            raise
        if isinstance(model, QuantizedModel):
            return pictures, False
        raise DataError(
            f"The pictures that ship with qhyvit ({pictures.name}) have other labels than the {known.num_classes} "
            f"classes of {known.name}; give labelled pictures of its classes with --data."
        ) from None


def opened(model: QuantizedModel | LoadedModel, data: Dataset | str | Path | None) -> Dataset:
    """The pictures to evaluate on; the built-in ones that fit the model if none are given."""
    if data is None:
        return default_data(model, "evaluation")
    return data if isinstance(data, Dataset) else open_dataset(data, "evaluation")


def stream(
    model: QuantizedModel | LoadedModel, pictures: Dataset, description: str, limit: int | None, batch: int
) -> Iterator[Batch]:
    """Batches preprocessed for a model, under a progress bar; a limit draws from all classes, always the same."""
    count = len(pictures) if limit is None else min(limit, len(pictures))
    if count < len(pictures):
        pictures = pictures.shuffled(0)
    preprocessing = Preprocessing.from_config(as_loaded(model).preprocessing_config)
    with task(description, count) as advance:
        for item in pictures.batches(preprocessing, batch, limit):
            yield item
            advance(len(item.images))


def as_loaded(model: QuantizedModel | LoadedModel) -> LoadedModel:
    """The float model behind a quantized one, as captured, with what is known about it."""
    if isinstance(model, LoadedModel):
        return model
    info = model.info
    names = tuple(info["class_names"]) if info["class_names"] else None
    return LoadedModel(
        info["model"], model.graph, info["preprocessing"], info["num_classes"], names, info["source"], info["trained"]
    )


def runner(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from pictures to logits on the CPU, float32; the model runs where its weights are."""
    first = next((t for tensors in (module.parameters(), module.buffers()) for t in tensors), None)

    def run(images: Tensor) -> Tensor:
        out: Tensor = module(images if first is None else images.to(first.device))
        return out.float().cpu()

    return run


def rounded(fields: dict[str, Any]) -> dict[str, Any]:
    """The same with floats rounded to 6 digits."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in fields.items()}
