"""How a report is shown: as text, as JSON, or as a page."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.errors import say
from tinygpt.storage import write_text
from tinygpt.study.page import page
from tinygpt.study.report import Report, plain_data
from tinygpt.study.terminal import lines


def add_report_flags(parser: Any) -> None:
    """Add the flags that say how."""
    add_flag(parser, "--html", metavar="FILE", help="write one page that stands by itself")
    add_shared(parser, "--json")


def show_report(report: Report, args: argparse.Namespace) -> None:
    """Write the page, print JSON, or where neither is asked for print text."""
    if args.html:
        write_text(Path(args.html), page(report))
        say(f"written to {args.html}")
    if args.json:
        print(json.dumps(plain_data(report.result)))
    elif not args.html:
        width = shutil.get_terminal_size((100, 24)).columns
        for line in lines(report, width, sys.stdout.encoding or "ascii"):
            print(line)
