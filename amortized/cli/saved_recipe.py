"""The settings of a run: in its folder, in each of its checkpoints, and compared with those of a later command."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from amortized import checkpoint, disk
from amortized.cli.differences import differences, named, same_class, without


class SaveRecipe(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder and the recipe into every checkpoint.

    That of an earlier training is not replaced: one that goes on with other settings has ``config-2.yaml``, and so on. Those of
    the last ``validate``, ``test`` and ``predict`` in the folder of a run are ``config-predict.yaml`` and the like.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not self.already_saved and trainer.is_global_zero:
            folder = disk.make(Path(trainer.default_root_dir))
            # What another training wrote stays; what another test or prediction wrote is replaced, and so are its settings.
            further = itertools.count(2) if stage == "fit" else [TrainerFn(stage).value]
            names = itertools.chain(["config.yaml"], (f"config-{name}.yaml" for name in further))
            for path in map(folder.joinpath, names):
                if not path.exists() or path.read_text(encoding="utf-8") == self.text:
                    break
            disk.write(path, self.text)
        self.already_saved = True

    # Once a run, not at every save: a dump takes as long as some ten training steps.
    @functools.cached_property
    def text(self) -> str:
        """All settings, as YAML."""
        text: str = self.parser.dump(self.config, skip_unset=False)
        return text

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """Those that a checkpoint depends on."""
        return recipe_of(self.text)

    @functools.cached_property
    def solver(self) -> dict[str, Any] | None:
        """That of the gap."""
        found: dict[str, Any] | None = yaml.safe_load(self.text)["gap"]["solver"]
        return found

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint_: dict[str, Any]) -> None:
        checkpoint_[checkpoint.RECIPE] = self.recipe
        checkpoint_[checkpoint.SOLVER] = self.solver
        checkpoint_[checkpoint.PROCESSES] = trainer.world_size


def recipe_of(text: str) -> dict[str, Any]:
    """The settings that a checkpoint depends on: model, data, seed, and how the trainer updates."""
    everything = yaml.safe_load(text)
    trainer = {
        key: everything["trainer"].get(key)
        for key in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")
    }
    return {
        "seed_everything": everything["seed_everything"],
        "model": everything["model"],
        "data": everything["data"],
        "trainer": trainer,
    }


def predictions_of(text: str, weights: Path | None) -> dict[str, Any]:
    """What predictions depend on: the recipe, the weights, and the files that its data name, as plain values."""
    recipe = recipe_of(text)
    values = recipe["data"].get("init_args", {}).values()
    given = [Path(value) for value in values if isinstance(value, str) and os.path.exists(value)]
    files = sorted({file for path in given for file in (path, *path.rglob("*")) if file.is_file()})
    seen = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return {
        "recipe": recipe,
        "weights": checkpoint.sha256(weights) if weights else checkpoint.UNTRAINED,
        "files": [list(map(str, file)) for file in seen],
    }


def check_recipe(path: Path, loaded: dict[str, Any], command: str, given: dict[str, Any]) -> None:
    """Refuse a checkpoint whose settings disagree with those of a command, as :func:`recipe_of` gives them."""
    saved = checkpoint.recipe_in(path, loaded)
    classes = [recipe["model"]["class_path"] for recipe in (saved, given)]
    if not same_class(*classes):
        theirs, ours = (path.split(".")[-1] for path in classes)
        raise checkpoint.MismatchError(
            f"{path} is of another recipe: it holds a {theirs}, the recipe asks for a {ours}"
        )
    model, data = (named(given[part]["class_path"]) for part in ("model", "data"))
    if command != "fit":
        saved, given = ({"model": without(recipe["model"], model.free_settings)} for recipe in (saved, given))
    elif not all(key in loaded for key in ("optimizer_states", "loops", "global_step")):
        raise checkpoint.MismatchError(f"{path} holds no state of training: it can be tested, not continued")
    else:
        saved, given = (
            recipe
            | {
                "model": without(recipe["model"], model.free_to_resume),
                "data": without(recipe["data"], data.free_to_resume),
            }
            for recipe in (saved, given)
        )
    if found := differences(saved, given):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        config = path.parent.parent / "config.yaml"
        how = f" (-c {config} has them)" if config.is_file() else ""
        raise checkpoint.MismatchError(
            f"{path} was trained with other settings: {found[0]}{more}; give those it was trained with{how}"
        )
