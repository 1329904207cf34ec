"""A federation set up by what the documentation says, word for word, and nothing else."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from fedfuse.cli import main
from fedfuse.federation.processes import Process, free_port, wait_until
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.runfolder import RunFolder
from tests.federation.deployment import ROOT, documented, says

REAL = ROOT.parent / "shared" / "data" / "digits-av"
ROUNDS = 5 if os.environ.get("FEDFUSE_ALL") else 2
SCENARIO = {
    "name": "speakers",
    "data": {"image_size": 28, "audio_seconds": 0.5, "sample_rate": 8000},
    "model": {"dim": 8, "head_width": 8, "image_width": 4, "audio_width": 4, "text_width": 8},
    "train": {"rounds": ROUNDS, "local_steps": 3},
    "privacy": {"declared_records": 40, "epsilon": 2.0, "delta": 1e-6, "noise_seed": "a trial"},
    "federation": {"min_nodes": 3, "workers": 2},
}


def sites(folder: Path) -> tuple[list[Path], Path, Path]:
    """A folder of its own for each of four speakers, with 40 train records and no others'; the
    manifests of 60 public test records, and of these with the train records of three speakers."""
    source = REAL / "manifest_hard.csv"
    if not source.is_file():
        by_command_line("data", "demo", folder / "demo")
        source = folder / "demo" / "manifest.csv"
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["client"] for row in rows})[:4]
    of = {
        name: [r for r in rows if (r["client"], r["split"]) == (name, "train")][:40]
        for name in names
    }
    test = [r for r in rows if r["client"] in names[:3] and r["split"] == "test"][::2][:60]

    def written(where: Path, kept: list[dict[str, str]]) -> Path:
        where.mkdir()
        for path in source.parent.glob("dataset.*"):
            shutil.copy(path, where)
        for cell in (cell for row in kept for cell in row.values() if "/" in cell):
            if (source.parent / cell).is_file():
                (where / cell).parent.mkdir(exist_ok=True)
                shutil.copy(source.parent / cell, where / cell)
        with (where / "records.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(kept)
        return where / "records.csv"

    return (
        [written(folder / name, own) for name, own in of.items()],
        written(folder / "public", test),
        written(folder / "whole", [r for name in names[:3] for r in of[name]] + test),
    )


@pytest.mark.slow
def test_three_nodes_set_up_by_the_docs_end_where_a_simulation_ends(tmp_path: Path) -> None:
    """The same scenario, the same noise by a seed that their operators allowed for a trial, and the
    same epsilon. A fourth node has the policy that `init` gives: it refuses, and both sides say so.
    """
    manifests, public, whole = sites(tmp_path)
    fedfuse, scenario, port = by_command_line, tmp_path / "run.toml", free_port()
    scenario.write_text(tomli_w.dumps(SCENARIO))
    srv = tmp_path / "srv"
    init, prepare, start, register, run, status, stop = documented(
        "server.md", srv=srv, fl_example_org="localhost", public_csv=public, run_toml=scenario
    )
    fedfuse(*init, "--port", port)
    fedfuse(*prepare)
    with ExitStack() as stack:
        server = stack.enter_context(at_work(start, tmp_path / "server.log"))
        says(server, "the server answers")
        running = []
        for manifest in manifests:
            node = manifest.parent / "clinic"
            words = documented(
                "node.md", clinic=node, clinic_a=manifest.parent.name,
                server_pub=srv / "server.pub", fl_example_org_9092=f"localhost:{port}",
                ca_pem=srv / "tls" / "authority.pem", records_csv=manifest, run_toml=scenario,
                _mnt_other_clinic_anchor=manifest.parent / "anchor",
            )  # fmt: skip
            for command in words[:2]:
                fedfuse(*command)
            if manifest is not manifests[-1]:
                settings = node / "node.toml"
                text = settings.read_text()
                settings.write_text(text.replace("seeded_noise = false", "seeded_noise = true"))
            fedfuse(*[str(node / "supernode.pub") if w == "clinic-a.pub" else w for w in register])
            assert "✗" not in fedfuse(*words[2]).stdout
            running.append(stack.enter_context(at_work(words[3], node.with_suffix(".log"))))
        shown = tmp_path / "nodes.txt"

        def connected() -> bool:
            shown.write_text(fedfuse(*status).stdout)
            return shown.read_text().count(" online ") == 4

        wait_until(connected, 120, "the nodes do not connect", *running)
        told = fedfuse(*run)
        assert fedfuse(*words[4]).stdout.startswith(f"node   {manifests[-1].parent.name}, running")
        fedfuse(*stop)
    *trials, strict = [manifest.parent for manifest in manifests]
    refusal = "PrivacyError: privacy.noise_seed is set: the server could take such noise off"
    assert told.stderr.count(f"failed: {refusal}") == ROUNDS
    assert "NOT PRIVATE: nothing in this run is protected" in told.stderr
    assert "*** NOT PRIVATE ***  the noise follows from privacy.noise_seed" in told.stdout
    assert (strict / "clinic.log").read_text().count(f"refused ({refusal}") == ROUNDS
    assert Ledger.open(strict / "clinic" / "ledger").datasets() == ()
    folder = Path(re.findall(r"^Flower's run \d+, in (.+)$", told.stderr, re.M)[0])
    report = fedfuse("report", "privacy", folder)
    assert "*** NOT PRIVATE ***" in report.stdout
    assert not (folder / "certificate.json").exists()
    for name in trials:
        assert "NOT PRIVATE: no figure holds" in (name / "clinic.log").read_text()
        assert verify(name / "clinic" / "ledger", anchor=name / "anchor").holds
    fedfuse("simulate", scenario, "--data", whole, "--out", tmp_path / "simulated")
    ours, simulated = RunFolder.open(folder), RunFolder.open(tmp_path / "simulated")
    found, wanted = ours.model()[0], simulated.model()[0]
    assert found.keys() == wanted.keys()
    for name, value in found.items():  # to float rounding: a vault's arrays lie otherwise in memory
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-6, err_msg=name)
    real, made = ours.summary(), simulated.summary()
    assert real is not None
    assert made is not None
    assert real["privacy"]["epsilon_by_node"] == made["privacy"]["epsilon_by_node"]
    assert (real["privacy"]["private"], made["privacy"]["private"]) == (False, True)
    assert real["metrics"] == pytest.approx(made["metrics"], abs=1e-5)


def by_command_line(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """One command line in this process, which has loaded all; it must end with `code`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        ended = main(list(map(str, words)))
    assert ended == code, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(words, ended, out.getvalue(), err.getvalue())


def at_work(words: list[str], log: Path) -> Process:
    """A command that goes on until it is ended."""
    return Process(
        [sys.executable, "-m", "fedfuse", *words],
        environment=os.environ,
        folder=log.parent,
        log=log,
    )
