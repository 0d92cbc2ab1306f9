"""Reading language models: checkpoints, components, scores and tokens."""

from jaxpattern.lm.model import Model, load, save

__all__ = ["Model", "load", "save"]
