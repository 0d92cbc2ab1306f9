from jaxpattern.llc import LocalLearningCoefficient, llc
from jaxpattern.observables import excess_loss, mean_loss
from jaxpattern.posterior import Minibatch, Posterior, localized_posterior, restrict
from jaxpattern.restriction import Restriction, by_mask, by_path, by_slice, complement, coordinates, union
from jaxpattern.samplers import mala, rmsprop_sgld, sgld, sgnht
from jaxpattern.sampling import Plan, sample
