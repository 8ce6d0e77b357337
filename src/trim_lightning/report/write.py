"""Write the report of a selection into its directory."""

from __future__ import annotations

import logging

from trim_lightning.files.atomic import write_text
from trim_lightning.report.facts import SelectionFacts
from trim_lightning.report.selection_facts import Outcome, gather
from trim_lightning.report.selection_page import selection_page
from trim_lightning.runs.names import REPORT

log = logging.getLogger(__name__)


def write_report(outcome: Outcome, examples: int, command: str | None = None) -> SelectionFacts | None:
    """Write ``report.html``; see `gather`.

    A fault in here is told and does no harm: the selection is finished, and the other jobs of a sweep go on.

    Returns:
        What the page shows, None if it could not be made.

    Raises:
        OSError: if the file cannot be written.
    """
    try:
        facts = gather(outcome, examples, command)
        page = selection_page(facts)
    except OSError:
        raise
    except Exception:
        log.exception("%s could not be made; all other files are there", REPORT)
        return None
    write_text(page, outcome.directory / REPORT)
    return facts
