"""The models, one file each. Importing this package registers them."""

from ctr_models.models.dcnv2 import DCNV2
from ctr_models.models.deepfm import DeepFM
from ctr_models.models.dnn import DNN
from ctr_models.models.dualmlp import DualMLP
from ctr_models.models.finalmlp import FinalMLP
from ctr_models.models.gdcn import GDCN
from ctr_models.models.lr import LR

__all__ = ["DCNV2", "DNN", "GDCN", "LR", "DeepFM", "DualMLP", "FinalMLP"]
