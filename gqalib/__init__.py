"""gqalib: the thin library under the workbook on pruning grouped-query-attention language models."""

from gqalib.errors import InputError  # noqa: F401
from gqalib.model import attention, modeling_gqa_llama  # noqa: F401  (both register themselves with transformers)
