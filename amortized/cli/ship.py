"""``amortized solve|export|serve``: a trained solver at work; thin, the work is in :mod:`amortized.shipping`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from amortized import checkpoint
from amortized.cli.differences import same_class
from amortized.cli.errors import UsageError
from amortized.cli.parsing import Parser, full_names
from amortized.cli.recipes import resolve_recipe
from amortized.cli.surroundings import say
from amortized.contract import ProblemError
from amortized.shipping.load import REFERENCES, find, load, untrained
from amortized.shipping.trained import TrainedSolver


def run(args: list[str]) -> None:
    """Run ``solve``, ``export`` or ``serve`` with these words."""
    command, *words = ["-c" if word == "--config" else word for word in args]
    function = COMMANDS[command]
    parser = Parser(prog=f"amortized {command}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_argument("-c", dest="recipe", type=str | None, default=None, help="Name or path of the recipe.")
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="A checkpoint, a run's folder, or last; by default the recipe's last run, or its reference checkpoint. For solve "
        "also untrained: every context is solved from the cold start, for solutions to learn from.",
    )
    parser.add_function_arguments(function, skip={"solver", "path"}, as_group=False)
    given = parser.parse_args(words).as_dict()
    recipe, ckpt_path = given.pop("recipe"), given.pop("ckpt_path")
    if ckpt_path == checkpoint.UNTRAINED:
        if command != "solve" or recipe is None:
            raise UsageError(f"--ckpt_path {checkpoint.UNTRAINED} is for solve, with -c RECIPE; got {command}")
        return solve(_untrained(Path(resolve_recipe(recipe))), None, **given)
    path = checkpoint_of(recipe, ckpt_path)
    say(f"takes {path}")
    function(load(path), path, **given)


def _untrained(config: Path) -> TrainedSolver:
    recipe = full_names(yaml.safe_load(config.read_text(encoding="utf-8")) or {})
    if missing := [part for part in ("model", "data") if "class_path" not in (recipe.get(part) or {})]:
        raise UsageError(f"{config} has no {missing[0]}")
    return untrained(recipe, config.stem)


def checkpoint_of(recipe: str | None, given: str | None) -> Path:
    """The checkpoint file of a command; of the recipe, if one is named.

    Raises:
        UsageError: if neither names one.
    """
    if recipe is None:
        if given in (None, "last"):
            raise UsageError("which model? give -c RECIPE, or --ckpt_path a checkpoint or the folder of a run")
        return find(str(given))
    config = Path(resolve_recipe(recipe))
    name = config.stem
    own = checkpoint.newest(config.parent).path if config.name == "config.yaml" else None  # of the run that wrote it
    path = find(given) if given not in (None, "last") else own or _last(name, reference=given is None)
    wanted = full_names(yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("model") or {}
    held = checkpoint.recipe_in(path, checkpoint.load(path))["model"]["class_path"]
    if "class_path" in wanted and not same_class(held, wanted["class_path"]):
        theirs, ours = (full.rpartition(".")[2] for full in (held, wanted["class_path"]))
        raise checkpoint.MismatchError(f"{path} is of another recipe: it holds a {theirs}, {name} asks for a {ours}")
    return path


def _last(name: str, reference: bool) -> Path:
    runs = Path("runs", name).glob("*/checkpoints")
    for run in sorted(runs, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if (found := checkpoint.newest(run).path) is not None:
            return found
    if reference and (REFERENCES / f"{name}.ckpt").is_file():
        return REFERENCES / f"{name}.ckpt"
    raise UsageError(f"there is no trained model of {name}: give --ckpt_path a checkpoint or the folder of a run")


def solve(
    solver: TrainedSolver,
    path: Path | None,
    out: str,
    contexts: int | None = None,
    shard_size: int = 65536,
    shards: str | None = None,
    tol: float = 1e-3,
    batch_size: int = 4096,
    predict: str | None = None,
    split: Literal["train", "test"] | None = None,
    with_contexts: bool | None = None,
    verify: bool = False,
    device: str | None = None,
) -> None:
    """Solve any number of contexts into a folder of shards; start it again, on any number of processes, to go on.

    Args:
        solver: trained, or not.
        path: of its checkpoint, if it has one.
        out: Folder of the shards.
        contexts: How many; by default all of a finite set.
        shard_size: Contexts in a shard.
        shards: i/n: this is the i-th of n processes, from 0; by default what torchrun or SLURM say.
        tol: What a solution may lack, in the objective's unit.
        batch_size: Contexts that are solved together.
        predict: A file of contexts; by default they are drawn, or those of a split where the data are a finite set.
        split: Of a finite set; by default test, and train for --ckpt_path untrained.
        with_contexts: Write the contexts as well, which training on the folder needs; by default for --ckpt_path untrained.
        verify: Check the checksums of shards that are done, and make anew what is damaged.
        device: Of the model, for example cuda:0; by default a GPU if there is one.
    """
    from amortized.shipping.production import Plan, default_device, described, produce, share, size, source

    for name, value in (("contexts", contexts), ("shard_size", shard_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1; got {value}")
    if not tol > 0:
        raise ProblemError(f"--tol must be positive, in the objective's unit; got {tol}")
    place = device or default_device()
    solver.to(place)
    digest = checkpoint.sha256(path) if path is not None else checkpoint.UNTRAINED
    if predict is not None:
        solver.data.predict, split = predict, "test"
        digest += f" {checkpoint.sha256(Path(predict))}" if Path(predict).is_file() else ""
    taken = source(solver, split or ("test" if solver.trained else "train"))
    if contexts is None:
        if taken == "drawn":
            raise UsageError(f"how many? {type(solver.data).__name__} draws contexts without end: give --contexts")
        contexts = size(solver, taken)
    plan = Plan(
        solver.name,
        digest,
        contexts,
        shard_size,
        batch_size,
        tol,
        solver.data.seed,
        not solver.trained if with_contexts is None else with_contexts,
        place.partition(":")[0],
        taken,
        described(solver.solver),
    )
    found = produce(solver, Path(out), plan, share(shards), verify)
    paths = ", ".join(f"{count:,} {name}" for name, count in found["paths"].items() if count)
    say(f"{found['shards']} of {plan.shards} shards, {found['contexts']:,} contexts in {out}: {paths}")


def export(
    solver: TrainedSolver, path: Path, format: Literal["torch", "onnx"] = "torch", out: str | None = None
) -> None:
    """Write prediction, objective and certificate as one graph that runs without amortized.

    Args:
        solver: trained.
        path: of its checkpoint.
        format: For torch.export.load, or for an ONNX runtime.
        out: The file; by default the recipe's name in the working directory.
    """
    from amortized.shipping.export import SUFFIX
    from amortized.shipping.export import export as write

    file = Path(out or solver.name).with_suffix(SUFFIX[format])
    about = write(solver, file, format, checkpoint.sha256(path))
    off = max(about["largest_difference"].values())
    say(f"written to {file}; on {about['compared_on']} contexts it is the module's to within {off:.2g}")


def serve(
    solver: TrainedSolver,
    path: Path,
    tol: float = 1e-3,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    solvers: int = 1,
    max_rows: int = 4096,
    max_megabytes: float = 16,
    max_pending: int = 256,
    deadline: float = 10,
    timeout: float = 60,
) -> None:
    """Solve contexts that come by HTTP; a page at / shows how to ask.

    Args:
        solver: trained.
        path: of its checkpoint.
        tol: What a solution may lack, in the objective's unit.
        host: 127.0.0.1 serves this machine alone, 0.0.0.0 everyone who can reach it.
        port: From 1024 to 65535.
        workers: Processes that predict and certify, for each device.
        solvers: Processes that solve the rows which the network does not.
        max_rows: Contexts in a request.
        max_megabytes: Of a request.
        max_pending: Requests at a time.
        deadline: Seconds that the solver has for the rows of a request.
        timeout: Seconds after which a request is given up.
    """
    try:
        from amortized.shipping.serve import Limits, Service
        from amortized.shipping.serve import serve as run_server
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install '.[serve]' in the clone") from error
    if not 1024 <= port <= 65535 or host not in ("127.0.0.1", "0.0.0.0", "::"):
        raise UsageError(f"--port is from 1024 to 65535, --host 127.0.0.1, 0.0.0.0 or ::; got {port} and {host}")
    if not tol > 0:
        raise ProblemError(f"--tol must be positive, in the objective's unit; got {tol}")
    limits = Limits(max_rows, max_megabytes, max_pending, deadline, timeout)
    service = Service(path, tol, limits, workers, solvers)
    say(
        f"serves {service.about['recipe']} at http://{'localhost' if host == '::' else host}:{port}/ once its workers are ready"
    )
    run_server(service, host, port)


COMMANDS: dict[str, Any] = {"solve": solve, "export": export, "serve": serve}
"""Commands that take a trained model and no trainer."""
