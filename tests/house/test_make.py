"""The Makefile: its help, and what it says on a machine without a fitting Python."""

import os
import re
import subprocess

from tests.house.source import ROOT


def make(*arguments):
    """As a user calls it, also when the tests themselves run under make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)


def test_make_alone_lists_every_command():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = {line.split()[1] for line in make().stdout.splitlines()}
    assert listed == set(phony[1].split())


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.9.2";; *) exit 1;; esac\n')
    old.chmod(0o755)
    result = make("install", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert result.returncode != 0
    assert "Python 3.11 or later is needed, found: Python 3.9.2" in result.stderr
    assert "make install PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_an_installation_that_is_up_to_date_is_left_alone(tmp_path):
    (tmp_path / ".installed").touch()
    result = make("install", f"VENV={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "pip" not in result.stdout


def test_continuous_integration_runs_the_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("make test")
