"""What saves cost, in the user's logger and as one line in the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_info
from torchmetrics import MaxMetric, Metric, SumMetric

from lightning_zero.checkpoint.report import SaveReport

HISTORY_SAVES = 1000
"""Of so many, the figures are kept: a training that goes on for weeks needs no more memory for it."""


class SaveTelemetry:
    """Tells of every save as metrics, on rank 0 and at the step that was saved.

    | metric | what it is |
    |---|---|
    | `checkpoint/stall_seconds` | how long training waited |
    | `checkpoint/seconds` | from the call until the checkpoint was committed |
    | `checkpoint/bytes` | of the whole checkpoint |
    | `checkpoint/written_bytes` | of it, what was not linked from the checkpoint before |
    | `checkpoint/gigabytes_per_second` | what was written, over the seconds |
    | `checkpoint/slowest_rank` | the rank that wrote longest |
    | `checkpoint/slowest_rank_seconds` | how long that was |
    | `checkpoint/total_stall_seconds` | all of the fit's so far |
    """

    def __init__(self) -> None:
        # The ranks' reports are gathered with the save: nothing is left to be synchronised
        self._slowest: Metric = MaxMetric(sync_on_compute=False)
        self._total_stall: Metric = SumMetric(sync_on_compute=False)
        self.history: deque[dict[str, float]] = deque(maxlen=HISTORY_SAVES)
        """The metrics of the newest saves of this process, with their step."""

    def log(self, report: SaveReport, loggers: Iterable[Logger]) -> None:
        """Tell of one save."""
        rank_zero_info(str(report))
        self._slowest.reset()
        for seconds in report.rank_seconds:
            self._slowest.update(seconds)
        self._total_stall.update(report.stall_seconds)
        metrics = {
            "stall_seconds": report.stall_seconds,
            "seconds": report.seconds,
            "bytes": report.bytes,
            "written_bytes": report.written_bytes,
            "gigabytes_per_second": report.written_bytes / 1e9 / report.seconds,
            "slowest_rank": report.slowest_rank,
            "slowest_rank_seconds": float(self._slowest.compute()),
            "total_stall_seconds": float(self._total_stall.compute()),
        }
        self.history.append({"step": report.step, **metrics})
        for logger in loggers:
            logger.log_metrics({f"checkpoint/{name}": value for name, value in metrics.items()}, step=report.step)
