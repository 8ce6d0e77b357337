"""Bounds for chat templates, which are programs from elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import jinja2

from trim_lightning.errors import UserError

MOST_SECONDS = 30.0  # of processor time for one record; a template takes milliseconds


class TooSlow(BaseException):
    """A template ran out of its time; no `Exception`, so that a template's own handlers let it pass."""


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Stop what takes too long, by the processor's clock, so that a busy or halted machine decides nothing.

    Only the main thread can be stopped, and only where nobody else uses this timer.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGVTALRM) not in (
        signal.SIG_DFL,
        _too_slow,
    ):
        yield
        return
    signal.signal(signal.SIGVTALRM, _too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow


def refuse_bombs(template: str) -> None:
    """Refuse what one step of the interpreter could be busy with for ever, so that no timer could stop it.

    Raises:
        TemplateSyntaxError: if the template is not one.
        UserError: for a power, which no chat template needs.
    """
    tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template) if kind != "whitespace"]
    before = (("operator", "("), ("operator", ","))  # there two stars hand keyword arguments over
    powers = [place for place, token in enumerate(tokens) if token == ("operator", "**")]
    if any(tokens[place - 1] not in before for place in powers):
        raise UserError(
            "chat template: computes a power (**), which no chat needs; correct it or set model.chat_template"
        )
