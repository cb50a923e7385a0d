"""The models, one file each. Importing this package registers them."""

from ctr_models.models.autoint import AutoInt
from ctr_models.models.aw_moe import AWMoE
from ctr_models.models.dcn import DCN
from ctr_models.models.dcnv2 import DCNV2
from ctr_models.models.deepfm import DeepFM
from ctr_models.models.din import DIN
from ctr_models.models.dnn import DNN
from ctr_models.models.dualmlp import DualMLP
from ctr_models.models.finalmlp import FinalMLP
from ctr_models.models.fm import FM
from ctr_models.models.gdcn import GDCN
from ctr_models.models.ipnn import IPNN
from ctr_models.models.lr import LR
from ctr_models.models.masknet import MaskNet
from ctr_models.models.mmoe import MMoE
from ctr_models.models.mqsa_ted import MQSATED
from ctr_models.models.optinter import OptInter
from ctr_models.models.sasrec import SASRec

__all__ = [
    "DCN",
    "DCNV2",
    "DIN",
    "DNN",
    "FM",
    "GDCN",
    "IPNN",
    "LR",
    "MQSATED",
    "AWMoE",
    "AutoInt",
    "DeepFM",
    "DualMLP",
    "FinalMLP",
    "MMoE",
    "MaskNet",
    "OptInter",
    "SASRec",
]
