"""Recipes: functions that return a typed pipeline. Names and purposes are here, so that `--help` stays light."""

RECIPES: dict[str, str] = {
    "shapes_4step": "distil the bundled teacher to 4 steps without guidance",
    "shapes_2step": "distil the bundled teacher to 2 steps without guidance",
    "shapes_teacher": "train the bundled teacher itself, from the autoencoder on (hours on a CPU)",
}
