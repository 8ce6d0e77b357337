"""``dry_run=true``: the plan of one or many jobs, before anything is spent."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from trim_lightning.files.atomic import write_text
from trim_lightning.pipeline.outputs import writable_directory
from trim_lightning.privacy.paths import shareable
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.sweep.dry_run_text import plan_dict, plan_text
from trim_lightning.sweep.estimate import estimate
from trim_lightning.sweep.plan import Plan, plan_jobs

log = logging.getLogger(__name__)
FILE = "plan.json"


def dry_run(
    jobs: Mapping[int, SelectSettings],
    directory: Path,
    mistakes: Mapping[int, str] | None = None,
    names: Mapping[int, str] | None = None,
) -> Plan:
    """Plan the jobs, measure a sample of their work, print what they will take and write it to ``plan.json``.

    All go by the jobs' numbers; ``mistakes`` has the error line of those without settings.

    Returns:
        The plan; jobs whose work could not be measured are among its problems.

    Raises:
        UserError: if the store or the directory cannot be written.
    """
    started = time.perf_counter()
    before = time.process_time()  # imports so far, which the run will repeat
    plan = plan_jobs(jobs, mistakes)
    opening = before + time.perf_counter() - started
    if plan.missing:
        log.info("measuring a sample of the work")
    estimated = estimate(plan)
    for wanted in plan.wanted:
        if wanted.cost in estimated.failed:
            for number in sorted(wanted.users):
                plan.problems.setdefault(number, estimated.failed[wanted.cost])
    print(f"\n{plan_text(plan, estimated, opening, names)}", flush=True)
    content = json.dumps(shareable(plan_dict(plan, estimated, opening)), indent=2)
    write_text(content + "\n", writable_directory(str(directory), "the output directory") / FILE)
    return plan
