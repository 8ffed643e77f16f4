"""What every Hugging Face process needs, imported once in the server that they are forks of."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteriaList

__all__ = ["AutoModelForCausalLM", "DynamicCache", "StoppingCriteriaList", "torch"]
