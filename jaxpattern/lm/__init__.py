"""Reading language models: checkpoints, components, scores and tokens."""

from jaxpattern.lm.components import component, components
from jaxpattern.lm.layouts import Layout, layout
from jaxpattern.lm.model import Model, abstract, load, save
from jaxpattern.lm.split import Residuals, Tail, split

__all__ = [
    "Layout",
    "Model",
    "Residuals",
    "Tail",
    "abstract",
    "component",
    "components",
    "layout",
    "load",
    "save",
    "split",
]
