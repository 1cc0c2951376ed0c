"""Recipes: functions that return a typed pipeline. Names and purposes are here, so that `--help` stays light."""

RECIPES: dict[str, str] = {
    "shapes_4step": "distil the bundled teacher to 4 steps without guidance",
    "shapes_2step": "distil the bundled teacher to 2 steps without guidance",
    "sd35_medium_4step": "SD3.5-Medium to 4 steps, whole networks, the paper's numbers where they are known",
    "sd35_medium_2step": "the same to 2 steps",
    "sd35_large_4step": "SD3.5-Large to 4 steps, whole networks",
    "sd35_medium_4step_frugal": "SD3.5-Medium to 4 steps by adapters (LoRA), for one GPU of 24 GB",
    "sd35_medium_2step_frugal": "the same to 2 steps",
    "sd35_large_4step_frugal": "SD3.5-Large to 4 steps by adapters",
    "shapes_teacher": "train the bundled teacher itself, from the autoencoder on (hours on a CPU)",
}
