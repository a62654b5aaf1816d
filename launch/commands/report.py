"""`dino-scale report`: the report of a run, written anew from what its folder holds now."""

from __future__ import annotations

import argparse

from launch.chain import write_run_report
from launch.run_folder import RunFolder


def run(arguments: argparse.Namespace) -> None:
    folder = RunFolder.open(arguments.run_dir)
    print(write_run_report(folder.path, folder.config))
