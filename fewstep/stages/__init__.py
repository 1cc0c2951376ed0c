"""One file per stage of the method; each has a `Config` and a `run`. Stages meet only through artefacts on disk."""
