"""The command `fewstep`: its commands, and how it ends. Each imports what is heavy itself, so that `--help` answers at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import tyro
from safetensors import SafetensorError

from fewstep.commands import distil, evaluation, generate, models, serve, study, tables
from fewstep.recipes import RECIPES

app = tyro.extras.SubcommandApp()
RECIPE_HELP = "; ".join(f"{name}: {purpose}" for name, purpose in RECIPES.items())

COMMANDS: tuple[Callable[..., None], ...] = (
    distil.demo,
    distil.run,
    distil.plan,
    distil.cache,
    distil.show,
    models.adopt,
    models.lora_check,
    models.encoders,
    models.export,
    generate.generate,
    generate.replay,
    serve.serve,
    evaluation.eval_,
    evaluation.compare,
    tables.measure,
    tables.tables,
    tables.browse,
    distil.doctor,
)
for command in COMMANDS:
    app.command(name=command.__name__.strip("_").replace("_", "-"))(command)
app.command(study.app, name="study", help="A blind study with people: plan, serve, links, report, export, import.")


def main() -> None:
    """Entry point. What a user can cause ends in one line and exit code 2; `FEWSTEP_DEBUG=1` shows the traceback."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # advice on image processors is not for our users
    for name in ("torchao", "torch.utils._pytree"):  # nor what could not be loaded, and works without
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app.cli(prog="fewstep", description="Turn a slow flow model into a few-step one. Recipes: " + RECIPE_HELP)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:  # a full disk is the last
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not os.environ.get("WORLD_SIZE") or os.environ.get("FEWSTEP_DEBUG") or "onnection" not in str(error):
            raise
        said = "fewstep: another process of this run has ended; the same command goes on from the last checkpoint"
        print(said, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("fewstep: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if os.environ.get("WORLD_SIZE"):  # started by torchrun: a process that stays in the group may not end
            from fewstep.engine import ranks

            ranks.end()


if __name__ == "__main__":
    main()
