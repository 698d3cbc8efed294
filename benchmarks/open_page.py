"""Measure how long headless Chromium takes to open a page of make_report.py and to paint its gallery.

    python -m benchmarks.open_page PAGE.html

Prints the CPU time of all processes of the browser, which other work on the machine hardly changes, and the elapsed
time, for a first and a second opening.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

from playwright.sync_api import sync_playwright


def cpu_seconds() -> float:
    """The CPU time of all descendants of this process."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        process = int(stat.parent.name)
        parents[process], used[process] = int(fields[1]), int(fields[11]) + int(fields[12])

    def is_ours(process: int) -> bool:
        while process > 1 and (process := parents.get(process, 0)) != os.getpid():
            pass
        return process == os.getpid()

    return sum(ticks for process, ticks in used.items() if is_ours(process)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Open the page twice and print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    page_file = parser.parse_args().page.resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=[] if os.geteuid() else ["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(120_000)
        for which in ("first", "second"):
            before, start = cpu_seconds(), time.perf_counter()
            page.goto(page_file.as_uri(), wait_until="commit")
            page.wait_for_function("window.Plotly && document.querySelector('#tiles canvas[data-painted]')")
            print(f"{which}: {cpu_seconds() - before:.1f} CPU s, {time.perf_counter() - start:.1f} s")
            page.goto("about:blank")
        browser.close()


if __name__ == "__main__":
    main()
