"""One federation, run by fedfuse, by plain Flower on Ray, and by a bare loop; whole processes.

    python benchmarks/federation.py                  # five alternated runs of each, an hour
    python benchmarks/federation.py --quick          # one of each
    python benchmarks/federation.py --sides bare,loopback --runs 3
    python benchmarks/federation.py --device cuda    # all sides train on the GPU

20 clients with 200 records each, images, sounds and texts, 5 rounds of 7 steps of about 32 records,
a model of about 140,000 trained parameters, the test records evaluated after each round. All sides
start from the same manifest, read it by the same code and build the same model; what differs is
what runs them:

    bare       one process, one model, a loop over the clients; torch's own number of threads
    flower     Flower's simulation on Ray, one client a core. With DP as in Flower's Opacus example:
               a PrivacyEngine for each message, and its epsilon asked for at the end of each. On a
               GPU four clients share it
    loopback   `fedfuse simulate`, with its books, checkpoints, curves and summary
    ray        the same with federation.engine = "ray"

Prints Markdown: medians of wall and CPU time, of peak memory (sum of PSS), and ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, RECORDS, TEST, ROUNDS, STEPS, BATCH = 20, 200, 400, 5, 7, 32
RATE, SIGMA, C, LEARNING_RATE = BATCH / RECORDS, 1.0, 1.0, 0.1
SIDES = ("bare", "flower", "loopback", "ray")
SETTINGS = {
    "name": "benchmark",
    "data.partition": "iid",
    "data.nodes": CLIENTS,
    "model.image_width": 16,
    "model.audio_width": 16,
    "train.rounds": ROUNDS,
    "train.local_steps": STEPS,
    "train.batch_size": BATCH,
    "train.learning_rate": LEARNING_RATE,
    "train.schedule": "constant",
    "train.device": "cpu",
    "privacy.sample_rate": RATE,
    "privacy.noise_multiplier": SIGMA,
    "privacy.declared_records": RECORDS,
    "privacy.epsilon": 100.0,
}


def write_data(folder: Path) -> Path:
    """The demo data, 4000 train and 400 test records of it."""
    from fedfuse.data.demo import make_demo

    manifest = make_demo(folder, records=6000, clients=CLIENTS)
    head, *rows = manifest.read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if row.split(",")[1] == "train"][: CLIENTS * RECORDS]
    kept += [row for row in rows if row.split(",")[1] == "test"][:TEST]
    manifest.write_text("\n".join([head, *kept, ""]), encoding="utf-8")
    return manifest


def fedfuse_command(
    manifest: Path, engine: str, private: bool, out: Path, rounds: int, device: str
) -> list[str]:
    """`fedfuse simulate`, as a user would call it."""
    values = SETTINGS | {
        "federation.engine": engine, "train.rounds": rounds, "train.device": device,
    }  # fmt: skip
    command = [sys.executable, "-m", "fedfuse", "simulate", "--data", str(manifest)]
    command += ["--out", str(out), "--unit", "record" if private else "none"]
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    return command


# ---- the two sides without fedfuse's federation


def config_of(manifest: str) -> Any:
    """The configuration, for what all sides share: data and model."""
    from fedfuse.config import RunConfig

    return RunConfig().with_values(SETTINGS | {"data.manifest": manifest})


def model_of(config: Any, schema: Any) -> Any:
    """The model, taking a record's tensors one by one, as Opacus's loaders give them."""
    from torch import nn

    from fedfuse.batch import Batch
    from fedfuse.models.model import build_model

    class OfTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(
                schema, config.model, vocabulary=config.data.vocabulary, seed=config.seed
            )

        def forward(self, *tensors: Any) -> Any:
            names = schema.names
            inputs, present = tensors[: len(names)], tensors[len(names) :]
            batch = Batch(
                dict(zip(names, inputs, strict=True)),
                dict(zip(names, present, strict=True)),
                inputs[0],
            )
            return self.inner(batch)

    return OfTensors()


def tensors_of(dataset: Any, device: str) -> Any:
    """A data set in the memory of `device`, as a TensorDataset."""
    import numpy as np
    from torch.utils.data import TensorDataset

    batch = dataset.batch(np.arange(len(dataset))).to(device)
    names = dataset.schema.names
    return TensorDataset(
        *(batch.inputs[n] for n in names), *(batch.present[n] for n in names), batch.target
    )


def accuracy(model: Any, dataset: Any) -> float:
    """On the test records."""
    import torch

    *inputs, target = dataset.tensors
    model.eval()
    with torch.no_grad():
        return float((model(*inputs).argmax(1) == target).float().mean())


def train_plain(model: Any, loader: Any) -> None:
    """One pass."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    model.train()
    for *inputs, target in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(*inputs), target).backward()
        optimizer.step()


def run_bare(manifest: str, private: bool, rounds: int, device: str) -> None:
    """One process, one model."""
    import torch
    from torch.utils.data import DataLoader

    from fedfuse.data.prepare import prepare

    config = config_of(manifest)
    prepared = prepare(config.data, seed=config.seed)
    shards = range(len(prepared.shards))
    nodes = [tensors_of(prepared.node(number), device) for number in shards]
    test = tensors_of(prepared.test, device)
    model: Any = model_of(config, prepared.schema).to(device)
    if private:
        from opacus import GradSampleModule
        from opacus.data_loader import DPDataLoader
        from opacus.optimizers import DPOptimizer

        model = GradSampleModule(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(rounds):
        total = {name: torch.zeros_like(weights[name]) for name in names}
        for data in nodes:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(weights[name])
            if private:
                loader = DPDataLoader.from_data_loader(DataLoader(data, batch_size=BATCH))
                optimizer = DPOptimizer(
                    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9),
                    noise_multiplier=SIGMA,
                    max_grad_norm=C,
                    expected_batch_size=BATCH,
                )
                model.train()
                for *inputs, target in loader:
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(*inputs), target).backward()
                    optimizer.step()
            else:
                train_plain(model, DataLoader(data, batch_size=BATCH, shuffle=True))
            for name, p in model.named_parameters():
                total[name] += p.detach()
        weights |= {name: value / len(nodes) for name, value in total.items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        print(f"accuracy {accuracy(model, test):.3f}", flush=True)


def run_flower(manifest: str, private: bool, rounds: int, device: str) -> None:
    """Flower's simulation, client and server as its PyTorch and Opacus examples have them."""
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from torch.utils.data import DataLoader

    from fedfuse.data.prepare import open_node, open_split, prepare

    config = config_of(manifest)
    folder = tempfile.TemporaryDirectory()
    store = Path(folder.name) / "store"
    prepared = prepare(config.data, seed=config.seed)
    prepared.write(store)
    schema = prepared.schema
    test = tensors_of(open_split(store, "test"), device)
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model: Any = model_of(config, schema).to(device)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        _, dataset = open_node(store, int(context.node_config["partition-id"]))
        loader = DataLoader(tensors_of(dataset, device), batch_size=BATCH, shuffle=True)
        metrics: dict[str, float] = {"num-examples": float(len(dataset))}
        if private:
            from opacus import PrivacyEngine

            optimizer: Any = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
            engine = PrivacyEngine(secure_mode=False)
            trained, optimizer, loader = engine.make_private(
                module=model,
                optimizer=optimizer,
                data_loader=loader,
                noise_multiplier=SIGMA,
                max_grad_norm=C,
            )
            trained.train()
            for *inputs, target in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(trained(*inputs), target).backward()
                optimizer.step()
            metrics["epsilon"] = engine.get_epsilon(delta=1e-5)
        else:
            train_plain(model, loader)
        content = RecordDict(
            {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
        )
        return Message(content=content, reply_to=message)

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        model = model_of(config, schema).to(device)

        def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
            model.load_state_dict(arrays.to_torch_state_dict())
            figure = accuracy(model, test)
            print(f"accuracy {figure:.3f}", flush=True)
            return MetricRecord({"accuracy": figure})

        FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS).start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            train_config=ConfigRecord({"lr": LEARNING_RATE}),
            num_rounds=rounds,
            evaluate_fn=evaluate,
        )

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.25 if device == "cuda" else 0.0}
        },
    )
    folder.cleanup()


# ---- all of them


def main() -> None:
    """Runs the sides in turn and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each side, in turn")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=0, help="of torch in a process; 0: its own")
    parser.add_argument("--dp", default="without,with", help="without, with or both")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--side", choices=("bare", "flower"), help=argparse.SUPPRESS)
    parser.add_argument("--private", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--manifest", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side == "bare":
        run_bare(chosen.manifest, chosen.private, chosen.rounds, chosen.device)
    elif chosen.side == "flower":
        run_flower(chosen.manifest, chosen.private, chosen.rounds, chosen.device)
    else:
        compare(
            tuple(chosen.sides.split(",")),
            tuple(word == "with" for word in chosen.dp.split(",")),
            1 if chosen.quick else chosen.runs,
            rounds=chosen.rounds,
            threads=chosen.threads,
            device=chosen.device,
        )


def compare(
    sides: tuple[str, ...], privates: tuple[bool, ...], runs: int, *, rounds: int, threads: int,
    device: str,
) -> None:  # fmt: skip
    """The table of all sides, alternated."""
    from measure import Measured, machine, measure, medians

    from fedfuse.errors import ModelError
    from fedfuse.train import pick_device

    try:
        pick_device(device)
    except ModelError as error:
        sys.exit(str(error))
    jobs = [(side, private) for private in privates for side in sides]
    found: dict[tuple[str, bool], list[Measured]] = {job: [] for job in jobs}
    # Whatever a side takes, no other threads than it asks for; and nothing goes out.
    env = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.pop("OMP_NUM_THREADS", None)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_data(Path(folder) / "data")
        for run in range(runs):
            for side, private in jobs:
                if side in ("loopback", "ray"):
                    out = Path(folder) / f"{side}-{private}-{run}"
                    command = fedfuse_command(manifest, side, private, out, rounds, device)
                else:
                    command = [sys.executable, __file__, "--side", side, "--device", device]
                    command += ["--manifest", str(manifest), "--rounds", str(rounds)]
                    command += ["--private"] if private else []
                one = measure(command, env=env)
                found[side, private].append(one)
                print(
                    f"{side} {'with' if private else 'without'} DP: {one.wall_s:.1f} s wall, "
                    f"{one.cpu_s:.1f} s CPU, {one.pss_mb:.0f} MB, load before {one.load:.1f}",
                    file=sys.stderr,
                    flush=True,
                )
    middle = {job: medians(runs) for job, runs in found.items()}
    print(f"{machine(device)}; {rounds} rounds; medians of {runs}, alternated\n")
    print("| run by | DP | wall s | CPU s | peak memory MB | processes | load before |")
    print("|---|---|---|---|---|---|---|")
    for (side, private), one in middle.items():
        print(
            f"| {side} | {'with' if private else 'without'} | {one.wall_s:.1f} | {one.cpu_s:.1f} "
            f"| {one.pss_mb:.0f} | {one.processes} | {one.load:.1f} |"
        )
    print("\n| ratio | wall | CPU | memory |\n|---|---|---|---|")
    for ours in (("loopback", False), ("loopback", True)):
        for other in (("bare", False), ("flower", False), ("bare", True), ("flower", True)):
            if ours in middle and other in middle:
                one, two = middle[ours], middle[other]
                print(
                    f"| {_called(ours)} : {_called(other)} | {one.wall_s / two.wall_s:.2f} "
                    f"| {one.cpu_s / two.cpu_s:.2f} | {one.pss_mb / two.pss_mb:.2f} |"
                )


def _called(job: tuple[str, bool]) -> str:
    return f"{job[0]} {'with' if job[1] else 'without'} DP"


if __name__ == "__main__":
    main()
