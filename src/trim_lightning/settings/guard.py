"""What a config may make objects of: launchers, sweepers, Hydra's own callbacks, handlers of log lines.

The project itself instantiates nothing by name: a method, a pooler or a source is chosen by its short name from what
is in the package. Hydra does, for launchers, sweepers, callbacks and logging. Its launchers and sweepers come from its
registered plugins only; callbacks and handlers of log lines may name anything, so they are checked here, before Hydra
makes them, whatever file or override they come from. Hydra's own list of refused names stays in force behind this.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from omegaconf import OmegaConf

from trim_lightning.errors import UserError
from trim_lightning.settings.compose import check_hydra_keys

# Whole names: what begins well may go on through a module's imports, as in ``package.module.os.system``.
ALLOWED = re.compile(
    r"hydra_plugins\.\w+\.\w+\.[A-Z]\w*(Launcher|Sweeper)"
    r"|hydra\._internal\.core_plugins\.(basic_launcher\.BasicLauncher|basic_sweeper\.BasicSweeper)"
    r"|hydra\.experimental\.callbacks\.(LogJobReturnCallback|PickleJobInfoCallback)"
    r"|optuna\.samplers\.[A-Z]\w*Sampler"
)
"""What a ``_target_`` may name: launchers and sweepers, Hydra's own callbacks, Optuna's samplers."""

LOGGING = re.compile(
    r"logging\.(StreamHandler|FileHandler|NullHandler|Formatter|Filter)"
    r"|logging\.handlers\.(RotatingFileHandler|TimedRotatingFileHandler)"
    r"|colorlog\.(ColoredFormatter|StreamHandler)|trim_lightning\.privacy\.LogFormatter"
)
"""Handlers and formatters that a logging section may name."""

MOST_COMPOSED = 1024  # configs that are remembered, 27 kB each
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
OWN_FOLDER = "${hydra.runtime.output_dir}/"
LOGGING_SECTIONS = ("hydra_logging", "job_logging")


def check_instantiated(config: Any) -> None:
    """Refuse a composed config that names something else to be made or called.

    Args:
        config: The whole config, ``hydra`` among its sections.

    Raises:
        UserError: naming the key and the target.
    """
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    for key, target in targets(plain):
        if not (isinstance(target, str) and ALLOWED.fullmatch(target)):
            raise UserError(
                f"{key}={target}: a config names launchers, sweepers and Hydra's own callbacks only; leave it out "
                "(SECURITY.md lists what may stand there)"
            )
    section = plain.get("hydra") if isinstance(plain, Mapping) else None
    if not isinstance(section, Mapping):
        return
    for name in LOGGING_SECTIONS:
        for key, target in factories(section.get(name), f"hydra.{name}"):
            if not (isinstance(target, str) and LOGGING.fullmatch(target)):
                raise UserError(
                    f"{key}={target}: log lines go to the handlers of Python's logging module only; leave it out "
                    "(SECURITY.md lists what may stand there)"
                )


def targets(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every ``_target_`` in nested mappings and lists, with its dotted key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "_target_":
                yield f"{key}.{name}".lstrip("."), inner
            yield from targets(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from targets(inner, f"{key}.{place}")


def factories(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield what a logging section calls or imports: ``()``, ``class``, and every ``ext://`` other than the streams.

    What is looked up elsewhere could become any of these, so it counts too, but for a file in the run's own folder.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in ("()", "class", "."):
                yield f"{key}.{name}", inner
            else:
                yield from factories(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from factories(inner, f"{key}.{place}")
    elif isinstance(value, str) and value not in STREAMS:
        own_file = key.endswith(".filename") and value.startswith(OWN_FOLDER)
        if value.startswith("ext://") or ("${" in value and not own_file):
            yield key, value


@functools.cache
def guard_hydra() -> None:
    """Let `check_instantiated` see every config before Hydra sets up logging from it or makes its callbacks.

    So does `check_hydra_keys`, before a run goes where nobody asked for it. What was composed and checked is
    remembered: for each job Hydra's sweeper, our launcher and Hydra's ask in turn, and each takes as long as a job.

    Hydra has no hook at that place, so its loader of configs is wrapped.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration
    remembered: WeakKeyDictionary[Any, dict[str, bytes]] = (
        WeakKeyDictionary()
    )  # not in the loader: it goes to other jobs

    @functools.wraps(load)
    def checked(loader: Any, *args: Any, **kwargs: Any) -> Any:
        composed = remembered.setdefault(loader, {})
        asked = repr((args, sorted(kwargs.items())))
        if asked in composed:
            return pickle.loads(composed[asked])
        config = load(loader, *args, **kwargs)
        check_instantiated(config)
        check_hydra_keys(config)
        if len(composed) < MOST_COMPOSED:
            composed[asked] = pickle.dumps(config)
        return config

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign, assignment]
