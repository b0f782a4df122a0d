"""Modules built from the verbs: STTM, its meta-token generators, proportional attention, a ready video Transformer."""

from sttm_kernels.nn.attention import proportional_attention
from sttm_kernels.nn.compression import CompressedTokens, compress, shorten_prompt
from sttm_kernels.nn.generators import DPCKNN, GENERATORS, Distinct, FarthestPoint, KMeans, Learned, Pool, TopK
from sttm_kernels.nn.sttm import STTM
from sttm_kernels.nn.video_transformer import VideoTransformer

__all__ = [
    "DPCKNN",
    "GENERATORS",
    "STTM",
    "CompressedTokens",
    "Distinct",
    "FarthestPoint",
    "KMeans",
    "Learned",
    "Pool",
    "TopK",
    "VideoTransformer",
    "compress",
    "proportional_attention",
    "shorten_prompt",
]
