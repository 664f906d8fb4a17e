"""The paper's figures for one run or several, as PNG files and one HTML page that opens without a network.

Reads nothing but what a run left on disk: `metrics.jsonl` and, where there is one, its summary. `runs.py` reads,
`figures.py` says what is drawn, `drawing.py` draws, `page.py` writes the page.
"""

from collections.abc import Sequence
from pathlib import Path

from opd.errors import ConfigError
from services.trainer.report.figures import draw_figures
from services.trainer.report.page import write_page
from services.trainer.report.runs import read_runs

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes `output` (an .html file, or a folder to get report.html) and its figures to `<stem>_figures` beside it.

    Raises `ConfigError` naming the path of a run that cannot be read or of a file that cannot be written.
    """
    runs = read_runs(run_dirs)
    page = output if output.suffix.lower() in (".html", ".htm") else output / "report.html"
    folder = page.with_name(f"{page.stem}_figures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_page(page, runs, draw_figures(runs, folder))
    except OSError as error:
        raise ConfigError(f"{error.filename or page}: cannot be written ({error.strerror}); choose --output") from error
