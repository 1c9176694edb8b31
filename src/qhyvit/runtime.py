"""A quantized model in the runtime that it was quantized for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qhyvit.errors import ModelError, TargetError
from qhyvit.quantized import QuantizedModel
from qhyvit.targets import TARGETS, Session


@contextmanager
def session(
    model: QuantizedModel, folder: str | Path | None = None, *, quantized: bool = True, threads: int | None = None
) -> Iterator[Session]:
    """The model in its target's runtime, for the time of a with-block.

    Args:
        model: what to run.
        folder: where it was saved; None: it is exported to a temporary folder first, as the float model always is.
        quantized: False runs the float model instead.
        threads: None: the runtime's default.

    Raises:
        TargetError: if the target has no runtime.
        ModelError: if the folder lacks the target's file.
    """
    target = TARGETS[model.recipe.target]
    if target.export is None or target.load is None or target.file_name is None:
        raise TargetError(
            f"Target {target.name} runs nowhere; quantize for a target that exports, such as onnxruntime."
        )
    if folder is not None and quantized:
        path = Path(folder).expanduser() / target.file_name
        if not path.is_file():
            raise ModelError(f"{path} is missing; save the model again.")
        yield target.load(path, threads)
        return
    with tempfile.TemporaryDirectory(prefix="qhyvit-") as scratch:
        path = Path(scratch) / target.file_name
        target.export(model, path, quantized)
        yield target.load(path, threads)
