"""Models that the examples, the benchmarks and the tests train."""

from jaxpattern.models import superposition as superposition
from jaxpattern.models import transformer as transformer
from jaxpattern.models.transformer import NextTokenLoss as NextTokenLoss
from jaxpattern.models.transformer import TransformerConfig as TransformerConfig
from jaxpattern.models.transformer import attention_patterns as attention_patterns
from jaxpattern.models.transformer import make_loss_fn as make_loss_fn
from jaxpattern.models.transformer import residual_states as residual_states
from jaxpattern.models.transformer import split_params as split_params
