"""fewstep: few-step distillation of rectified-flow text-to-image models. Start reading at `flow.py`."""

__version__ = "0.1.0"
