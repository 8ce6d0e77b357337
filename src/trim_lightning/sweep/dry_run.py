"""``dry_run=true``: the plan of one or many jobs, before anything is spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from trim_lightning.settings import SelectSettings
from trim_lightning.sweep.estimate import estimate
from trim_lightning.sweep.plan import Plan, plan_jobs
from trim_lightning.sweep.text import plan_text

log = logging.getLogger(__name__)


def dry_run(jobs: Sequence[SelectSettings]) -> Plan:
    """Plan the jobs, measure a sample of their work, and print what they will take.

    Args:
        jobs: Settings of each.

    Raises:
        UserError: if a model cannot be loaded, or the store not written.
    """
    started = time.perf_counter()
    before = time.process_time()  # imports so far, which the run will repeat
    plan = plan_jobs(jobs)
    opening = before + time.perf_counter() - started
    if plan.missing:
        log.info("measuring a sample of the work")
    print(f"\n{plan_text(plan, estimate(plan), opening)}", flush=True)
    return plan
