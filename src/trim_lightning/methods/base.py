"""The interface of every selector: see the pool and the targets, score every pool record."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from trim_lightning.errors import UserError, first_line
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import check
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.stages.task import MatchedTokens, SelectionTask

HELPERS = {"base", "cascade", "clusters", "shared"}  # modules of this package that are no methods


class Selector(ABC):
    """One way of scoring the pool. Subclasses are dataclasses whose fields are the keys of ``method``.

    A module ``methods/<name>.py`` with one such class and a file ``conf/method/<name>.yaml`` make a method.

    Attributes:
        needs_targets: False if ``score`` does without a target set; then none is read.
        uses_model: False if ``score`` never asks for the scorer's weights.
        reads_attention: True if it reads the attention of the last ``saliency.num_layers`` layers.
        matches_tokens: True if it reads the groups ``saliency``, ``fingerprint``, ``fallback`` and ``pooler``.
        takes_all: True if every scored record is selected, whatever the budget.
    """

    needs_targets: ClassVar[bool] = True
    uses_model: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = False
    matches_tokens: ClassVar[bool] = False
    takes_all: ClassVar[bool] = False

    @abstractmethod
    def score(self, task: SelectionTask) -> ScoreTable:
        """Score every record of the pool; NaN for records that cannot be scored."""

    def check(self) -> None:  # noqa: B027 (most have nothing to add)
        """Refuse keys of this method that do not go together.

        Raises:
            UserError: naming them.
        """

    def warms_up(self, settings: SelectSettings) -> bool:
        """True if ``score`` warms the scorer up; methods for which that is a choice have the key ``use_warmup``."""
        return self.uses_model and settings.warmup.enabled and getattr(self, "use_warmup", True)

    def scores_responses(self) -> bool:
        """True if a record without a response token has no score."""
        return False

    def takes_gradients(self) -> bool:
        """True if it takes gradients of single records in every layer that has LoRA."""
        return False

    def request(self, task: SelectionTask) -> None:
        """Ask the store for every costly result that ``score`` needs, for a plan; the values are not used.

        The store may answer with results that are not there and cannot be read. The default is ``score`` itself, up
        to where it reads the first of them.
        """
        self.score(task)

    def profile(self, task: SelectionTask, directory: Path) -> None:
        """Trace some batches of this method's scoring pass into a directory (``scoring.profile``)."""
        task.ledger.warn(f"scoring.profile=true: method={task.settings.method['name']} has no pass that is traced")

    def write_extras(self, task: SelectionTask, directory: Path) -> None:  # noqa: B027 (most have none)
        """Write files of this method's own into the output directory."""

    def matched_tokens(self, task: SelectionTask, rows: Sequence[int]) -> Mapping[int, MatchedTokens]:
        """The tokens of a few scored records, after ``score``; nothing from methods that match no tokens."""
        return {}


def method_names() -> list[str]:
    """Names of all methods: every module of the package but those in `HELPERS`."""
    import trim_lightning.methods as package

    return sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - HELPERS)


def load_selector(parameters: Mapping[str, Any]) -> Selector:
    """Build the selector that the ``method`` group asks for.

    Raises:
        UserError: for an unknown method or a parameter of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from trim_lightning.settings.compose import as_plain

    own = dict(parameters)
    name = own.pop("name", None)
    if name not in method_names():
        raise UserError(f"method.name={name}: must be one of {', '.join(method_names())}")
    module = importlib.import_module(f"trim_lightning.methods.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Selector) and value.__module__ == module.__name__
    ]
    (kind,) = classes
    known = {spec.name for spec in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in own:
        if key not in known:
            raise UserError(f"method.{key}: method={name} has no such key; it has {', '.join(sorted(known)) or 'none'}")
    try:
        selector = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), as_plain(own)))
    except OmegaConfBaseException as error:
        raise UserError(f"{'.'.join(filter(None, ['method', error.full_key]))}: {first_line(error)}") from None
    assert isinstance(selector, Selector)
    check(selector, "method.")
    selector.check()
    return selector


def whole_method(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The ``method`` group with every key that the method has, those that were not given at their defaults.

    Raises:
        UserError: as `load_selector`.
    """
    selector: Any = load_selector(parameters)
    return {"name": parameters["name"], **dataclasses.asdict(selector)}
