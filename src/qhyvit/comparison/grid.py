"""The cells of a comparison: which method, with which recipe, on which net."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from qhyvit import _yaml
from qhyvit.comparison.peers import PEERS
from qhyvit.errors import RecipeError
from qhyvit.methods import METHODS
from qhyvit.models.stress import Stress
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS

UNSTRESSED = "none"


@dataclass(frozen=True)
class Variant:
    """A method as one compares it.

    Attributes:
        label: its name in the table.
        method: its name in the registry of methods, or of peers (`comparison.peers`).
        options: its own options, the recipe's `options`.
        changes: further recipe keys, for instance `weights={"scheme": "symmetric"}`.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peer(self) -> str | None:
        """The method's name if it is a peer's, another quantizer's; else None."""
        return self.method if self.method in PEERS else None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read "mse", "qhyvit:variant=paper:bridges=false" or a peer's name; values are YAML.

        Raises:
            QhyvitError: if no method is called so.
            RecipeError: if an option is not KEY=VALUE.
        """
        method, *given = text.strip().split(":")
        if method not in PEERS:
            METHODS[method]
        options = {}
        for part in given:
            key, equals, value = part.partition("=")
            try:
                if not key or not equals:
                    raise ValueError
                options[key] = _yaml.load(value)
            except (ValueError, yaml.YAMLError):
                raise RecipeError(
                    f"Method {text!r}: option {part!r} must be KEY=VALUE, as in qhyvit:variant=paper."
                ) from None
        return cls(text.strip(), method, options)


def ablation() -> tuple[Variant, ...]:
    """The steps of Q-HyViT (arXiv 2303.12557, table IV): scale search, granularity, scheme, bridge blocks.

    Each step keeps what the one before has. All start from symmetric quantizers with one scale per tensor, on target
    simulate, which allows every choice that the steps can make.
    """
    plain = {"granularity": "per-tensor", "scheme": "symmetric"}
    changes = {"target": "simulate", "weights": plain, "activations": plain}
    options: dict[str, Any] = {"variant": "paper", "granularity": False, "scheme": False, "bridges": False}
    steps = [Variant("scale search only", "qhyvit", dict(options), changes)]
    for key, label in (("granularity", "+ granularity"), ("scheme", "+ scheme"), ("bridges", "+ bridge blocks")):
        options[key] = True
        steps.append(Variant(label, "qhyvit", dict(options), changes))
    return tuple(steps)


@dataclass(frozen=True, eq=False)
class Cell:
    """One quantization to be scored; the same as itself alone, so that it can be a key.

    Attributes:
        model: label of the net.
        stress: "none", or what was done to the net, as in `load_model`.
        scope, bits, method, seed: what it is called in the table.
        recipe: what is run; it decides alone, the names above only sort. A peer's holds what reaches the peer and
            else the defaults: bits, seed, calibration, saturation.
        peer: name of the other quantizer that runs it; None: qhyvit does.
    """

    model: str
    stress: str
    scope: str
    bits: str
    method: str
    seed: int
    recipe: Recipe
    peer: str | None = None

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """What the row of the table has in common: model, stress, scope, bits, method."""
        return self.model, self.stress, self.scope, self.bits, self.method

    def __str__(self) -> str:
        twin = "" if self.stress == UNSTRESSED else f" stressed {self.stress}"
        return f"{self.model}{twin} {self.scope} {self.bits} {self.method} seed {self.seed}"


def cells(
    models: Sequence[str],
    variants: Sequence[Variant],
    *,
    bits: Sequence[str],
    scopes: Sequence[str],
    seeds: Sequence[int],
    stress: Sequence[str],
    recipe: Recipe,
) -> list[Cell]:
    """All combinations, in the order of the table; whatever can be known to be wrong is refused here.

    Args:
        models: their labels.
        variants: methods.
        bits: recipe key.
        scopes: recipe key `scope`.
        seeds: recipe key `seed`.
        stress: "none" or twins.
        recipe: holds for all else; its `options` are left out, each method has its own.

    Raises:
        QhyvitError: on an unknown target, a recipe that does not validate, an empty list, a peer that is not installed.
    """
    lists = {"model": models, "method": variants, "bits": bits, "scope": scopes, "seed": seeds, "stress": stress}
    for name, given in lists.items():
        if not given:
            raise RecipeError(f"There is nothing to compare: the list of {name} values is empty; give at least one.")
    twins = [UNSTRESSED if s == UNSTRESSED else str(Stress.parse(s)) for s in stress]
    plain = recipe.model_copy(update={"options": {}})
    labelled = {variant.label: variant for variant in variants}
    for variant in variants:
        if variant.peer is not None:
            if variant.options or variant.changes:
                raise RecipeError(f"Method {variant.label!r}: {variant.peer} is another quantizer and has no options.")
            PEERS[variant.peer].check()
    names = itertools.product(*(dict.fromkeys(axis) for axis in (models, twins, scopes, bits, labelled)))
    found = []
    for (model, twin, scope, width, label), seed in itertools.product(names, dict.fromkeys(seeds)):
        variant = labelled[label]
        asked = _recipe(variant, plain, bits=width, scope=scope, seed=seed)
        found.append(Cell(model, twin, scope, width, label, seed, asked, variant.peer))
    return found


def _recipe(variant: Variant, plain: Recipe, *, bits: str, scope: str, seed: int) -> Recipe:
    """What a cell runs, complete for the machine at hand."""
    if variant.peer is not None:  # scope, target and the like do not reach it: its cells differ by nothing else
        asked = Recipe().updated(bits=bits, seed=seed, calibration=plain.calibration, saturation=plain.saturation)
    else:
        changes = {**variant.changes, "method": variant.method, "options": dict(variant.options)}
        asked = plain.updated(**changes, bits=bits, scope=scope, seed=seed)
    return TARGETS[asked.target].prepare(asked)
